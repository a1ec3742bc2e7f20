"""Where the theorems of test_properties.py stop, and inputs that reach the bounds."""

import pytest
import torch

from lowrank.kernels.nf4_codec import decision_bounds
from lowrank.quant import bounds
from lowrank.quant.codebooks import codebook
from lowrank.quant.tensor import QuantizedTensor


def test_nf4_is_not_symmetric() -> None:
    w = torch.tensor([1.0, 0.3, -0.3])
    plus, minus = (QuantizedTensor.quantize(v, "nf4").dequantize() for v in (w, -w))
    assert plus[1] != -plus[2] and not torch.equal(plus, -minus)


def test_fp4_is_not_symmetric_on_a_tie() -> None:
    tie = float(decision_bounds(codebook("fp4"))[0][-1])
    w = torch.tensor([1, tie])
    plus, minus = (QuantizedTensor.quantize(v, "fp4").dequantize() for v in (w, -w))
    assert not torch.equal(plus, -minus)


def negative_scale() -> tuple[torch.Tensor, QuantizedTensor]:
    """Large and small block maxima, so that the small ones fall to the lowest of the 256 values, which is not -1."""
    absmax = torch.tensor([14.5] * 73 + [0.001] * 74)
    w = torch.zeros(147, 64)
    w[:, 0], w[:, 1] = absmax, -absmax / 2
    return w, QuantizedTensor.quantize(w, "nf4", double_quant=True)


def test_a_decoded_absmax_can_turn_negative_and_the_bound_still_holds() -> None:
    w, q = negative_scale()
    assert q.block_scales()[-1] == pytest.approx(
        -0.0463, abs=1e-4
    )  # for a true 0.001; clamping it would break the files
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        error = (w.double() - q.dequantize(dtype).double()).abs()
        assert (error <= bounds.elementwise(q, dtype)).all()
    assert error[-1].max() > 47 * 0.001


def test_with_double_quantization_a_block_is_not_monotone() -> None:
    w, q = negative_scale()
    last = q.dequantize()[-1]
    assert w[-1, 0] > w[-1, 1] and last[0] < last[1]


def test_quantizing_again_moves_values_with_double_quantization() -> None:
    once = QuantizedTensor.quantize(torch.linspace(-1, 2, 4096), "nf4", double_quant=True).dequantize()
    assert not torch.equal(QuantizedTensor.quantize(once, "nf4", double_quant=True).dequantize(), once)


@pytest.mark.parametrize("format", ["nf4", "fp4", "int4", "int8"])
def test_quantizing_again_moves_about_a_quarter_of_the_values_in_bf16(format: str) -> None:
    w = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
    once = QuantizedTensor.quantize(w, format).dequantize(torch.bfloat16)
    moved = (QuantizedTensor.quantize(once, format).dequantize() != once).float().mean()
    assert 0.15 < moved < 0.35


def test_int8_codes_are_not_idempotent_in_bf16() -> None:
    """2^-9 of 127 is half a step."""
    q = QuantizedTensor.quantize(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)), "int8")
    assert not torch.equal(QuantizedTensor.quantize(q.dequantize(torch.bfloat16), "int8").codes, q.codes)


def test_quantizing_again_moves_affine_values_and_with_fp16_scales_affine_codes() -> None:
    w = torch.randn(500, 32, generator=torch.Generator().manual_seed(0))
    once = QuantizedTensor.quantize(w, "int4-affine", 32)
    again = QuantizedTensor.quantize(once.dequantize(), "int4-affine", 32)
    assert torch.equal(again.codes, once.codes) and not torch.equal(again.dequantize(), once.dequantize())
    half = {"format": "int4-affine", "block_size": 32, "scale_dtype": torch.float16}
    once = QuantizedTensor.quantize(1000 + w, **half)
    assert not torch.equal(QuantizedTensor.quantize(once.dequantize(), **half).codes, once.codes)


# Inputs that reach the bounds.

LAYOUTS = [
    ("nf4", False),
    ("nf4", True),
    ("fp4", False),
    ("fp4", True),
    ("int8", False),
    ("int4", False),
    ("int4-affine", False),
]


@pytest.mark.parametrize(("format", "double"), LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_some_input_reaches_99_percent_of_the_worst_case(format: str, double: bool, dtype: torch.dtype) -> None:
    """Each block has its largest value on both sides and 4,094 others all over the range.

    The block maxima sweep too, and so reach the edges of their own 8-bit cells under double quantization.
    """
    sweep = torch.rand(128, 4096, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    sweep[:, 0], sweep[:, 1] = -1, 1
    w = (sweep * torch.linspace(1, 2, 128, dtype=torch.float64)[:, None]).float()
    q = QuantizedTensor.quantize(w, format, 4096, double)
    error = (w.double() - q.dequantize(dtype).double()).abs()
    bound, worst = bounds.elementwise(q, dtype), bounds.block_worst_case(q, dtype)
    assert (error <= bound).all()
    assert (error / bound).max() >= 0.99
    assert (error.amax(dim=1) / worst).max() >= 0.99


def test_the_bound_is_half_the_widest_gap_times_the_absmax() -> None:
    w = torch.randn(100, 64)
    q = QuantizedTensor.quantize(w, "nf4")
    assert bounds.block_worst_case(q).div(q.scales).max() == pytest.approx(0.1520, abs=1e-4)  # between -1 and -0.6962
    assert torch.isinf(bounds.elementwise(QuantizedTensor.quantize(w * 1e5, "nf4"), torch.float16)).any()


def test_the_product_bound_is_reached_by_the_signs_of_the_errors() -> None:
    w = torch.randn(8, 64)
    q = QuantizedTensor.quantize(w, "int4", 64)
    error = w.double() - q.dequantize().double()
    x = error.sign()
    assert torch.allclose((x @ error.T).diagonal(), error.abs().sum(1))
    assert ((x @ error.T).abs() <= bounds.matmul(q, x)).all()
    with pytest.raises(ValueError, match=r"x must end in \(64,\)"):
        bounds.matmul(q, torch.ones(3, 8))


# Expected errors of normal weights.


@pytest.mark.parametrize("format", ["nf4", "fp4", "int4", "int8", "int4-affine"])
@pytest.mark.parametrize("block_size", [32, 64, 1024])
def test_expected_mse_agrees_with_simulation(format: str, block_size: int) -> None:
    w = torch.randn(2**20 // block_size, block_size, generator=torch.Generator().manual_seed(0))
    error = (QuantizedTensor.quantize(w, format, block_size).dequantize() - w).double().square().mean(dim=1)
    standard_error = error.std() / len(error) ** 0.5
    assert abs(error.mean() - bounds.expected_mse(format, block_size)) < 3.5 * standard_error


def test_the_textbook_comparison() -> None:
    """16 values, N(0, 1), block 64: NF4 is 27 % below symmetric int4, 32 % below +-3 sigma cells, above affine int4."""
    nf4, int4, affine = (bounds.expected_mse(f) for f in ("nf4", "int4", "int4-affine"))
    middles = bounds.codebook_mse((torch.arange(16) + 0.5) * 6 / 16 - 3)
    ends = bounds.codebook_mse(torch.linspace(-3, 3, 16))
    assert [round(v, 4) for v in (nf4, int4, affine, middles, ends)] == [0.0085, 0.0116, 0.008, 0.0125, 0.0137]
    assert bounds.expected_mse(codebook("nf4")) == nf4
    assert 1 - nf4 / int4 == pytest.approx(0.27, abs=0.005) and 1 - nf4 / middles == pytest.approx(0.32, abs=0.005)


def test_the_error_is_bitsandbytes_published_one() -> None:
    """Block 64, N(0, 1): mean |error| 0.0728 and mean relative error 0.2033 in bitsandbytes' own table."""
    w = torch.randn(2**20, generator=torch.Generator().manual_seed(0))
    error = (QuantizedTensor.quantize(w, "nf4").dequantize() - w).abs()
    assert error.mean() == pytest.approx(0.0728, abs=3e-4)
    assert (error / w.abs()).mean() == pytest.approx(0.2033, abs=2e-3)
