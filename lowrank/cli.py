"""The `lowrank` command; `train.py` and `eval.py` call into it.

Each sub-command is a function that takes the parsed arguments, imports what it needs and returns an exit status, so that
`lowrank --help` is quick. An error of the user's making is one message and status 2, without a traceback.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowrank.errors import ConfigError


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except (ConfigError, ValueError, RuntimeError, OSError) as error:
        if args.traceback:
            raise
        print(f"lowrank: {error}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="lowrank",
        description="Fine-tune a language model with adapters, and measure what it makes up and what it forgot.",
        epilog="example: lowrank train            (the quickstart: a small model becomes a laboratory-medicine expert)",
    )
    top.add_argument("--traceback", action="store_true", help="show the whole traceback of an error")
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, run: Any, help: str, example: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=help,
            description=help,
            epilog=f"example: {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run)
        return command

    command = add(
        "train", _train, "Train an adapter and measure it.",
        "lowrank train quickstart train.lr=1e-3 output_dir=runs/mine\n         lowrank train my.yaml --resume",
    )  # fmt: skip
    command.add_argument("config", nargs="?", help="a YAML file or a bundled recipe (default: quickstart)")
    command.add_argument("settings", nargs="*", metavar="key=value", help="settings that override the file's")
    command.add_argument("--dry-run", action="store_true", help="show the start screen and stop; nothing is written")
    command.add_argument("--resume", action="store_true", help="go on from the last checkpoint of the run's folder")

    command = add(
        "eval",
        _eval,
        "Evaluate a run on every held-out question.",
        "lowrank eval runs/quickstart-001 --tasks truth,ppl",
    )
    command.add_argument("run_folder", metavar="RUN", help="a run's folder")
    command.add_argument("--tasks", default="truth,ppl", help="comma-separated: truth, ppl (default: both)")
    command.add_argument("--against", default="base", help="base (default), or another run's folder")
    command.add_argument(
        "--items", default="all", choices=("all", "subset"), help="all questions or the stratified subset"
    )

    command = add("chat", _chat, "Talk to a run's model.", "lowrank chat runs/quickstart-001")
    command.add_argument("run_folder", metavar="RUN", help="a run's folder, or a model")
    command.add_argument("--adapter", help="adapters that act, comma-separated; none: the base model")
    command.add_argument("--max-new-tokens", type=int, default=128)
    command.add_argument("--temperature", type=float, default=0.0, help="0 (default) always takes the likeliest token")

    command = add("init", _init, "Print a recipe, to be changed and trained.", "lowrank init quickstart > my.yaml")
    command.add_argument("recipe", nargs="?", default="quickstart")

    data = add(
        "data",
        _data,
        "Check or show a file of records.",
        "lowrank data check my.jsonl\n         lowrank data show my.jsonl --count 3",
    )
    data.add_argument("action", choices=("check", "show"))
    data.add_argument("file", metavar="FILE")
    data.add_argument("--model", default="quickstart", help="whose tokenizer and template `show` renders with")
    data.add_argument("--template", help="chat template: a built-in name or text (default: the model's own)")
    data.add_argument("--count", type=int, default=3)

    command = add(
        "merge", _merge, "Merge a run's adapter and say what survives.", "lowrank merge runs/quickstart-001 --to dense"
    )
    command.add_argument("run_folder", metavar="RUN")
    command.add_argument("--to", choices=("dense", "nf4"), default="dense")
    command.add_argument("--force", action="store_true", help="merge even where little of the update survives")

    command = add("doctor", _doctor, "Versions, devices, and what will be used.", "lowrank doctor")
    return top


def _train(args: argparse.Namespace) -> int:
    from lowrank.training.run import train

    config, settings = args.config, list(args.settings)
    if config is not None and "=" in config and not Path(config).is_file():
        config, settings = None, [config, *settings]
    run = train(config, settings, resume=args.resume, dry_run=args.dry_run)
    return 130 if run.interrupted else 0


def _eval(args: argparse.Namespace) -> int:
    from lowrank.evaluation.run import evaluate, table_of
    from lowrank.training.screen import console

    tasks = tuple(task for task in args.tasks.split(",") if task)
    results = evaluate(args.run_folder, tasks=tasks, against=args.against, items=args.items)
    console.print(table_of(results))
    return 0


def _chat(args: argparse.Namespace) -> int:
    from lowrank.chat import chat

    names = None if args.adapter is None else [name for name in args.adapter.split(",") if name]
    return chat(args.run_folder, names, args.max_new_tokens, args.temperature)


def _init(args: argparse.Namespace) -> int:
    from lowrank.training.config import recipe_path

    print(recipe_path(args.recipe).read_text(encoding="utf-8"), end="")
    return 0


def _data(args: argparse.Namespace) -> int:
    from lowrank.data.records import read_records

    records = read_records(args.file)
    kinds: dict[str, int] = {}
    for record in records:
        kinds[record.kind] = kinds.get(record.kind, 0) + 1
    if args.action == "check":
        print(f"{args.file}: {len(records)} records ({', '.join(f'{n} {kind}' for kind, n in sorted(kinds.items()))})")
        return 0
    from lowrank.data.render import Renderer
    from lowrank.models.load import load_tokenizer_of
    from lowrank.training.screen import console, masked_text

    tokenizer = load_tokenizer_of(args.model, args.template)
    renderer = Renderer(tokenizer)
    for record in records[: args.count]:
        example = renderer.example(record)
        console.print(f"{record.id or '-'} ({record.kind}): {len(example.input_ids)} tokens", style="bold")
        console.print(masked_text(example, tokenizer.decode))
    return 0


def _merge(args: argparse.Namespace) -> int:
    from lowrank.merging import merge
    from lowrank.training.reopen import reopen

    model, _ = reopen(args.run_folder)
    report = merge(model, "default", to=args.to, force=args.force)
    for path, share in sorted(report.survival.items(), key=lambda item: item[1]):
        print(f"{share:8.2%}  {path}")
    print(report)
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from lowrank.doctor import report

    print(report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
