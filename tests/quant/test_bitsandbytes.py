"""Codes, scales, values and checkpoint bytes equal to bitsandbytes' (fixtures: tests/fixtures/quant/make.py)."""

import json
from pathlib import Path

import pytest
import torch

from lowrank.files import read_tensors
from lowrank.kernels.nf4_codec import decode_ref, encode_ref
from lowrank.quant.codebooks import codebook, normal_codebook
from lowrank.quant.double import dequantize_scales, quantize_scales
from lowrank.quant.tensor import QuantizedTensor

FIXTURES = Path(__file__).parents[1] / "fixtures" / "quant"
CASES = {case["name"]: case for case in json.loads((FIXTURES / "bitsandbytes.json").read_text())}
T = read_tensors(FIXTURES / "bitsandbytes.safetensors")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def test_the_tables_are_derived_exactly() -> None:
    assert torch.equal(normal_codebook(4), T["code_nf4"])
    assert torch.equal(codebook("nf4"), T["code_nf4"])
    assert torch.equal(codebook("fp4"), T["code_fp4"])
    assert torch.equal(codebook("dynamic8"), T["nested_code"])


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_other_normal_codebooks_rise_from_minus_one_to_one_through_zero(bits: int) -> None:
    code = normal_codebook(bits)
    assert code.numel() == 2**bits and (code.diff() > 0).all()
    assert (code[0], code[-1], code[2 ** (bits - 1) - 1]) == (-1, 1, 0)


@pytest.mark.parametrize("name", CASES)
def test_codes_and_scales_are_bitsandbytes(name: str) -> None:
    case = CASES[name]
    q = QuantizedTensor.quantize(T[f"{name}.input"], case["quant_type"], case["blocksize"], case["nested"])
    packed = T[f"{name}.packed"].view(torch.uint8).reshape(-1)
    assert torch.equal(q.codes, packed)  # ties included
    assert torch.equal(encode_ref(T[f"{name}.input"], codebook(case["quant_type"]), case["blocksize"])[0], packed)
    if case["nested"]:
        assert torch.equal(q.scales, T[f"{name}.absmax_q"])
        assert torch.equal(q.nested_absmax, T[f"{name}.nested_absmax"])
        assert torch.equal(q.nested_offset, T[f"{name}.offset"].reshape(()))
    else:
        assert torch.equal(q.scales, T[f"{name}.absmax"])


@pytest.mark.parametrize("name", CASES)
def test_values_are_bitsandbytes(name: str) -> None:
    case = CASES[name]
    w = T[f"{name}.input"]
    q = QuantizedTensor.quantize(w, case["quant_type"], case["blocksize"], case["nested"])
    assert torch.equal(q.dequantize(), T[f"{name}.dequant"])
    if f"{name}.dequant_fp32" in T:
        assert torch.equal(q.dequantize(torch.float32), T[f"{name}.dequant_fp32"])
    for dtype in DTYPES:  # the reference is the definition of every dtype
        ref = decode_ref(q.codes, q.block_scales(), codebook(q.format), w.numel(), dtype, q.block_size)
        assert torch.equal(q.dequantize(dtype).reshape(-1), ref)


@pytest.mark.parametrize("folder", ["nf4_double", "nf4_single", "fp4"])
def test_checkpoint_bytes_round_trip(folder: str) -> None:
    state = read_tensors(FIXTURES / f"checkpoint_{folder}.safetensors")
    expected = state.pop("expected")
    (prefix,) = (key for key in state if key.endswith(".weight"))
    q = QuantizedTensor.from_state_dict(state, prefix)
    assert torch.equal(q.dequantize(), expected)
    written = q.state_dict(prefix)
    assert written.keys() == state.keys()
    for key, tensor in state.items():
        assert written[key].dtype == tensor.dtype and torch.equal(written[key], tensor), key


def test_another_storage_dtype_holds_the_same_bytes() -> None:
    q = QuantizedTensor.quantize(torch.randn(16, 64), "nf4")
    state = q.state_dict("w")
    packed = state["w"].view(-1)
    for dtype in DTYPES:
        state["w"] = packed.view(dtype).view(-1, 1)
        assert torch.equal(QuantizedTensor.from_state_dict(state, "w").dequantize(), q.dequantize())


@pytest.mark.parametrize("values", [[0.3], [0.25] * 700, [0.0] * 5])
def test_equal_scales_are_decoded_finite_and_right(values: list[float]) -> None:
    absmax = torch.tensor(values)
    codes, nested, offset = quantize_scales(absmax)
    assert torch.allclose(dequantize_scales(codes, nested, offset), absmax, rtol=1e-6, atol=0)


def test_scales_whose_mean_overflows_are_refused() -> None:
    w = torch.full((4, 64), 3e38)
    assert torch.equal(QuantizedTensor.quantize(w, "nf4").dequantize(), w)
    with pytest.raises(ValueError, match=r"layer\.w: the mean of its block maxima overflows"):
        QuantizedTensor.quantize(w, "nf4", double_quant=True, name="layer.w")


def test_a_scale_that_would_decode_to_infinity_is_refused() -> None:
    """(A - m) + m may round to beyond A, here the largest fp32 number."""
    refused = 0
    for blocks in range(2, 40):
        absmax = torch.zeros(blocks)
        absmax[0] = torch.finfo(torch.float32).max
        try:
            parts = quantize_scales(absmax, "layer.w")
        except ValueError as error:
            assert "layer.w: the decoded scale of its largest block overflows fp32" in str(error)
            refused += 1
        else:
            assert torch.isfinite(dequantize_scales(*parts)).all()
    assert 0 < refused < 38
