"""nf4_linear on plain tensors: each way a GPU takes against an fp64 product, gradients, ragged edges, bad input.

Triton's versions run interpreted where there is no GPU; the byte permutes of compiled code are run by a small emulator.
"""

import re

import pytest
import torch
import torch.nn.functional as F

from lowrank.kernels import nf4_linear as kernel
from lowrank.kernels.dispatch import INSTALLED
from lowrank.kernels.nf4_codec import NF4, decode_ref
from lowrank.kernels.nf4_linear import absmax_of, gemv, nf4_linear, nf4_linear_ref, tile
from lowrank.quant import nf4
from lowrank.quant.codebooks import codebook
from lowrank.quant.double import quantize_scales


def weight(shape, nested: bool, block_size: int = 64):
    """packed, scales and the exact weight in fp64."""
    torch.manual_seed(0)
    packed, absmax = nf4.quantize(torch.randn(shape), block_size)
    scales = (*quantize_scales(absmax), codebook("dynamic8")) if nested else (absmax,)
    numel = shape[0] * shape[1]
    exact = decode_ref(packed, absmax_of(scales).double(), torch.tensor(NF4).double(), numel, torch.float64, block_size)
    return packed, scales, exact.view(shape)


def check(y, x, exact, bias, rounded_weights: bool) -> None:
    """Within the proven bound: weights (or codes) rounded to x's dtype, sums in fp32, the result rounded once."""
    unit = torch.finfo(x.dtype).eps / 2
    x, y = x.double().cpu(), y.double().cpu()
    want = x @ exact.T + (0 if bias is None else bias.double().cpu())
    size = x.abs() @ exact.abs().T + (0 if bias is None else bias.double().cpu().abs())
    bound = (rounded_weights * unit + (exact.shape[1] + 8) * 2.0**-24) * size * 1.01 + unit * want.abs()
    assert ((y - want).abs() <= bound).all()


def on(device, packed, scales):
    return packed.to(device), tuple(s.to(device) for s in scales)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("rows,shape,block_size", [(1, (18, 192), 64), (3, (5, 1088), 128), (2, (4, 96), 32)])
def test_gemv_is_the_exact_product(dtype, nested, rows, shape, block_size, device) -> None:
    packed, scales, exact = weight(shape, nested, block_size)
    x = torch.randn(rows, shape[1]).to(dtype).to(device)
    bias = torch.randn(shape[0]).to(dtype).to(device) if nested else None
    check(gemv(x, *on(device, packed, scales), shape[0], block_size, bias), x, exact, bias, False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    "rows,shape,block_size,splits",
    [
        (1, (150, 320), 64, 1),
        (16, (128, 64), 64, 1),
        (5, (40, 1088), 128, 2),
        (33, (70, 192), 64, 1),
        (17, (9, 576), 64, 2),
    ],
)
def test_tile_is_the_product_up_to_the_rounding_of_codes(
    dtype, nested, rows, shape, block_size, splits, device
) -> None:
    packed, scales, exact = weight(shape, nested, block_size)
    x = torch.randn(rows, shape[1]).to(dtype).to(device)
    bias = torch.randn(shape[0]).to(dtype).to(device) if nested else None
    check(tile(x, *on(device, packed, scales), shape[0], block_size, bias, splits), x, exact, bias, True)


def emulate(ptx: str, word: int) -> list[int]:
    """The four results of the byte-permute code for one word of eight codes."""
    registers = {"$4": word, "%laneid": 31}

    def prmt(a: int, b: int, selector: int) -> int:
        data, result = (a | b << 32).to_bytes(8, "little"), 0
        for i in range(4):
            pick = selector >> 4 * i & 15
            byte = data[pick & 7]
            result |= ((0xFF if byte & 128 else 0) if pick & 8 else byte) << 8 * i
        return result

    def lop3(a: int, b: int, c: int, table: int) -> int:
        return sum((table >> ((a >> i & 1) * 4 + (b >> i & 1) * 2 + (c >> i & 1)) & 1) << i for i in range(32))

    calls = {"and": int.__and__, "or": int.__or__, "shl": int.__lshift__, "shr": int.__rshift__, "mov": int}
    calls |= {"mul.hi": lambda a, b: a * b >> 32, "prmt": prmt, "lop3": lop3}
    for operation, operands in re.findall(r"(\S+)\.[bu]32 ([^;{}]+);", ptx):
        if operation != ".reg":
            out, *inputs = operands.replace(" ", "").split(",")
            values = [registers[name] if name in registers else int(name, 0) for name in inputs]
            registers[out] = calls[operation](*values) & 0xFFFFFFFF
    return [registers[f"${i}"] for i in range(4)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_byte_permutes_give_every_pair_of_values(dtype) -> None:
    """Each byte 0..255 at each of the four places of a word, beside other ones."""
    table = kernel.pairs(dtype, torch.device("cpu")).tolist()
    for byte in range(256):
        places = [byte, (7 * byte + 3) % 256, 255 - byte, (91 * byte) % 256]
        word = sum(p << 8 * i for i, p in enumerate(places))
        assert emulate(kernel._permutes(dtype), word) == [table[p] & 0xFFFFFFFF for p in places]


@pytest.mark.parametrize("shape", [(40, 64), (5, 39)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_the_plain_version_is_the_product_with_the_decoded_weight(shape, with_bias) -> None:
    torch.manual_seed(0)
    packed, absmax = nf4.quantize(torch.randn(shape))
    weight = nf4.dequantize(packed, absmax, shape, torch.float32)
    x = torch.randn(2, 3, shape[1], requires_grad=True)
    bias = torch.randn(shape[0], requires_grad=True) if with_bias else None
    inputs = [t for t in (x, bias) if t is not None]
    got, wanted = nf4_linear(x, packed, absmax, shape[0], bias=bias), F.linear(x, weight, bias)
    assert torch.equal(got, wanted)
    dy = torch.randn_like(got)
    for a, b in zip(torch.autograd.grad(got, inputs, dy), torch.autograd.grad(wanted, inputs, dy)):
        torch.testing.assert_close(a, b)


WAYS = {"gemv": {"gemv": 99, "tile": 0}, "tile": {"gemv": 0, "tile": 99}, "dense": {"gemv": 0, "tile": 0}}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(24, 128), (5, 39)])  # rows of 39: blocks cross them, which only `dense` takes
def test_output_and_gradients_are_those_of_the_definition(way, dtype, shape, device, monkeypatch) -> None:
    monkeypatch.setattr(kernel, "limits", lambda _: WAYS[way])
    packed, scales, exact = weight(shape, nested=True)
    x = torch.randn(2, shape[1], 3).transpose(1, 2).to(dtype).to(device).requires_grad_()  # (2, 3, I), not contiguous
    bias = torch.randn(shape[0]).to(dtype).to(device).requires_grad_()
    packed, scales = on(device, packed, scales)
    y = nf4_linear(x, packed, scales[0], shape[0], bias=bias, nested=scales[1:])
    check(y.detach(), x.detach(), exact, bias.detach(), True)
    dy = torch.randn_like(y)
    got = torch.autograd.grad(y, (x, bias), dy)
    wanted = torch.autograd.grad(nf4_linear_ref(x, packed, scales, shape[0], bias=bias), (x, bias), dy)
    for a, b in zip(got, wanted):
        assert a.shape == b.shape and a.dtype == dtype
        torch.testing.assert_close(a, b)  # the same products with the same decoded weight


def test_the_way_taken_follows_the_limits(monkeypatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(kernel, "limits", lambda _: {"gemv": 1, "tile": 16})
    half = torch.bfloat16
    ways = [kernel.way(M, 4096, 64, half, cpu) for M in (1, 2, 16, 17)]
    assert ways == ["gemv", "tile", "tile", "dense"]
    assert kernel.way(1, 4095, 64, half, cpu) == "dense"  # rows do not start with a block
    assert kernel.way(2, 4096, 32, half, cpu) == "dense" and kernel.way(1, 4096, 32, half, cpu) == "gemv"
    assert (
        kernel.way(8, 4096, 64, torch.float32, cpu) == "gemv" and kernel.way(9, 4096, 64, torch.float32, cpu) == "dense"
    )


def test_what_was_measured_on_a_device_decides_and_doctor_says_so(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    gpu = torch.device("cuda", 0)
    limits = kernel.limits.__wrapped__
    assert limits(gpu) == kernel.LIMITS["default"]
    (tmp_path / kernel.MEASURED).write_text('{"Some GPU": {"gemv": 2, "tile": 32}}')
    assert limits(gpu) == {"gemv": 2, "tile": 32}
    monkeypatch.setattr(kernel, "limits", limits)
    assert kernel.describe(4096, torch.bfloat16, gpu) == "M >= 1 gemv, M >= 3 tile, M >= 33 dense (measured here)"
    assert kernel.describe(39, torch.bfloat16, gpu) == "M >= 1 dense: rows of 39 do not start with a block"
    (tmp_path / kernel.MEASURED).write_text('{"Some GPU": {"tile": 32}}')
    with pytest.raises(ValueError, match="must give the numbers gemv and tile"):
        limits(gpu)


def test_what_does_not_fit_is_refused_by_name() -> None:
    packed, absmax = nf4.quantize(torch.randn(8, 64))
    x = torch.randn(2, 64)
    with pytest.raises(ValueError, match="packed must be 288 uint8"):
        nf4_linear(x, packed, absmax, 9)
    with pytest.raises(ValueError, match="absmax must be 16 float32 for 512 weights at block size 32"):
        nf4_linear(x, packed, absmax, 8, block_size=32)
    with pytest.raises(ValueError, match=r"bias must be \(8,\)"):
        nf4_linear(x, packed, absmax, 8, bias=torch.zeros(7))
    with pytest.raises(ValueError, match=r"bias must be .* of torch.float32, got .* of torch.bfloat16"):
        nf4_linear(x, packed, absmax, 8, bias=torch.zeros(8, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="block_size must be one of"):
        nf4_linear(x, packed, absmax, 8, block_size=48)
    with pytest.raises(ValueError, match=r"x must be \(..., I\) of a float dtype"):
        nf4_linear(x.int(), packed, absmax, 8)
    with pytest.raises(ValueError, match=r"on one device, got x on cpu.* packed on meta"):
        nf4_linear(x, packed.to("meta"), absmax, 8)
    with pytest.raises(ValueError, match="nested_absmax must be 1 float32"):
        nf4_linear(x, packed, absmax.byte(), 8, nested=(absmax, absmax[0], absmax))


@pytest.mark.skipif(not INSTALLED, reason="needs Triton")
@pytest.mark.parametrize("rows", [0, 3])
def test_no_rows_and_one_dimension(rows, device) -> None:
    packed, scales, exact = weight((24, 64), nested=False)
    packed, scales = on(device, packed, scales)
    x = torch.randn(rows, 64, device=device)
    assert nf4_linear(x, packed, scales[0], 24).shape == (rows, 24)
    if rows:
        y = nf4_linear(x[0], packed, scales[0], 24)
        assert y.shape == (24,)
        check(y[None], x[:1], exact, None, True)
