"""The plain NF4 definition against bitsandbytes' own bytes and values, and by hand."""

import pytest
import torch

from lowrank.kernels.nf4_codec import (
    NF4,
    blocks_of,
    decision_bounds,
    decode_ref,
    nf4_dequantize_ref,
    nf4_quantize_ref,
    pack,
    unpack,
)


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
