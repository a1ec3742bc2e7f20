"""The plain NF4 definition by hand, and Triton's version against it, bit by bit."""

import math

import pytest
import torch

from lowrank.kernels.dispatch import FLOATS
from lowrank.kernels.nf4_codec import (
    BLOCK_SIZES,
    NF4,
    blocks_of,
    decision_bounds,
    decode_ref,
    dequantize_into,
    encode_ref,
    nf4_dequantize_ref,
    nf4_quantize,
    nf4_quantize_ref,
    pack,
    unpack,
)
from lowrank.quant.codebooks import codebook
from lowrank.quant.double import dequantize_scales, quantize_scales


def test_a_block_worked_by_hand() -> None:
    w = torch.zeros(64)
    w[:8] = torch.tensor([0.5, -1, 0.25, 0, 0.1, -0.7, 2, -2])
    packed, absmax = nf4_quantize_ref(w)
    assert absmax.tolist() == [2.0]
    assert packed[:5].tolist() == [0xA2, 0x97, 0x83, 0xF0, 0x77]  # the first value is the high nibble
    assert nf4_dequantize_ref(packed, absmax, 64, torch.float32)[6] == 2


def test_pack_and_unpack_are_inverse() -> None:
    for n in (0, 2, 8, 64):
        codes = torch.arange(n, dtype=torch.uint8) % 16
        assert pack(codes).numel() == n // 2
        assert torch.equal(unpack(pack(codes), n), codes)


def test_an_odd_count_ends_in_the_code_of_zero() -> None:
    packed, absmax = nf4_quantize_ref(torch.tensor([1.0, -1.0, 1.0]))
    assert packed.tolist() == [0xF0, 0xF7]
    assert nf4_dequantize_ref(packed, absmax, 3, torch.float32).tolist() == [1, -1, 1]


def test_bounds_are_midpoints_and_a_tie_goes_to_the_lower_value() -> None:
    bounds, order = decision_bounds(torch.tensor(NF4))
    assert order.tolist() == list(range(16))
    code = torch.tensor(NF4)
    assert torch.equal(bounds, ((code[:-1].double() + code[1:].double()) / 2).float())
    block = torch.zeros(64)
    block[0], block[1:16] = 1, bounds
    packed, _ = nf4_quantize_ref(block)
    assert unpack(packed, 64)[1:16].tolist() == list(range(15))


def test_blocks_cross_rows_and_the_last_may_be_partial() -> None:
    w = torch.arange(10 * 96, dtype=torch.float32).view(10, 96)
    assert blocks_of(w, 64).shape == (15, 64)
    assert torch.equal(blocks_of(w, 64)[1], torch.arange(64.0, 128.0))
    assert blocks_of(torch.ones(65), 64)[1].sum() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_product_is_fp32_and_rounded_once(dtype: torch.dtype) -> None:
    packed = torch.arange(256, dtype=torch.uint8)
    absmax = torch.linspace(0.01, 3, 8)
    got = decode_ref(packed, absmax, torch.tensor(NF4), 512, dtype, 64)
    want = torch.tensor([NF4[c] for b in range(256) for c in (b >> 4, b & 15)]).view(8, 64) * absmax[:, None]
    assert torch.equal(got, want.view(-1).to(dtype))


# Triton's versions: interpreted where there is no GPU, compiled where there is one; every bit as the definition has it.

SIZES = [(1,), (63,), (65,), (10, 96), (3, 1000), (4, 4096)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_triton_quantizes_to_the_same_bytes(size, dtype, device) -> None:
    torch.manual_seed(0)
    w = torch.randn(size).to(dtype)
    w[..., : size[-1] // 3] *= 0.1
    got = nf4_quantize(w.to(device))
    for a, b in zip(got, nf4_quantize_ref(w)):
        assert torch.equal(a.cpu(), b)


def test_triton_quantizes_corners_to_the_same_bytes(device) -> None:
    """Zeros, ties of two codes, ranges near both ends of fp32, strides; and NaN shows in absmax."""
    bounds, _ = decision_bounds(torch.tensor(NF4))
    w = torch.zeros(8, 64)
    w[1, 0], w[1, 1:16] = 1, bounds
    w[2:4] = torch.randn(2, 64) * 1e-40
    w[4:6] = torch.randn(2, 64) * 1e38
    w[6, :3], w[7, 5] = torch.tensor([-0.0, 3e-39, -1e-45]), 3.4e38
    for block_size in BLOCK_SIZES:
        for view in (w, w.T, w[:, 1::2]):
            got = nf4_quantize(view.to(device), block_size)
            for a, b in zip(got, nf4_quantize_ref(view, block_size)):
                assert torch.equal(a.cpu(), b)
    w[3, 3], w[5, 5] = float("nan"), float("inf")
    assert nf4_quantize(w.to(device))[1].isnan().tolist() == [0, 0, 0, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("size", [*SIZES, (16, 1000)])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("nested", [False, True])
def test_triton_dequantizes_to_the_same_bits(size, dtype, nested, device) -> None:
    torch.manual_seed(0)
    packed, absmax = nf4_quantize_ref(torch.randn(size))
    numel, scales = math.prod(size), (absmax,)
    if nested:
        scales = (*quantize_scales(absmax), codebook("dynamic8"))
        absmax = dequantize_scales(*scales[:3])
    buffer = torch.full((numel + 16,), 7.0, dtype=dtype, device=device)  # what lies behind stays as it is
    got = dequantize_into(buffer[:numel], packed.to(device), tuple(s.to(device) for s in scales), 64)
    assert torch.equal(got.cpu(), nf4_dequantize_ref(packed, absmax, numel, dtype))
    assert (buffer[numel:] == 7).all()


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_triton_dequantizes_each_block_size_and_any_table(block_size, device) -> None:
    torch.manual_seed(0)
    code = codebook("fp4")
    packed, absmax = encode_ref(torch.randn(5000), code, block_size)
    at = torch.zeros(2501, dtype=torch.uint8, device=device)[1:]  # an address that is no multiple of 4
    at.copy_(packed)
    w = torch.empty(5000, dtype=torch.bfloat16, device=device)
    dequantize_into(w, at, (absmax.to(device),), block_size, code.to(device))
    assert torch.equal(w.cpu(), decode_ref(packed, absmax, code, 5000, torch.bfloat16, block_size))


def test_bad_input_is_refused_by_name(device) -> None:
    packed, absmax = (t.to(device) for t in nf4_quantize_ref(torch.randn(128)))
    w = torch.empty(128, device=device)
    with pytest.raises(ValueError, match="block_size must be one of 32, 64"):
        nf4_quantize(w, 48)
    with pytest.raises(ValueError, match="w must be one of"):
        nf4_quantize(w.double())
    with pytest.raises(ValueError, match="w must be contiguous"):
        dequantize_into(torch.empty(256, device=device)[::2], packed, (absmax,), 64)
    with pytest.raises(ValueError, match=r"packed must be 64 uint8 for 128 weights at block size 64, got 32"):
        dequantize_into(w, packed[:32], (absmax,), 64)
    with pytest.raises(ValueError, match="absmax must be 2 float32"):
        dequantize_into(w, packed, (absmax.half(),), 64)
    with pytest.raises(ValueError, match="absmax is on meta"):
        dequantize_into(w, packed, (absmax.to("meta"),), 64)
    with pytest.raises(ValueError, match="levels must be 256 float32"):
        dequantize_into(w, packed, (absmax.byte(), absmax[:1], absmax[0], absmax), 64)
