"""The loops that a C++ compiler can take over: the same bits as the reference, as Python, compiled, and in use."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from lowrank.kernels.nf4_codec import decision_bounds, decode_ref, encode_ref
from lowrank.quant import codec, compiled, double, packed
from lowrank.quant import product as product_module
from lowrank.quant import tensor as tensor_module
from lowrank.quant.codebooks import codebook
from lowrank.quant.double import dequantize_scales, quantize_scales
from lowrank.quant.linear import linear
from lowrank.quant.packed import describe
from lowrank.quant.product import product_back
from lowrank.quant.tensor import QuantizedTensor

TABLES = ("nf4", "fp4")


@pytest.fixture(autouse=True)
def own_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test starts without compiled loops, and leaves the choice of this process as it was."""
    monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path))
    compiled.loop.cache_clear()
    yield
    compiled.loop.cache_clear()


def weights(block_size: int) -> torch.Tensor:
    """32 blocks of all magnitudes: normal ones, tiny and huge ones, zeros, the decision bounds, a tie."""
    w = torch.randn(32, block_size, generator=torch.Generator().manual_seed(0))
    w = w * torch.exp2(torch.linspace(-146, 120, 32))[:, None]
    w[3], w[5, ::2] = 0, 0
    w[7] = decision_bounds(codebook("nf4"))[0].repeat(block_size // 8 + 1)[:block_size]
    w[7, 0] = 1
    w[9], w[9, 0] = 0, 1 + 3 * 2.0**-8  # as bf16 half-way between two, of which the lower is odd
    return w


@pytest.mark.parametrize("format", TABLES)
@pytest.mark.parametrize("block_size", [32, 64, 4096])
def test_encoding_is_the_reference(format: str, block_size: int) -> None:
    w, table = weights(block_size), codebook(format)
    codes, absmax = encode_ref(w, table, block_size)
    bounds, order = decision_bounds(table)
    ranks, largest = torch.empty(32, block_size // 2, dtype=torch.uint8), torch.empty(32)
    compiled.encode_blocks(ranks, largest, w.view(torch.int64), bounds)
    assert torch.equal(largest, absmax)
    assert torch.equal((order[ranks.int() >> 4] << 4 | order[ranks.int() & 15]).view(-1), codes)


@pytest.fixture
def as_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loops' sources, run eagerly where the compiled ones would run."""
    run = cache(lambda name: lambda tensors: compiled.SOURCES[name].function(*tensors))
    monkeypatch.setattr(compiled, "loop", run)


@pytest.mark.parametrize("format", [*TABLES, "int4"])
@pytest.mark.parametrize("block_size", [32, 64, 128, 4096])
@pytest.mark.usefixtures("as_python")
def test_decoding_is_the_reference(format: str, block_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "COMPILED_PIECE", 256)
    w, table = weights(block_size), codebook(format)
    codes, absmax = encode_ref(w, table, block_size)
    for n in (w.numel(), w.numel() - 7, block_size + 70):  # whole, with a partial block, hardly anything
        out = torch.empty(n, dtype=torch.bfloat16)
        blocks = -(-n // block_size)
        codec.decode_into(out, format, codes[: -(-n // 2)], absmax[:blocks], None, block_size)
        assert torch.equal(out, decode_ref(codes, absmax, table, w.numel(), torch.bfloat16, block_size)[:n])


@pytest.mark.parametrize("blocks", [1, 255, 256, 512, 768, 1000])
@pytest.mark.usefixtures("as_python")
def test_decoding_scales_is_the_reference(blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes, nested, offset = quantize_scales(torch.rand(blocks, generator=torch.Generator().manual_seed(0)))
    got = dequantize_scales(codes, nested, offset)
    monkeypatch.setattr(compiled, "usable", lambda tensor: False)
    assert torch.equal(got, dequantize_scales(codes, nested, offset))


@pytest.mark.parametrize("format", ["nf4-dq", "fp4-dq"])
@pytest.mark.usefixtures("as_python")
def test_decoding_both_levels_at_once_is_the_reference(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """700 rows of 96: 1050 blocks in 5 of the second level, the last one not whole."""
    monkeypatch.setattr(double, "COMPILED_PIECE", 2 * 2**14)
    used = []

    def decode_double(*arguments: object) -> object:
        used.append(double.decode_double(*arguments) is not None)
        return double.decode_double(*arguments)

    monkeypatch.setattr(tensor_module, "decode_double", decode_double)
    q = QuantizedTensor.quantize(torch.randn(700, 96, generator=torch.Generator().manual_seed(0)), format)
    want = decode_ref(q.codes, q.block_scales(), codebook(q.format), q.numel, torch.bfloat16, 64).view(-1)
    first, last = torch.empty(3 * 2**14, dtype=torch.bfloat16), torch.empty(q.numel - 4 * 2**14, dtype=torch.bfloat16)
    for parts in ([first, first[: 2**14], last], [torch.empty(q.numel, dtype=torch.bfloat16)]):
        got = torch.cat([part.clone() for part in q.decode_each(parts)])
        assert used.pop() and torch.equal(got, want)
    for odd in (torch.empty(q.numel + 1, dtype=torch.bfloat16)[1:], torch.empty(q.numel)):  # no whole words; fp32
        (got,) = q.decode_each([odd])
        assert not used.pop() and torch.equal(got.bfloat16(), want)
    small = QuantizedTensor.quantize(torch.ones(64), format)
    assert torch.equal(small.dequantize(torch.bfloat16), torch.ones(64).bfloat16()) and not used.pop()
    assert q.nested_absmax is not None
    parts_of = {"codes": q.codes, "scales": q.scales, "nested_absmax": q.nested_absmax}
    apart = replace(q, **{name: part.repeat_interleave(2)[::2] for name, part in parts_of.items()})  # with gaps
    assert torch.equal(apart.dequantize(torch.bfloat16).view(-1), want) and used.pop()
    for parts in ([first[:64], first], [first]):  # in the middle of a block of the second level; not all
        with pytest.raises(AssertionError):
            list(q.decode_each(parts))


@pytest.mark.parametrize("format", ["nf4", "nf4-dq", "fp4-dq", "int4"])
@pytest.mark.parametrize(("block_size", "columns"), [(64, 96), (32, 96), (64, 64), (64, 73)])
def test_few_rows_get_their_outputs_in_parts(
    format: str, block_size: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    q = QuantizedTensor.quantize(torch.randn(1100, columns), format, block_size)
    x, bias, calls = torch.randn(2, 3, columns).bfloat16(), torch.randn(1100).bfloat16(), []
    want = torch.nn.functional.linear(x, q.dequantize(torch.bfloat16), bias)

    @cache
    def loop(name: str) -> object:
        return lambda tensors: (calls.append(name), compiled.SOURCES[name].function(*tensors))

    monkeypatch.setattr(compiled, "loop", loop)
    for piece in (2**16, 2**30):
        for module, name in ((codec, "COMPILED_PIECE"), (double, "COMPILED_PIECE"), (product_module, "PART")):
            monkeypatch.setattr(module, name, piece)
        torch.testing.assert_close(linear(x, q, bias), want, rtol=2**-7, atol=2**-7)
        torch.testing.assert_close(linear(x.repeat(99, 1, 1), q, bias)[:2], want, rtol=2**-7, atol=2**-7)
    whole = block_size == 64 and columns != 73  # what the loop of that name is for
    assert ("decode_double" in calls) == (format[-2:] == "dq" and whole)


@pytest.mark.parametrize(("format", "block_size"), [("nf4-dq", 64), ("fp4", 64), ("int4", 64), ("nf4", 256)])
@pytest.mark.parametrize(("columns", "piece"), [(256, 2**22), (768, 96 * 64 * 4), (768, 1)])  # in 1, 3 and 6 parts
@pytest.mark.usefixtures("as_python")
def test_turned_weights_lie_where_oneDNN_reads_them(
    format: str, block_size: int, columns: int, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not packed.ordered_product_works():
        pytest.skip("this torch or CPU has no oneDNN product for bf16")
    monkeypatch.setattr(packed, "TURNED_PART", piece)
    monkeypatch.setattr(packed, "TURNED_PIECE", piece // 2)
    monkeypatch.setattr(packed, "_turned", packed._Turned())
    w = torch.randn(96, columns, generator=torch.Generator().manual_seed(0))
    q = QuantizedTensor.quantize(w, format, block_size)
    w, dy = q.dequantize(torch.bfloat16), torch.randn(2, 3, 96).bfloat16()
    for grad in (dy, torch.ones(()).bfloat16().expand(2, 3, 96)):
        dx = packed.turned_product(grad, q)
        assert dx is not None
        torch.testing.assert_close(dx, grad @ w, rtol=2**-7, atol=2**-5)
    ((_, last), (_, words)) = packed._turned.kept.popitem()
    assert last == {2**22: 256, 96 * 64 * 4: 256, 1: 128}[piece] and words is not None
    want = w[:, -last:].reshape(48, 2, -1, 64).permute(0, 2, 3, 1).reshape(48, -1, 128)  # [O/2][I/64][64][2]
    assert torch.equal(words.contiguous().view(torch.bfloat16), want)


def test_a_weight_is_cut_into_parts_of_two_pieces_or_more() -> None:
    for size in range(1, 40):
        for most in range(8):
            parts = list(packed._cuts(5, 5 + size, most))
            assert [i for start, end in parts for i in range(start, end)] == list(range(5, 5 + size))
            assert all(min(2, size) <= end - start <= max(most, 3) for start, end in parts)


@pytest.mark.usefixtures("as_python")
def test_turned_weights_stay_within_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    if not packed.ordered_product_works():
        pytest.skip("this torch or CPU has no oneDNN product for bf16")
    monkeypatch.setattr(packed, "TURNED_BYTES", 2 * 2**15)
    monkeypatch.setattr(packed, "_turned", packed._Turned())

    def kept(*shape: int) -> list[tuple[int, int]]:
        q = QuantizedTensor.quantize(torch.randn(shape), "nf4")
        dy = torch.randn(3, shape[0]).bfloat16()
        assert torch.equal(product_back(dy, q), dy @ q.dequantize(torch.bfloat16))
        return list(packed._turned.kept)

    assert kept(128, 128) == kept(128, 128) == [(128, 128)]
    assert kept(64, 256) == [(128, 128), (64, 256)]
    assert kept(4, 128) == [(64, 256), (4, 128)]  # the oldest went
    for unfit in ((256, 256), (7, 128), (8, 64), (8, 96)):  # too large, odd, narrow, blocks across rows
        assert kept(*unfit) == [(64, 256), (4, 128)]


def test_it_is_chosen_once_and_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiled.loop("decode") is None and "lowrank doctor --compile" in describe()["quantized weights"]
    compiled.folder().mkdir(parents=True)
    compiled.package("decode").write_bytes(b"not a package")
    assert compiled.loop("decode") is None  # chosen before it was there
    compiled.loop.cache_clear()
    assert compiled.loop("decode") is None  # and what cannot be loaded is left alone
    monkeypatch.setenv("LOWRANK_COMPILED", "maybe")
    compiled.loop.cache_clear()
    with pytest.raises(ValueError, match=r"unknown value of LOWRANK_COMPILED 'maybe'.*known: auto, off"):
        compiled.loop("decode")


SWEEP = """
import hashlib, sys, torch
from lowrank.quant import compiled, tensor
from lowrank.quant.linear import QuantizedLinear, linear
if sys.argv[1] == "build":
    compiled.build()
if (compiled.loop("decode") is None) != (sys.argv[1] == "off"):  # say why: once it was not taken, for no known reason
    source, there = compiled.SOURCES["decode"], compiled.package("decode").is_file()
    want, got = source.example(), source.example()
    source.function(*want)
    torch._C._aoti.AOTIModelPackageLoader(str(compiled.package("decode")), "model", False, 1, -1).run(got)
    alike = [source.alike(a, b) for a, b in zip(want, got)]
    raise AssertionError(f"not the loops that were asked for; file there: {there}; tried again, alike: {alike}")
digest = hashlib.sha256()
def note(*tensors):
    for t in tensors:
        digest.update(t.float().nan_to_num(7).numpy().tobytes())
draw = torch.Generator().manual_seed(0)
for threads in (1, 2):
    torch.set_num_threads(threads)
    for format in ("nf4", "nf4-dq", "fp4", "fp4-dq", "int4", "int4-affine", "int8"):
        for block_size in (32, 64, 128, 4096):
            for n in (1, 31 * block_size, 32 * block_size, 2**18 + 16 * block_size + 7):
                w = torch.randn(n, generator=draw) * torch.exp2(torch.randint(-30, 30, (), generator=draw))
                for dtype in (torch.float32, torch.bfloat16):
                    q = tensor.QuantizedTensor.quantize(w.to(dtype), format, block_size)
                    note(*q.parts().values(), q.dequantize(), q.dequantize(torch.float16))
    for shape, block_size in (((2304, 1024), 64), ((4096, 1024), 256), ((4096, 2560), 64), ((96, 65), 64)):
        w = torch.randn(shape, generator=draw)
        layer = QuantizedLinear(tensor.QuantizedTensor.quantize(w, "nf4-dq", block_size))
        x = torch.randn(3, shape[1], generator=draw).bfloat16().requires_grad_()
        y = layer(x)
        note(y.detach(), torch.autograd.grad(y.sum(), x)[0])
q = tensor.QuantizedTensor.quantize(torch.randn(5120, 1024, generator=draw), "nf4-dq")  # more than one part
x = torch.randn(3, 1024, generator=draw).bfloat16()
torch.testing.assert_close(linear(x, q), x @ q.dequantize(torch.bfloat16).T, rtol=2**-7, atol=2**-4)
for bad in (float("nan"), float("inf")):
    w = torch.randn(300, 300)
    w[7, 7] = bad
    try:
        tensor.QuantizedTensor.quantize(w, "nf4")
    except ValueError as error:
        assert "1 of 90000 values that are NaN or infinite" in str(error)
    else:
        raise AssertionError(f"{bad} was accepted")
print(digest.hexdigest())
"""


@pytest.mark.slow
def test_compiled_and_eager_give_the_same_bits(tmp_path: Path) -> None:
    """In processes of their own, since the choice is made once: built, loaded from the cache, turned off."""

    def sweep(how: str) -> str:
        environment = {
            **os.environ,
            "LOWRANK_CACHE": str(tmp_path),
            "LOWRANK_COMPILED": "off" if how == "off" else "auto",
        }
        done = subprocess.run([sys.executable, "-c", SWEEP, how], env=environment, capture_output=True, text=True)
        if done.returncode and shutil.which(os.environ.get("CXX", "g++")) is None:
            pytest.skip("there is no C++ compiler")
        assert done.returncode == 0, done.stderr
        return done.stdout

    built = sweep("build")
    assert built == sweep("load") == sweep("off")


def test_without_a_compiler_it_says_the_way_out(tmp_path: Path) -> None:
    environment = {**os.environ, "LOWRANK_CACHE": str(tmp_path), "CXX": str(tmp_path / "no-compiler")}
    command = [sys.executable, "-m", "lowrank.cli", "doctor", "--compile"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "install g++" in done.stderr and not list(tmp_path.rglob("*.pt2"))
