"""The report: figures against direct computation, the 4-bit source, text, plot."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lowrank.errors import ConfigError
from lowrank.evaluation import quantization
from lowrank.models.load import load
from lowrank.quant import bounds
from lowrank.quant.report import is_four_bit, measure, textbook
from lowrank.quant.tensor import QuantizedTensor

FIXTURES = Path(__file__).parents[1] / "fixtures" / "models"


@pytest.fixture(scope="module")
def weights() -> list[tuple[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    outlier = torch.randn(64, 128, generator=draw) * 0.02
    outlier[3, 7] = 1
    return [("a.weight", torch.randn(96, 64, generator=draw).bfloat16()), ("b.weight", outlier)]


TOKENIZER = SimpleNamespace(encode=lambda text, add_special: [1, 2])


def test_rows_are_what_direct_computation_gives(weights: list[tuple[str, torch.Tensor]]) -> None:
    report = measure(weights, ["nf4-dq", "int8"])
    assert [(r.name, r.format) for r in report.rows] == [(n, f) for n, _ in weights for f in ("nf4-dq", "int8")]
    row, w = report.rows[2], weights[1][1]
    q = QuantizedTensor.quantize(w, "nf4", double_quant=True)
    error = (q.dequantize() - w).abs()
    assert row.max_error == error.max().item() and row.mean_error == pytest.approx(error.mean().item())
    assert row.rms_error == pytest.approx(error.square().mean().sqrt().item())
    assert row.max_bound == bounds.elementwise(q).max().item() and row.bits == q.bits_per_weight
    assert row.expected_rms == pytest.approx(row.rms_weight * math.sqrt(bounds.expected_mse("nf4")))
    assert (row.outlier_blocks, row.blocks) == (1, 128)
    assert all(r.above_bound == 0 for r in report.rows)
    assert report.rows[0].rms_error == pytest.approx(report.rows[0].expected_rms, rel=0.05)


def test_the_total_is_over_all_elements(weights: list[tuple[str, torch.Tensor]]) -> None:
    report = measure(weights, ["int4"])
    total = report.total("int4")
    every = torch.cat(
        [(QuantizedTensor.quantize(w, "int4").dequantize(torch.float32) - w.float()).view(-1) for _, w in weights]
    )
    assert total.numel == every.numel() and total.max_error == every.abs().max().item()
    assert total.rms_error == pytest.approx(every.square().mean().sqrt().item())


def test_a_source_that_is_already_4_bit_is_named() -> None:
    w = torch.randn(64, 64)
    q = QuantizedTensor.quantize(w, "int4-affine", 32, scale_dtype=torch.float16)
    assert is_four_bit(q.dequantize()) and not is_four_bit(w) and not is_four_bit(w.bfloat16())
    assert not is_four_bit(torch.zeros(64)) and not is_four_bit(torch.ones(3))
    report = measure([("x", q.dequantize()), ("y", w)], ["nf4"])
    assert report.four_bit_source == ["x"]
    assert report.text().startswith("source is already 4-bit: 1 of 2 weights")
    assert measure([("y", w)], ["nf4"]).text().startswith("source: full precision")


def test_perplexity_is_asked_once_for_each_format(weights: list[tuple[str, torch.Tensor]]) -> None:
    asked: list[str | None] = []

    def perplexity(format: str | None) -> float:
        asked.append(format)
        return 20.0 + len(asked)

    report = measure(weights, ["nf4", "fp4"], perplexity=perplexity)
    assert asked == [None, "nf4", "fp4"] and report.perplexity == {"as loaded": 21, "nf4": 22, "fp4": 23}
    assert "+4.8 %" in report.text()


def test_text_and_plot(weights: list[tuple[str, torch.Tensor]], tmp_path) -> None:
    seen: list[str] = []
    report = measure(weights, ["nf4", "int4-affine"], on_progress=seen.append)
    assert seen == ["a.weight", "b.weight"]
    text = report.text()
    assert text.count("b.weight") == 1 and "int4-affine" in text and "b.weight" not in report.text(layers=False)
    if report.plot(tmp_path / "plots" / "errors.png"):
        assert (tmp_path / "plots" / "errors.png").stat().st_size > 1000


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="unknown quantization format 'nf3'"):
        measure([("a", torch.randn(64))], ["nf3"])
    with pytest.raises(ValueError, match="no weight to report on"):
        measure([], ["nf4"])
    with pytest.raises(ValueError, match="at least one format"):
        measure([("a", torch.randn(64))], [])


def test_the_textbook_lines_hold_the_figures() -> None:
    text = "\n".join(textbook())
    assert "27 %" in text and "32 %" in text and "-5 %" in text


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_model_is_measured_as_it_would_be_loaded(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each format's perplexity is that of the model that `load` quantizes to it; here a stand-in for perplexity."""
    folder, text = str(FIXTURES / name), tmp_path / "text.txt"
    text.write_text("any")

    def norm_of(model: torch.nn.Module, *_: object) -> SimpleNamespace:
        with torch.no_grad():
            return SimpleNamespace(value=model(torch.arange(3, 9)[None]).double().norm().item())

    with pytest.raises(ConfigError, match="has no tokenizer"):
        quantization.report_of(folder, ["nf4"], 64, text)
    monkeypatch.setattr(quantization, "load", lambda *a, **k: (load(*a, **k)[0], TOKENIZER))
    monkeypatch.setattr(quantization, "perplexity", norm_of)
    report = quantization.report_of(folder, ["nf4-dq", "int8"], 64, text)
    for key, format in (("as loaded", None), ("nf4-dq", "nf4-dq"), ("int8", "int8")):
        model, _ = load(folder, quantize=format, dtype=torch.bfloat16, progress=False)
        assert report.perplexity[key] == pytest.approx(norm_of(model).value, rel=2e-3)  # GPT-2 rounds before its bias
    assert len(set(report.perplexity.values())) == 3
