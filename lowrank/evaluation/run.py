"""A run's evaluation: the same questions to each model, the answers kept, the figures side by side.

    results["base" | "tuned" | "delivered"]    the quantized base, the tuned model, the base before quantization
    results["comparison"]                      base against tuned, question by question: McNemar's p, retention by area

The run's folder gets samples.jsonl (each answer with its verdict), results.json and report.html.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from lowrank.active import activate
from lowrank.data.records import Record
from lowrank.errors import ConfigError, unknown
from lowrank.evaluation.config import TASKS, EvalConfig
from lowrank.evaluation.perplexity import perplexity
from lowrank.evaluation.report import write_report
from lowrank.evaluation.truth import Row, ask_parts, by_part, compare, subset, summary, verdicts_of
from lowrank.files import read_json, write_json, write_jsonl
from lowrank.quant.linear import decoded
from lowrank.training.config import RunConfig, read_config
from lowrank.training.contract import GREEDY, system_of, warn_of_differences
from lowrank.training.material import Material, read_material
from lowrank.training.reopen import reopen, run_config
from lowrank.training.screen import counting


def measure(
    model: nn.Module,
    tokenizer: Any,
    test: Mapping[str, Sequence[Record]],
    knowledge: Any = None,
    prose: str = "",
    config: EvalConfig | None = None,
    name: str = "the model",
) -> tuple[dict[str, Any], list[Row]]:
    """(figures, one row an answer) of one model, its adapters as they are. `test` is asked whole."""
    config = config or EvalConfig()
    result: dict[str, Any] = {"n": {}, "intervals": {}}
    rows: list[Row] = []
    with decoded(model, config.decoded_mb * 10**6):
        if "truth" in config.tasks and any(test.values()):
            parts = by_part(test)
            with counting(f"questions to {name}", sum(map(len, parts.values()))) as count:
                sizes = {"max_new_tokens": config.max_new_tokens, "batch_size": config.batch_size}
                answers = ask_parts(model, tokenizer, parts, on_progress=count, **sizes)
            rows = verdicts_of(parts, answers, knowledge)
            result = summary(rows)
        if "ppl" in config.tasks and prose:
            found = perplexity(model, tokenizer.encode(prose, add_special=True))
            result["perplexity"] = found.value
            result["n"]["perplexity"] = found.tokens
            interval = found.interval()
            result["intervals"]["perplexity"] = None if interval is None else list(interval)
    return result, rows


class Measured:
    """What one run measured so far, column by column; with `keep`, its samples.jsonl grows along."""

    def __init__(self, folder: Path, config: EvalConfig, material: Material, keep: bool = True) -> None:
        self.folder, self.config, self.material, self.keep = folder, config, material, keep
        self.test = subset(material.test, config.questions)
        self.results: dict[str, Any] = {}
        self.rows: dict[str, list[Row]] = {}

    def __call__(self, column: str, model: nn.Module, tokenizer: Any) -> dict[str, Any]:
        """Measure one model as `column`."""
        m, named = self.material, NAMES.get(column, column)
        result, rows = measure(model, tokenizer, self.test, m.knowledge, m.prose, self.config, named)
        self.results[column], self.rows[column] = result, rows
        if self.rows.get("base") and self.rows.get("tuned"):
            self.results["comparison"] = compare(self.rows["base"], self.rows["tuned"])
        if self.keep:
            write_jsonl(self.folder / "samples.jsonl", samples(self.rows))
        return result


NAMES = {"base": "the quantized base", "tuned": "the tuned model", "delivered": "the base as delivered"}


def samples(rows: Mapping[str, Sequence[Row]]) -> list[dict[str, Any]]:
    """The lines of samples.jsonl: every answer of every column."""
    return [row.to_json(column) for column, answered in rows.items() for row in answered]


def evaluate(
    config_or_run: Any,
    tasks: Sequence[str] = TASKS,
    against: str | Path = "base",
    items: str = "all",
    split: str | None = None,
) -> dict[str, Any]:
    """Evaluate a run again: a Run, its folder, or the configuration that names it. Gives the results as a nested dict.

    `against` is "base", or the folder of a second run that answers the same questions (its results are the column of
    its name, and the files are named after it). `items`: "all" held-out questions, or the "subset" of training's end;
    `split`: of the "test" or of the "validation" part (the run's own choice where it is None).
    """
    if items not in ("all", "subset"):
        raise unknown("choice of items", items, ("all", "subset"))
    folder, settings = _run(config_or_run)
    of_run = settings.eval
    questions = 0 if items == "all" else of_run.questions or 140
    chosen = replace(of_run, tasks=tuple(tasks), questions=questions, split=split or of_run.split)
    mark = "" if chosen.split == of_run.split else f"-{chosen.split}"  # the run's own files are of its own split
    material = read_material(settings.data, settings.train.seed, chosen.split)
    asked = system_of(record for part in material.test.values() for record in part)
    warn_of_differences(folder, **{**GREEDY, "system": asked, "max_new_tokens": chosen.max_new_tokens})
    measured = Measured(folder, chosen, material, keep=False)
    model, tokenizer = reopen(folder)
    measured("tuned", model, tokenizer)
    if str(against) != "base":
        return _against(folder, Path(against), measured, mark)
    activate(model, None)
    measured("base", model, tokenizer)
    del model
    if settings.eval.delivered and settings.quantize is not None:
        model, tokenizer = reopen(folder, quantize=None, adapter=False)
        measured("delivered", model, tokenizer)
    path = folder / f"results{mark}.json"
    kept = read_json(path) if path.is_file() else {}
    results = {**kept, **{column: _onto(kept.get(column), found) for column, found in measured.results.items()}}
    if "truth" in tasks:  # without questions there are no answers, and those of before stay
        write_jsonl(folder / f"samples{mark}.jsonl", samples(measured.rows))
    write_json(path, results)
    if not mark:
        write_report(folder, results, notice=material.notice)
    return results


def _onto(before: Any, found: dict[str, Any]) -> dict[str, Any]:
    """New figures of one column over the old ones: a task that was not asked for keeps what it had."""
    if not isinstance(before, dict) or "n" not in found:  # the comparison is no column: it is made anew
        return found
    nested = {key: {**before.get(key, {}), **found.get(key, {})} for key in ("n", "intervals")}
    return {**before, **found, **nested}


def _against(folder: Path, other: Path, measured: Measured, mark: str) -> dict[str, Any]:
    """The second run answers the first one's questions; its own files stay untouched."""
    if other.resolve() == folder.resolve():
        raise ConfigError(f"--against names the same run, {folder}; wanted another run's folder, or base")
    name = other.name
    model, tokenizer = reopen(other)
    measured(name, model, tokenizer)
    results = {
        **measured.results,
        "comparison": compare(measured.rows["tuned"], measured.rows[name]) if measured.rows["tuned"] else {},
        "names": {"tuned": folder.name, name: name},
    }
    write_jsonl(folder / f"samples-{name}{mark}.jsonl", samples(measured.rows))
    write_json(folder / f"results-{name}{mark}.json", results)
    if not mark:
        write_report(folder, results, against=other, notice=measured.material.notice)
    return results


def _run(config_or_run: Any) -> tuple[Path, RunConfig]:
    """(folder, configuration) of what `evaluate` was given."""
    folder = getattr(config_or_run, "folder", None)
    if folder is None and isinstance(config_or_run, str | Path) and Path(config_or_run).is_dir():
        folder = Path(config_or_run)
    if folder is None:
        settings = read_config(config_or_run)
        if settings.output_dir is None:
            raise ConfigError(f"{config_or_run!r} names no run: give its folder, or a configuration with output_dir")
        folder = settings.output_dir
    return Path(folder), run_config(folder)
