"""A whole run on a tiny model: files, resume after a kill, bad data. Its tokenizer is sentencepiece's test model."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import lowrank
from lowrank.errors import ConfigError, FileFormatError
from lowrank.files import read_tensors, write_tensors
from lowrank.training.reopen import reopen, run_config
from lowrank.training.run import train

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    """The tiny Llama with a vocabulary of 1,000 pieces and sentencepiece's test model as its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    source = FIXTURES / "models" / "llama"
    config = json.loads((source / "config.json").read_text())
    tensors = read_tensors(source / "model.safetensors")
    torch.manual_seed(0)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = 0.05 * torch.randn(1000, config["hidden_size"])
    write_tensors(folder / "model.safetensors", tensors)
    config |= {"vocab_size": 1000, "bos_token_id": 1, "eos_token_id": 2}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.model").write_bytes(next((FIXTURES / "tokenizer").rglob("test_model.model")).read_bytes())
    return folder


def records(path: Path, count: int = 24) -> Path:
    rows = [{"id": f"r{i}", "instruction": f"what is number {i}", "output": f"it is {i * 7}"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(model_folder: Path, folder: Path, **more: object) -> list[str]:
    values = {
        "model": model_folder, "quantize": "nf4-dq", "dtype": "float32", "output_dir": folder / "run",
        "data.path": folder / "data.jsonl", "data.template": "plain", "data.general_share": 0, "eval.tasks": "[]",
        "train.steps": 12, "train.batch_size": 4, "train.save_every": 3, "train.lr": 0.01, "adapter.rank": 4,
        "adapter.dropout": 0.1,
    }  # fmt: skip
    return [f"{key}={value}" for key, value in (values | more).items()]


def test_a_run_leaves_its_files_and_its_adapter_loads(model_folder, tmp_path, capsys) -> None:
    records(tmp_path / "data.jsonl")
    run = train({}, settings(model_folder, tmp_path))
    assert run.folder == tmp_path / "run"
    files = ("config.yaml", "versions.json", "metrics.jsonl", "timing.jsonl", "results.json", "adapter/adapter.json")
    for name in files:
        assert (run.folder / name).is_file(), name
    assert run.log[-1]["loss"] < run.log[0]["loss"]
    said = capsys.readouterr().out
    assert "q_proj" in said and "what is number" in said and "step 12/12" in said
    other, _ = lowrank.load(model_folder, quantize="nf4-dq", dtype=torch.float32, template="chatml")
    with pytest.raises(ValueError, match="trained with another chat template"):
        lowrank.load_adapter(other, run.folder / "adapter")
    model, _ = lowrank.load(model_folder, quantize="nf4-dq", dtype=torch.float32, template="plain")
    assert lowrank.load_adapter(model, run.folder / "adapter") == "run"
    with pytest.raises(ConfigError, match="holds a run"):
        train({}, settings(model_folder, tmp_path))
    with pytest.raises(ConfigError, match=r"begun with other settings \(lr: 0.5 is new\)"):
        train(run.folder / "config.yaml", ["train.lr=0.5"], resume=True)


def test_a_killed_run_resumes_to_the_same_bytes(model_folder, tmp_path) -> None:
    records(tmp_path / "data.jsonl")
    straight = settings(model_folder, tmp_path, output_dir=tmp_path / "straight")
    broken = settings(model_folder, tmp_path, output_dir=tmp_path / "broken")
    command = [sys.executable, "-m", "lowrank.cli", "train", "smoke"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    more = ["data.subjects=null", "eval.questions=0"]

    def run(arguments: list[str], *flags: str) -> subprocess.Popen:
        return subprocess.Popen(
            [*command, *arguments, *more, *flags], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    first = run(straight)
    said, _ = first.communicate(timeout=120)
    assert first.returncode == 0, said
    second = run([*broken, "train.steps=12"])
    deadline = time.monotonic() + 120
    while not list((tmp_path / "broken").glob("checkpoints/step-*/state.json")):
        assert second.poll() is None and time.monotonic() < deadline, second.communicate()[0]
        time.sleep(0.01)
    second.send_signal(signal.SIGKILL)
    second.communicate()
    if (tmp_path / "broken" / "adapter" / "adapter.safetensors").is_file():
        pytest.skip("the run was over before it could be killed")
    third = run(broken, "--resume")
    said, _ = third.communicate(timeout=120)
    assert third.returncode == 0, said
    for name in ("adapter/adapter.safetensors", "adapter/adapter.json", "metrics.jsonl"):
        assert (tmp_path / "straight" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes(), name


@pytest.mark.parametrize(("products", "dtype"), [("fast", "bfloat16"), ("slow", "bfloat16"), ("none", "float32")])
def test_auto_computes_in_what_the_processor_multiplies(model_folder, tmp_path, monkeypatch, products, dtype) -> None:
    """And the run keeps that choice, wherever it is opened."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("lowrank.models.load.bf16_products", lambda: products)
    records(tmp_path / "data.jsonl")
    run = train({}, settings(model_folder, tmp_path, dtype="auto", **{"train.steps": 2}))
    assert run_config(run.folder).dtype == dtype
    monkeypatch.setattr("lowrank.models.load.bf16_products", lambda: "fast" if products == "none" else "none")
    model, _ = reopen(run.folder)
    assert model.get_parameter("model.norm.weight").dtype == getattr(torch, dtype)
    again = train({}, settings(model_folder, tmp_path, dtype="auto", **{"train.steps": 2}), resume=True)
    assert again.folder == run.folder and run_config(run.folder).dtype == dtype


def test_a_dry_run_writes_nothing(model_folder, tmp_path) -> None:
    records(tmp_path / "data.jsonl")
    run = train({}, settings(model_folder, tmp_path), dry_run=True)
    assert run.metrics["steps"] == 12 and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "text, error, message",
    [
        ('{"instruction": "a", "output": "b"}\n{oops\n', FileFormatError, "data.jsonl, line 2: not valid JSON"),
        ("", FileFormatError, "holds no records"),
        ('{"instruction": "a", "outptu": "b"}\n', FileFormatError, r"line 1: unknown field 'outptu' \(did you mean"),
        ('{"instruction": "a"}\n', ValueError, "has no answer to learn from"),
        ('{"instruction": "' + "long " * 600 + '", "output": "b"}\n', ValueError, "all labels are masked"),
    ],
)
def test_bad_data_stops_the_run_before_it_trains(model_folder, tmp_path, text, error, message) -> None:
    (tmp_path / "data.jsonl").write_text(text)
    with pytest.raises(error, match=message):
        train({}, settings(model_folder, tmp_path))
    assert not (tmp_path / "run").exists()  # the next try needs no other folder


def test_other_bad_input(model_folder, tmp_path) -> None:
    records(tmp_path / "data.jsonl")
    with pytest.raises(ConfigError, match=r"is no file and no bundled domain \(did you mean 'labtests'"):
        train({}, settings(model_folder, tmp_path, **{"data.path": "labtest"}))
    with pytest.raises(ValueError, match=r"no module matches target 'v_porj' \(did you mean 'v_proj'"):
        train({}, settings(model_folder, tmp_path, **{"adapter.targets": "[q_proj,v_porj]"}))
    with pytest.raises(ConfigError, match="brings its own held-out questions"):
        train({}, settings(model_folder, tmp_path, **{"data.path": "labtests", "data.validation": "x.jsonl"}))
    with pytest.raises(ValueError, match="keep_best and patience look at the validation loss"):
        train({}, settings(model_folder, tmp_path, **{"train.keep_best": True, "train.eval_every": 2}))
