"""The `lowrank` command; `train.py` and `eval.py` call into it.

Each sub-command is a function that takes the parsed arguments, imports what it needs and returns an exit status, so
that `lowrank --help` is quick. An error of the user's making is one message and status 2, without a traceback.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowrank.errors import ConfigError, at_least


def main(arguments: Sequence[str] | None = None) -> int:
    top = parser()
    args, behind = top.parse_known_args(arguments)  # key=value may also stand behind a flag
    if behind and not (args.run is _train and all("=" in word and not word.startswith("-") for word in behind)):
        top.error(f"unrecognized arguments: {' '.join(behind)}")
    if behind:
        args.settings = [*args.settings, *behind]
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

    def add(name: str, run: Any, help: str, *examples: str) -> argparse.ArgumentParser:
        epilog, raw = "example: " + "\n         ".join(examples), argparse.RawDescriptionHelpFormatter
        command = commands.add_parser(name, help=help, description=help, epilog=epilog, formatter_class=raw)
        command.set_defaults(run=run)
        return command

    command = add(
        "train", _train, "Train an adapter and measure it.",
        "lowrank train quickstart train.lr=1e-3 output_dir=runs/mine", "lowrank train my.yaml --resume",
    )  # fmt: skip
    command.add_argument("config", nargs="?", help="a YAML file or a bundled recipe (default: quickstart)")
    command.add_argument("settings", nargs="*", metavar="key=value", help="settings that override the file's")
    command.add_argument("--dry-run", action="store_true", help="show the start screen and stop; nothing is written")
    command.add_argument("--resume", action="store_true", help="go on from the last checkpoint of the run's folder")

    command = add(
        "eval", _eval, "Evaluate a run on every held-out question.",
        "lowrank eval runs/quickstart-001 --tasks truth,ppl",
    )  # fmt: skip
    command.add_argument("run_folder", metavar="RUN", help="a run's folder")
    command.add_argument("--tasks", default="truth,ppl", help="comma-separated: truth, ppl (default: both)")
    command.add_argument("--against", default="base", help="base (default), or another run's folder")
    command.add_argument("--items", default="all", choices=("all", "subset"), help="all, or the stratified subset")
    command.add_argument("--split", choices=("test", "validation"), help="held-out part (default: the run's, test)")

    command = add("chat", _chat, "Talk to a run's model.", "lowrank chat runs/quickstart-001")
    command.add_argument("run_folder", metavar="RUN", help="a run's folder, or a model")
    acting = "adapters that act together, comma-separated: names, folders, other runs; `none` is the base model"
    command.add_argument("--adapter", help=acting)
    command.add_argument("--system", help="a system prompt; this and what follows: as in training, unless given")
    command.add_argument("--temperature", type=float, help="0 always takes the likeliest token")
    command.add_argument("--top-k", type=int, help="draw from the k likeliest tokens; 0: from all")
    command.add_argument("--top-p", type=float, help="draw from the likeliest tokens that hold this probability")
    command.add_argument("--repetition-penalty", type=float, help="above 1: tokens that were said are less likely")
    command.add_argument("--stop", action="append", help="end the answer before this text; may be given several times")
    command.add_argument("--seed", type=int, help="the same seed gives the same draws")
    command.add_argument("--max-new-tokens", type=int)

    command = add("init", _init, "Print a recipe, to be changed and trained.", "lowrank init quickstart > my.yaml")
    command.add_argument("recipe", nargs="?", default="quickstart")

    command = add(
        "data", _data, "Check or show a file of records.",
        "lowrank data check my.jsonl", "lowrank data show my.jsonl --count 3",
    )  # fmt: skip
    command.add_argument("action", choices=("check", "show"))
    command.add_argument("file", metavar="FILE")
    command.add_argument("--model", default="quickstart", help="whose tokenizer and template `show` renders with")
    command.add_argument("--template", help="chat template: a built-in name or text (default: the model's own)")
    command.add_argument("--count", type=int, default=3)

    command = add(
        "merge", _merge, "Merge a run's adapter into the model and write the model; show what survives.",
        "lowrank merge runs/quickstart-001 --to dense",
    )  # fmt: skip
    command.add_argument("run_folder", metavar="RUN")
    command.add_argument("--to", choices=("dense", "nf4"), default="dense", help="numbers, or bitsandbytes' 4 bits")
    command.add_argument("--force", action="store_true", help="merge even where little of the update survives")
    command.add_argument("--calibrate", metavar="FILE", help="text to round for: NF4 then keeps several times as much")
    command.add_argument("--text", metavar="FILE", help="text on which the change of the logits is measured")
    command.add_argument("--out", metavar="FOLDER", help="a new folder (default: RUN/merged-dense or RUN/merged-nf4)")

    command = add(
        "export", _export, "Write a run's adapter, or the merged model, for other tools (docs/serve.md).",
        "lowrank export runs/quickstart-001 --format gguf --type Q8_0",
    )  # fmt: skip
    command.add_argument("run_folder", metavar="RUN", help="a run's folder; for hf and gguf also a model")
    command.add_argument(
        "--format", choices=("peft", "hf", "gguf"), default="peft",
        help="peft: the adapter for PEFT and vLLM; hf: the merged model for transformers and vLLM; gguf: for llama.cpp",
    )  # fmt: skip
    command.add_argument("--type", choices=("F16", "Q8_0"), default="F16", help="how a GGUF file stores its weights")
    command.add_argument("--to", metavar="PATH", help="a new folder or .gguf file (default: RUN/export-FORMAT)")

    command = add(
        "adapters", _adapters, "List the adapter methods, or prove one.",
        "lowrank adapters list", "lowrank adapters test ./mine.py:MyMethod",
    )  # fmt: skip
    command.add_argument("action", choices=("list", "test"))
    command.add_argument("method", nargs="?", help="for test: a registered name, or FILE.py:Class")

    command = add(
        "quant", _quant, "Measure what quantization does to a model.",
        "lowrank quant report quickstart --format nf4-dq,int8",
    )  # fmt: skip
    command.add_argument("action", choices=("report",))
    command.add_argument("model", metavar="MODEL", help='"quickstart", a folder, or a GGUF file')
    command.add_argument("--format", default="nf4-dq,nf4,fp4,int4,int4-affine,int8", help="comma-separated formats")
    command.add_argument("--block-size", type=int, default=64)
    command.add_argument("--text", metavar="FILE", help="also the perplexity of this text in each format")
    command.add_argument("--plot", metavar="FILE.png", help="relative error of each weight as a picture")

    command = add(
        "domain", _domain, "Write a domain's questions from a knowledge base.",
        "lowrank domain build my_kb.jsonl --templates my_templates.yaml --to my-domain",
    )  # fmt: skip
    command.add_argument("action", choices=("build",))
    command.add_argument("knowledge", metavar="KB.jsonl")
    command.add_argument("--templates", metavar="FILE.yaml", help="wordings (default: the bundled ones)")
    command.add_argument("--to", metavar="FOLDER", default="domain", help="where the records go (default: domain)")
    command.add_argument("--seed", type=int, default=0)

    command = add(
        "plan", _plan, "Say how much memory a model takes to train and to run; no weight is read.",
        "lowrank plan chatglm3-6b --memory 24GB --targets query_key_value",
        "lowrank plan my-model/ --memory 80GB --length 4096 --samples 60000",
    )  # fmt: skip
    command.add_argument("model", metavar="MODEL", help="a built-in name (qwen-72b), a folder, config.json or GGUF")
    command.add_argument("--memory", default="24GB", help="of each device (default: 24GB)")
    command.add_argument("--batch", type=int, default=1, help="examples at a time on each device (default: 1)")
    command.add_argument("--length", type=int, help="tokens of an example (default: 1024, or all that the model takes)")
    command.add_argument("--devices", type=int, default=1)
    command.add_argument("--rank", type=int, default=8)
    command.add_argument("--targets", help="layers for the adapter, comma-separated (default: all linear ones)")
    command.add_argument("--samples", type=int, default=10_000, help="training examples there are (default: 10000)")
    command.add_argument("--keep-general", action="store_true", help="general ability must stay as it is")
    command.add_argument("--domains", type=int, default=1, help="brands or fields to be told apart (default: 1)")
    command.add_argument("--light", action="store_true", help="many small tasks over one base")
    command.add_argument("--cpu", action="store_true", help="plan for a CPU instead of a GPU")

    command = add("doctor", _doctor, "Versions, devices, and what will be used.", "lowrank doctor quickstart")
    command.add_argument("model", nargs="?", help="quickstart, a folder or a .gguf: what its layers run as, in NF4")
    command.add_argument("--compile", action="store_true", help="compile the CPU's inner loops for this machine, once")
    return top


def _train(args: argparse.Namespace) -> int:
    from lowrank.training.run import train

    config, settings = args.config, list(args.settings)
    if config is not None and "=" in config and not Path(config).is_file():
        config, settings = None, [config, *settings]
    run = train(config, settings, resume=args.resume, dry_run=args.dry_run)
    return 130 if run.interrupted else 0


def _eval(args: argparse.Namespace) -> int:
    from lowrank.evaluation.run import evaluate
    from lowrank.evaluation.table import end_table
    from lowrank.training.screen import console

    tasks = tuple(task for task in args.tasks.split(",") if task)
    results = evaluate(args.run_folder, tasks=tasks, against=args.against, items=args.items, split=args.split)
    console.print(end_table(results))
    return 0


def _chat(args: argparse.Namespace) -> int:
    from lowrank.chat import chat

    names = None if args.adapter is None else [name for name in args.adapter.split(",") if name]
    keys = ["system", "temperature", "top_k", "top_p", "repetition_penalty", "stop", "seed", "max_new_tokens"]
    return chat(args.run_folder, names, {key: getattr(args, key) for key in keys})


def _init(args: argparse.Namespace) -> int:
    from lowrank.training.config import recipe_path

    print(recipe_path(args.recipe).read_text(encoding="utf-8"), end="")
    return 0


def _data(args: argparse.Namespace) -> int:
    from lowrank.data.records import read_records

    records = read_records(args.file)
    if args.action == "check":
        kinds = Counter(record.kind for record in records)
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
    import torch

    from lowrank.merging import merge
    from lowrank.models.export import export_hf, own_generation
    from lowrank.training.contract import as_served, contract, warn_of_differences
    from lowrank.training.reopen import reopen

    if args.calibrate and args.to != "nf4":
        raise ConfigError("--calibrate chooses the codes of --to nf4; a dense merge rounds each number to the nearest")
    out = _new(args.out or f"{args.run_folder}/merged-{args.to}")
    model: Any
    model, tokenizer = reopen(args.run_folder)
    calibration = _windows(tokenizer, args.calibrate) if args.calibrate else None
    text = torch.cat(_windows(tokenizer, args.text)) if args.text else None
    report = merge(model, "default", to=args.to, force=args.force, calibration=calibration, text=text)
    for path, share in sorted(report.survival.items(), key=lambda item: item[1]):
        print(f"{share:8.2%}  {path}")
    print(report)
    warn_of_differences(args.run_folder, **as_served(own_generation(model.origin.path)))
    export_hf(model, tokenizer, out, quantized=args.to == "nf4", generation=contract(args.run_folder) or None)
    print(f"wrote {out}")
    return 0


def _windows(tokenizer: Any, path: str, width: int = 256) -> list[Any]:
    """The ids of a text file, (1, width) each; a shorter text is one window, the rest of a longer one is left out."""
    import torch

    ids = torch.tensor(tokenizer.encode(Path(path).read_text(encoding="utf-8")))
    if len(ids) < 2:
        raise ConfigError(f"{path} holds no text")
    return [window[None] for window in ids.split(width) if len(window) in (width, len(ids))]


def _export(args: argparse.Namespace) -> int:
    from lowrank.adapter import adapter_names
    from lowrank.chat import open_model
    from lowrank.files import staged
    from lowrank.merging import merge
    from lowrank.models.export import export_hf
    from lowrank.models.export_gguf import export_gguf
    from lowrank.store import save_adapter
    from lowrank.training.contract import contract

    is_run = (Path(args.run_folder) / "config.yaml").is_file()
    if not is_run and (args.format == "peft" or args.to is None):
        raise ConfigError(
            f"{args.run_folder} holds no run: it has no adapter for --format peft, and --to has to say where"
        )
    suffix = f"-{args.type}.gguf" if args.format == "gguf" else ""
    out = _new(args.to or f"{args.run_folder}/export-{args.format}{suffix}")
    model, tokenizer = open_model(args.run_folder)
    if args.format == "peft":
        with staged(out) as folder:
            save_adapter(model, folder, "default", format="peft")
    elif adapter_names(model):
        print(merge(model, "default"))
    if args.format == "hf":
        export_hf(model, tokenizer, out, generation=contract(args.run_folder) or None)
    for note in export_gguf(model, tokenizer, out, args.type) if args.format == "gguf" else ():
        print(f"warning: {note}", file=sys.stderr)
    print(f"wrote {out}")
    return 0


def _new(path: str) -> Path:
    if Path(path).exists():
        raise ConfigError(f"{path} exists already: choose another place, or remove it first")
    return Path(path)


def _adapters(args: argparse.Namespace) -> int:
    from lowrank import conformance

    if args.action == "list":
        print(conformance.listing())
        return 0
    if args.method is None:
        raise ConfigError("adapters test needs a method: a registered name, or FILE.py:Class")
    return conformance.run(args.method)


def _quant(args: argparse.Namespace) -> int:
    from lowrank.evaluation.quantization import report_of

    formats = tuple(name for name in args.format.split(",") if name)
    report = report_of(args.model, formats, args.block_size, args.text)
    print(report.text())
    if args.plot and not report.plot(args.plot):
        raise ConfigError('--plot needs matplotlib: pip install "lowrank-engine[eval]"')
    return 0


def _domain(args: argparse.Namespace) -> int:
    from lowrank.data.knowledge import read_knowledge
    from lowrank.data.questions import domain
    from lowrank.data.templates import BUNDLED, read_templates

    templates = read_templates(args.templates or BUNDLED)
    questions = domain(Path(args.knowledge).stem, read_knowledge(args.knowledge), templates).build(args.seed)
    questions.write(args.to)
    for split, counts in questions.counts().items():
        print(f"{split}: {', '.join(f'{n} {part}' for part, n in counts.items())}")
    print(f"wrote {args.to}, to be looked at. Train on the knowledge base itself, its evaluation included:")
    wordings = args.templates or "labtests"
    print(f"  lowrank train quickstart data.path={args.knowledge} data.templates={wordings} data.subjects=null")
    return 0


def _plan(args: argparse.Namespace) -> int:
    from lowrank.models.plan import Aim, Load, parse_size, read_model, screen
    from lowrank.training.screen import console

    if args.length is None:
        args.length = min(1024, read_model(args.model).max_positions)
    at_least(args, 1, "batch", "length", "devices", "rank", "samples", "domains", group="--")
    targets = tuple(args.targets.split(",")) if args.targets else None
    load = Load(args.batch, args.length, args.devices, args.rank, targets, args.cpu)
    console.print(screen(args.model, parse_size(args.memory), load,
                         Aim(args.samples, args.keep_general, args.domains, args.light)))  # fmt: skip
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from lowrank.doctor import report
    from lowrank.quant import compiled

    if args.compile:
        print(f"compiled in {compiled.build():.0f} s\n")
    print(report(args.model))
    return 0


if __name__ == "__main__":
    sys.exit(main())
