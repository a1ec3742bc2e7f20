"""One run, from configuration to measured adapter.

    1  the base as delivered     gives the teacher's states for the general examples, and the table's last column
    2  the quantized base        the table's first column; then the adapter is attached and trained
    3  the tuned model           the adapter is saved, the same questions are asked again, the table is written

Everything lies in the run's folder: config.yaml, versions.json, metrics.jsonl, timing.jsonl, checkpoints/, adapter/,
samples.jsonl, results.json, plots/, report.html.
"""

import json
import platform
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowrank.data.batches import Loader
from lowrank.data.mixture import mix
from lowrank.data.render import Example, Renderer
from lowrank.errors import ConfigError
from lowrank.evaluation.plots import plot_loss
from lowrank.evaluation.report import write_report
from lowrank.evaluation.run import Measured
from lowrank.evaluation.table import end_table
from lowrank.files import write_json, write_jsonl, write_text
from lowrank.store import save_adapter
from lowrank.targets import attach, check_targets
from lowrank.training import screen
from lowrank.training.config import RunConfig, read_config, to_yaml
from lowrank.training.contract import contract_of
from lowrank.training.loop import Run, fit, give_back_memory, peak_memory_mb
from lowrank.training.material import Examples, Material, read_material, render, validation_batches
from lowrank.training.reopen import load_base, settled
from lowrank.training.teacher import with_teacher

VALIDATION_EXAMPLES = 96


def train(config: Any = None, overrides: Any = (), resume: bool = False, dry_run: bool = False) -> Run:
    """Train and evaluate as the configuration says; the result is a Run with .folder, .metrics and .results.

    `config`: a YAML file, a bundled recipe's name, a dictionary, a RunConfig, or None for the quickstart. `resume` goes
    on from the last checkpoint of the run's folder. `dry_run` stops after the start screen and writes nothing.
    Raises ConfigError for a configuration that cannot be run, before anything is downloaded or written.
    """
    settings = read_config(config, overrides)
    folder = run_folder(settings, resume, dry_run)
    if resume:
        saved = settled(read_config(folder / "config.yaml"))
        given = replace(settings, dtype=saved.dtype) if settings.dtype == "auto" else settings
        settings = replace(given, output_dir=str(folder))
        _require_same(settings, saved, folder)
    settings = replace(settled(settings), output_dir=str(folder))
    material = read_material(settings.data, settings.train.seed, settings.eval.split)
    if dry_run:
        return _run(settings, material, folder, resume, dry_run)
    try:
        return _run(settings, material, folder, resume, dry_run)
    except KeyboardInterrupt:
        if (folder / "config.yaml").is_file():
            screen.console.print(f"\nstopped; {_how_to_go_on(folder)}")
        raise


def _run(settings: RunConfig, material: Material, folder: Path, resume: bool, dry_run: bool) -> Run:
    clock = _Clock()
    measured = Measured(folder, settings.eval, material, keep=not dry_run)
    examples, stream, tokenizer = _delivered(settings, material, measured, clock, dry_run)
    with clock("load the quantized base"):
        model, _ = load_base(settings, settings.quantize)
    if not dry_run and settings.eval.tasks:
        with clock("evaluate the quantized base"):
            measured("base", model, tokenizer)
        give_back_memory()
    torch.manual_seed(settings.train.seed)
    chosen = settings.adapter
    coverage = attach(model, chosen.settings, chosen.targets, chosen.exclude, chosen.train_also)
    loader = Loader(stream, settings.train.batch_size, tokenizer.pad_id or 0, settings.train.seed)
    steps = settings.train.steps or settings.train.epochs * loader.batches_per_epoch
    facts = _facts(settings, material, examples, stream, model, steps)
    screen.console.print(screen.start_screen(facts, coverage, stream[0], tokenizer.decode))
    if dry_run:
        return Run(None, {"steps": steps})

    validation = validation_batches(
        examples.validation, settings.train.batch_size, tokenizer.pad_id or 0, VALIDATION_EXAMPLES
    )
    with clock("train"), screen.progress_line(steps) as show:
        run = fit(model, loader, settings.train, validation=validation, folder=folder, resume=resume, on_step=show)
    run.folder = folder
    if run.interrupted:
        screen.console.print(f"\nstopped after step {run.metrics['steps']} of {steps}; {_how_to_go_on(folder)}")
        return run
    asked = contract_of(material.train, settings.eval.max_new_tokens)
    model.origin = replace(model.origin, generation=asked)  # type: ignore[assignment, type-var, arg-type]
    save_adapter(model, folder / "adapter")
    if settings.eval.tasks:
        with clock("evaluate the tuned model"):
            measured("tuned", model, tokenizer)
    run.results = measured.results
    run.metrics |= {"seconds_in_all": clock.total(), "peak_memory_mb": peak_memory_mb()}
    run.metrics["trainable"] = coverage.trainable
    write_json(folder / "results.json", run.results | {"metrics": run.metrics})
    plot_loss(folder)
    if run.results:
        write_report(folder, run.results, notice=material.notice)
    _finish(run, material, tokenizer)
    return run


def _how_to_go_on(folder: Path) -> str:
    return f"everything is kept. Go on with:\n  lowrank train {folder / 'config.yaml'} --resume"


def _require_same(given: RunConfig, saved: RunConfig, folder: Path) -> None:
    """ConfigError where a resumed run is asked for with other settings than it was begun with."""
    before, now = to_yaml(replace(saved, output_dir=str(folder))), to_yaml(given)
    changed = [line.strip() for line in now.splitlines() if line not in before.splitlines()]
    if changed:
        raise ConfigError(
            f"{folder} was begun with other settings ({changed[0]} is new); a run resumes as it was begun:"
            f" lowrank train {folder / 'config.yaml'} --resume"
        )


def run_folder(config: RunConfig, resume: bool, dry_run: bool = False) -> Path:
    """The folder of this run: `output_dir`, or the next free runs/<recipe>-NNN; with `resume`, the last there is."""
    runs = Path("runs")
    numbered = [
        (int(match[1]), path)
        for path in runs.glob(f"{config.recipe}-*")
        if (match := re.fullmatch(rf"{re.escape(config.recipe)}-(\d+)", path.name))
    ]
    if config.output_dir is not None:
        folder = Path(config.output_dir)
    elif resume:
        if not numbered:
            raise ConfigError(
                f"nothing to resume: there is no {runs / config.recipe}-NNN; name the run with output_dir=FOLDER"
            )
        folder = max(numbered)[1]
    else:
        folder = runs / f"{config.recipe}-{max((n for n, _ in numbered), default=0) + 1:03d}"
    if resume and not (folder / "config.yaml").is_file():
        raise ConfigError(f"nothing to resume: {folder} holds no run (no config.yaml)")
    if resume or dry_run:
        return folder
    if folder.is_file():
        raise ConfigError(f"output_dir {folder} is a file; choose a folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(
            f"output_dir {folder} holds a run or other files already: choose another folder, or go on with --resume"
        )
    return folder


def _delivered(
    config: RunConfig, material: Material, measured: Measured, clock: "_Clock", dry_run: bool
) -> tuple[Examples, list[Example], Any]:
    """(rendered examples, the training stream, tokenizer): all that needs the unquantized base, which is gone again."""
    with clock("load the base as delivered"):
        model, tokenizer = load_base(config, None)
    if tokenizer is None:
        raise ConfigError(
            f"{config.model} has no tokenizer, so text cannot become tokens; add its tokenizer.json or tokenizer.model"
        )
    examples = render(material, Renderer(tokenizer, config.data.max_length), with_general=config.data.general_share > 0)
    check_targets(
        model, config.adapter.settings, config.adapter.targets, config.adapter.exclude, config.adapter.train_also
    )
    if not dry_run:  # everything that can be refused has been looked at: from here on the run leaves files
        folder = Path(str(config.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "config.yaml", to_yaml(config))
        write_json(folder / "versions.json", versions())
        clock.keep(folder / "timing.jsonl")
    if not dry_run and config.eval.tasks and config.eval.delivered and config.quantize is not None:
        with clock("evaluate the base as delivered"):
            measured("delivered", model, tokenizer)
    stream = mix(examples.train, examples.general, config.data.general_share, config.train.seed)
    held = list({id(example): example for example in stream[len(examples.train) :]}.values())
    if held and config.data.general_loss == "kl" and not dry_run:
        with clock("teacher's states"), screen.counting("teacher's states", len(held)) as count:
            taught = with_teacher(model, held, tokenizer.pad_id or 0, on_progress=count)
        by_example = {id(example): other for example, other in zip(held, taught)}
        stream = [by_example.get(id(example), example) for example in stream]
    del model
    give_back_memory()
    return examples, stream, tokenizer


def _facts(
    config: RunConfig, material: Material, examples: Examples, stream: list[Any], model: nn.Module, steps: int
) -> dict[str, str]:
    tokens = sum(len(example.input_ids) for example in stream)
    kinds = Counter(example.kind for example in stream)
    stored = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    cut = f", {examples.cut} cut at {config.data.max_length} tokens" if examples.cut else ""
    share = sum(len(e.input_ids) for e in stream if e.kind == "general") / tokens
    computed = f"computed in {config.dtype}"
    t, counts = config.train, ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()))
    held = f" ({share:.0%} of the tokens general, held by {config.data.general_loss})" if share else ""
    if not share and material.own_general:
        held = f" ({material.own_general} general records left out: data.general_share is 0)"
    return {
        "model": f"{config.model}, base stored in {config.quantize or config.dtype}: {stored / 1e6:.0f} MB; {computed}",
        "data": f"{material.name}: {counts}; {tokens:,} tokens{held}{cut}",
        "training": f"{steps} steps of {t.batch_size} examples, peak rate {t.lr:g}, seed {t.seed}",
        "memory": f"{peak_memory_mb():,.0f} MB at most so far",
        "folder": str(config.output_dir),
    }


def _finish(run: Run, material: Material, tokenizer: Any) -> None:
    assert run.folder is not None
    if run.results:
        screen.console.print(end_table(run.results))
    m = run.metrics
    screen.console.print(
        f"{m['tokens']:,} tokens in {screen.clock(m['seconds'])}, {screen.clock(m['seconds_in_all'])} in all,"
        f" {m['peak_memory_mb']:,.0f} MB at most. Everything is in {run.folder}:"
        f" report.html, adapter/, results.json, samples.jsonl.\nTalk to it: lowrank chat {run.folder}"
    )
    if material.notice:
        screen.console.print(material.notice, style="dim")


def versions() -> dict[str, str]:
    """What a run was made with."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    found["threads"] = str(torch.get_num_threads())
    for name in ("lowrank-engine", "torch", "triton", "numpy", "safetensors", "tokenizers", "sentencepiece"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


class _Clock:
    """Times the phases of a run; each leaves a row in timing.jsonl."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self.started = time.perf_counter()
        self.rows: list[dict[str, Any]] = []

    def keep(self, path: Path) -> None:
        """Write to `path` from now on, behind what the first part of a resumed run took."""
        self.path = path
        if path.is_file():
            self.rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] + self.rows

    def total(self) -> float:
        return time.perf_counter() - self.started

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        seconds = round(time.perf_counter() - began, 2)
        self.rows.append({"phase": phase, "seconds": seconds, "peak_memory_mb": round(peak_memory_mb())})
        if self.path is not None:
            write_jsonl(self.path, self.rows)
