"""`lowrank export` and `lowrank merge`: what they write answers as the run does; nothing is written over or half."""

import json
from pathlib import Path

import pytest
import torch

import lowrank
from lowrank.chat import open_model
from lowrank.cli import main
from lowrank.models.load import load
from lowrank.quant.linear import QuantizedLinear

IDS = torch.tensor([[1, 40, 50, 60, 70]])


def logits(folder: str | Path) -> torch.Tensor:
    is_run = (Path(folder) / "config.yaml").is_file()
    model, _ = open_model(str(folder)) if is_run else load(folder, dtype=torch.float32, device="cpu", progress=False)
    with torch.no_grad():
        return model(IDS)


@pytest.mark.parametrize("quantize", [None, "nf4-dq"])
def test_export_as_a_folder_and_as_gguf(talking_run, capsys, quantize) -> None:
    run = talking_run(quantize, repetition_penalty=1.2)
    wanted = logits(run)
    assert main(["export", str(run), "--format", "hf"]) == 0
    model, tokenizer = load(run / "export-hf", dtype=torch.float32, device="cpu", progress=False)
    torch.testing.assert_close(model(IDS), wanted, atol=1e-4, rtol=0)
    assert json.loads((run / "export-hf" / "generation_config.json").read_text())["repetition_penalty"] == 1.2
    assert "merged to dense" in capsys.readouterr().out and tokenizer.chat_template
    assert main(["export", str(run), "--format", "gguf"]) == 0
    model, from_gguf = load(run / "export-gguf-F16.gguf", dtype=torch.float32, device="cpu", progress=False)
    torch.testing.assert_close(model(IDS), wanted, atol=0.05, rtol=0)
    assert from_gguf.encode("the 12 men") == tokenizer.encode("the 12 men")
    for format in ("hf", "gguf"):
        assert main(["export", str(run), "--format", format]) == 2
        assert "exists already" in capsys.readouterr().err
    assert not list(run.rglob("*.tmp"))


def test_export_as_peft(talking_run, talking_folder) -> None:
    run = talking_run()
    assert main(["export", str(run), "--to", str(run / "p")]) == 0
    model, _ = load(talking_folder, dtype=torch.float32, device="cpu", progress=False)
    lowrank.load_adapter(model, run / "p")
    torch.testing.assert_close(model(IDS), logits(run))


def test_merge_writes_the_model(talking_run, talking_folder, capsys) -> None:
    (talking_folder / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.6, "top_p": 0.9}')
    try:
        run = talking_run("nf4-dq")
        wanted = logits(run)
        assert main(["merge", str(run)]) == 0
    finally:
        (talking_folder / "generation_config.json").unlink()
    said = capsys.readouterr()
    assert "q_proj" in said.out and "merged to dense" in said.out
    assert "temperature is 0.6 here, and was 0.0" in said.err and "top p is 0.9 here" in said.err
    torch.testing.assert_close(logits(run / "merged-dense"), wanted, atol=1e-4, rtol=0)
    assert json.loads((run / "merged-dense" / "generation_config.json").read_text())["do_sample"] is False
    assert main(["merge", str(run), "--to", "nf4", "--force"]) == 0
    merged, _ = load(run / "merged-nf4", dtype=torch.float32, device="cpu", progress=False)
    assert sum(isinstance(m, QuantizedLinear) for m in merged.modules()) == 21
    assert main(["merge", str(run)]) == 2


def test_a_plain_model_is_converted(talking_folder, tmp_path, capsys) -> None:
    out = tmp_path / "m.gguf"
    assert main(["export", str(talking_folder), "--format", "gguf", "--type", "Q8_0", "--to", str(out)]) == 0
    assert load(out, progress=False)[1].eos_id == 2
    assert main(["export", str(talking_folder)]) == 2
    assert "holds no run" in capsys.readouterr().err
