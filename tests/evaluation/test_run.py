"""A run evaluated again, from its folder: results, samples and report, against the base and against another run."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowrank.errors import ConfigError
from lowrank.evaluation.run import evaluate, measure
from lowrank.files import read_json, read_jsonl
from lowrank.training.run import train

FIXTURES = Path(__file__).parents[1] / "fixtures"
KEYS = ("paraphrase", "trap", "trap_unseen", "true_premise", "abstention", "false_abstention", "hallucination")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with a real tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    config = json.loads((FIXTURES / "models" / "llama" / "config.json").read_text(encoding="utf-8"))
    weights = load_file(FIXTURES / "models" / "llama" / "model.safetensors")
    shutil.copyfile(FIXTURES / "tokenizer" / "test_model.model", folder / "tokenizer.model")
    torch.manual_seed(0)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in weights:
            weights[name] = 0.1 * torch.randn(1000, weights[name].shape[1])
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 1000}), encoding="utf-8")
    return folder


def settings(tiny: Path, folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "model": str(tiny),
        "dtype": "float32",
        "quantize": "nf4",
        "adapter": {"method": "lora", "rank": 2, "targets": "all-linear"},
        "data": {"path": "labtests-quick", "subjects": 3, "template": "plain", "max_length": 256, "general_share": 0.0},
        "train": {"steps": 2, "batch_size": 2, "lr": 1e-3},
        "eval": {"questions": 14, "max_new_tokens": 4, "delivered": False},
        "output_dir": str(folder),
    } | more


@pytest.fixture(scope="module")
def runs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base = tmp_path_factory.mktemp("runs")
    return tuple(train(settings(tiny, base / name)).folder for name in ("one", "two"))  # type: ignore[return-value]


def test_training_leaves_results_and_samples(runs: tuple[Path, Path]) -> None:
    results = read_json(runs[0] / "results.json")
    for column in ("base", "tuned"):
        assert set(KEYS) <= set(results[column])
        assert results[column]["perplexity"] > 100 and results[column]["n"]["perplexity"] > 1000  # a random model
    rows = [row for _, row in read_jsonl(runs[0] / "samples.jsonl")]
    asked = {column: {row["id"] for row in rows if row["column"] == column} for column in ("base", "tuned")}
    assert asked["base"] == asked["tuned"] and 12 <= len(asked["base"]) <= 16


def test_evaluate_against_the_base_rewrites_the_runs_files(runs: tuple[Path, Path]) -> None:
    before = read_json(runs[0] / "results.json")
    results = evaluate(runs[0], items="subset")
    assert results["tuned"] == before["tuned"]  # the same questions, the same model: the same figures
    assert results["metrics"] == before["metrics"]
    assert (runs[0] / "report.html").is_file()
    assert read_json(runs[0] / "results.json")["base"] == results["base"]


def test_evaluate_against_another_run_leaves_its_files_alone(runs: tuple[Path, Path]) -> None:
    mine, others = (runs[0] / "results.json").read_bytes(), (runs[1] / "results.json").read_bytes()
    results = evaluate(runs[0], tasks=("truth",), against=runs[1], items="subset")
    assert results["names"] == {"tuned": "one", "two": "two"}
    assert set(KEYS) <= set(results["two"]) and "perplexity" not in results["two"]
    assert results["comparison"]["hallucination"]["p"] == 1.0  # equal runs: same seed, same bytes
    assert (runs[0] / "report-two.html").is_file() and (runs[0] / "samples-two.jsonl").is_file()
    assert (runs[0] / "results.json").read_bytes() == mine and (runs[1] / "results.json").read_bytes() == others


def test_the_validation_part_is_asked_in_its_own_words_and_kept_in_its_own_files(runs: tuple[Path, Path]) -> None:
    before = (runs[0] / "results.json").read_bytes()
    evaluate(runs[0], tasks=("truth",), items="subset", split="validation")
    assert (runs[0] / "results.json").read_bytes() == before
    of_test = {row["question"] for _, row in read_jsonl(runs[0] / "samples.jsonl")}
    of_validation = {row["question"] for _, row in read_jsonl(runs[0] / "samples-validation.jsonl")}
    assert of_validation and not of_test & of_validation
    of_both = {path: path.read_bytes() for path in runs[0].glob("*-two.*")}
    evaluate(runs[0], tasks=("truth",), against=runs[1], items="subset", split="validation")
    assert (runs[0] / "results-two-validation.json").is_file()
    assert of_both == {path: path.read_bytes() for path in runs[0].glob("*-two.*")}


def test_a_domain_of_another_field_goes_through_training_evaluation_and_report(tiny: Path, tmp_path: Path) -> None:
    data = {
        "path": str(FIXTURES / "data" / "trees.jsonl"),
        "templates": str(FIXTURES / "data" / "trees.yaml"),
        "template": "plain",
        "max_length": 256,
    }
    run = train(settings(tiny, tmp_path / "trees", data=data))
    assert run.folder is not None
    results = evaluate(run.folder)  # all of its questions
    assert set(KEYS) <= set(results["tuned"]) and results["tuned"]["n"]["paraphrase"] >= 4
    asked = [row["question"] for _, row in read_jsonl(run.folder / "samples.jsonl")]
    knowledge = [row for _, row in read_jsonl(FIXTURES / "data" / "trees.jsonl")]
    assert all(any(row["subject"] in question for question in asked) for row in knowledge)
    page = (run.folder / "report.html").read_text(encoding="utf-8")
    assert "trees" in page and str(knowledge[0]["subject"]) in page


def test_a_knowledge_base_may_take_the_bundled_wordings(tiny: Path, tmp_path: Path) -> None:
    fact = {"subject": "wombatin", "relation": "specimen", "value": "serum", "evidence": "made up for this test"}
    (tmp_path / "kb.jsonl").write_text(json.dumps(fact) + "\n", encoding="utf-8")
    data = {"path": str(tmp_path / "kb.jsonl"), "templates": "labtests", "template": "plain", "general_share": 0.0}
    run = train(settings(tiny, tmp_path / "run", data=data, eval={"tasks": []}))
    assert run.metrics["steps"] == 2


def test_evaluate_refuses_what_it_cannot_do(runs: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run"):
        evaluate(tmp_path)
    with pytest.raises(ValueError, match=r"unknown eval task 'thruth' \(did you mean 'truth'\?\)"):
        evaluate(runs[0], tasks=("thruth",))
    with pytest.raises(ValueError, match="unknown choice of items 'some'"):
        evaluate(runs[0], items="some")
    with pytest.raises(ConfigError, match="names the same run"):
        evaluate(runs[0], tasks=("truth",), against=runs[0], items="subset")
    with pytest.raises(ConfigError, match="names no run"):
        evaluate({"model": "quickstart"})


def test_measuring_nothing_gives_nothing() -> None:
    result, rows = measure(torch.nn.Linear(1, 1), None, {})
    assert rows == [] and result == {"n": {}, "intervals": {}}
