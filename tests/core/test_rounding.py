"""The merge into NF4 that rounds for the output: what it keeps, against plain rounding, on text not used for it."""

import pytest
import torch
from torch import nn

import lowrank
from lowrank.cli import main
from lowrank.methods.lora import LoRAConfig
from lowrank.models.load import load
from lowrank.quant.linear import quantize_model
from lowrank.quant.tensor import QuantizedTensor
from lowrank.rounding import compensated, on_scales_of, output_survival
from lowrank.training.reopen import reopen


def adapted(std: float, quantize: bool = True) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """Inputs of 24 dimensions in 128, as activations are: correlated."""
    torch.manual_seed(0)
    mix = torch.randn(128, 24)
    x = torch.randn(64, 8, 24) @ mix.T + 0.1 * torch.randn(64, 8, 128)
    model = nn.Sequential(nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 64))
    if quantize:
        quantize_model(model, "nf4-dq")
    lowrank.attach(model, LoRAConfig(rank=8), ["0", "2"])
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=std)
    return model.eval(), x[:32], x[32:]


@pytest.mark.parametrize("std", [0.03, 0.05, 0.1])
@pytest.mark.parametrize("quantize", [True, False])
def test_it_keeps_measurably_more_than_plain_rounding(std: float, quantize: bool) -> None:
    model, calibration, text = adapted(std, quantize)
    logits = model(text)
    plain = lowrank.merge(model, to="nf4", force=True, text=text)
    lowrank.unmerge(model)
    better = lowrank.merge(model, to="nf4", force=True, text=text, calibration=calibration)
    assert better.logit_change < 0.75 * plain.logit_change
    assert all(better.survival[path] > better.nearest[path] for path in better.survival)
    assert "plain rounding would keep" in str(better)
    lowrank.unmerge(model)
    assert torch.equal(model(text), logits)


def test_it_is_never_worse_than_plain_rounding_where_it_was_calibrated() -> None:
    for std in (0.001, 0.01, 0.5):
        model, calibration, _ = adapted(std)
        report = lowrank.merge(model, to="nf4", force=True, calibration=calibration)
        assert all(report.survival[path] >= report.nearest[path] for path in report.survival)


def test_an_nf4_weight_that_does_not_change_keeps_every_code() -> None:
    """New scales would move the whole grid for one changed value; the base's own do not."""
    torch.manual_seed(0)
    q = QuantizedTensor.quantize(torch.randn(40, 96), "nf4", 64, double_quant=True)
    assert torch.equal(on_scales_of(q, q.dequantize(torch.float32)).codes, q.codes)
    model, _, _ = adapted(1e-4)
    report = lowrank.merge(model, to="nf4", force=True)
    assert report.lowest[1] >= 0


def test_with_independent_inputs_there_is_nothing_to_compensate_with() -> None:
    """H = I makes U = I, so each column is rounded alone: the nearest codes."""
    torch.manual_seed(0)
    w = torch.randn(24, 128)
    q = QuantizedTensor.quantize(w, "nf4")
    assert torch.equal(compensated(w, q, 1e6 * torch.eye(128)).dequantize(), q.dequantize())
    assert output_survival(w, w, 0 * w, torch.eye(128)) == 1.0


def test_a_row_that_its_blocks_cross_is_rounded_plainly() -> None:
    w = torch.randn(10, 96)
    q = QuantizedTensor.quantize(w, "nf4", 64)
    assert compensated(w, q, torch.eye(96)) is q


def test_the_report_has_both_formats_and_the_change_of_the_logits() -> None:
    model, _, text = adapted(0.1, quantize=False)
    report = lowrank.merge(model.bfloat16(), text=text.bfloat16())
    assert report.dense == report.survival
    assert all(0 < report.nf4[path] < report.dense[path] < 1 for path in report.dense)
    assert 0 < report.logit_change < 0.1
    assert "logits are off by" in str(report)


def test_a_refusal_names_the_way_out() -> None:
    model, calibration, text = adapted(0.01)
    before = model(text)
    with pytest.raises(ValueError, match=r"keep \d+\.\d% of the update .*calibration=ids"):
        lowrank.merge(model, to="nf4")
    with pytest.raises(ValueError, match=r"keep \d+\.\d% of the update .*beside the base, or pass force=True"):
        lowrank.merge(model, to="nf4", calibration=calibration)
    assert torch.equal(model(text), before)


@torch.no_grad()
def test_the_command_writes_the_model_that_it_rounded_for_a_text(talking_run, tmp_path, capsys) -> None:
    """Read back, it gives the logits of the merge in memory, and on its text better ones than plain rounding."""
    run, text = talking_run("nf4-dq"), tmp_path / "text.txt"
    text.write_text("12 on the hen, 7 in the barn; then one more at noon. " * 24, encoding="utf-8")
    command = ["merge", str(run), "--to", "nf4", "--force"]
    assert main([*command, "--out", str(tmp_path / "plain")]) == 0
    assert main([*command, "--calibrate", str(text), "--out", str(tmp_path / "rounded")]) == 0
    assert "plain rounding would keep" in capsys.readouterr().out
    adapted, tokenizer = reopen(run)
    ids = torch.tensor(tokenizer.encode(text.read_text(encoding="utf-8")))
    windows = [part[None] for part in ids.split(256) if len(part) == 256]
    assert len(windows) > 2
    wanted = [adapted(part) for part in windows]
    lowrank.merge(adapted, to="nf4", force=True, calibration=windows)
    read = {
        name: load(tmp_path / name, dtype=torch.float32, device="cpu", progress=False)[0]
        for name in ("plain", "rounded")
    }
    torch.testing.assert_close(read["rounded"](windows[0]), adapted(windows[0]), atol=1e-4, rtol=0)
    off = {name: sum((model(x) - y).square().sum() for x, y in zip(windows, wanted)) for name, model in read.items()}
    assert off["rounded"] < 0.5 * off["plain"]
