"""x Qᵀ and dy Q on a CPU by each of its ways: the same values but for the order of the sums."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from lowrank.quant import product as module
from lowrank.quant.product import bf16_products, in_float32, product, product_back
from lowrank.quant.tensor import QuantizedTensor


@pytest.fixture(params=["fast", "slow", "none"])
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(module, "bf16_products", lambda: request.param)
    return str(request.param)


@pytest.mark.parametrize("format", ["nf4-dq", "nf4", "fp4-dq", "int8", "int4-affine"])
@pytest.mark.parametrize("shape", [(700, 96), (64, 64), (3, 65), (1, 1)])
@pytest.mark.parametrize("rows", [1, 63, 64, 300])
def test_each_way_gives_the_product_of_the_decoded_weight(
    format: str, shape: tuple[int, int], rows: int, processor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rounding to bf16, and n products that fp32 sums in any order: n 2⁻²⁴ of the sum of their magnitudes."""
    monkeypatch.setattr(module, "PART", 3 * 2**14)
    widened, as_float32 = [], module.parts_as_float32
    monkeypatch.setattr(module, "parts_as_float32", lambda *args: widened.append(args) or as_float32(*args))
    draw = torch.Generator().manual_seed(0)
    q = QuantizedTensor.quantize(torch.randn(shape, generator=draw), format)
    w = q.dequantize(torch.bfloat16).double()
    x = torch.randn(rows, shape[1], generator=draw).bfloat16()
    dy = torch.randn(rows, shape[0], generator=draw).bfloat16()
    bias = torch.randn(shape[0], generator=draw).bfloat16()
    for got, a, b, plus in (
        (product(x, q, None), x, w.T, 0),
        (product(x, q, bias), x, w.T, bias),
        (product_back(dy, q), dy, w, 0),
    ):
        want, sizes = a.double() @ b + plus, a.double().abs() @ b.abs() + torch.as_tensor(plus).abs()
        assert got.dtype == torch.bfloat16 and got.shape == want.shape
        assert ((got.double() - want).abs() <= 2**-8 * want.abs() + 2 * b.shape[0] * 2**-24 * sizes).all()
    wide = rows >= {"fast": 10**9, "slow": 64, "none": 1}[processor]
    assert in_float32(x) == wide and len(widened) == 3 * wide


def test_shapes_before_the_last_dimension_stay(processor: str) -> None:
    q = QuantizedTensor.quantize(torch.randn(64, 128), "nf4-dq")
    assert product(torch.randn(5, 30, 128).bfloat16(), q, None).shape == (5, 30, 64)
    assert product_back(torch.randn(5, 30, 64).bfloat16(), q).shape == (5, 30, 128)
    assert product(torch.randn(0, 128).bfloat16(), q, None).shape == (0, 64)
    assert product_back(torch.randn(0, 64).bfloat16(), q).shape == (0, 128)


def test_other_dtypes_and_empty_weights_go_the_plain_way(processor: str) -> None:
    for shape in ((0, 64), (64, 0), (0, 0)):
        q = QuantizedTensor.quantize(torch.randn(shape), "nf4")
        assert torch.equal(product(torch.ones(70, shape[1]).bfloat16(), q, None), torch.zeros(70, shape[0]).bfloat16())
        assert torch.equal(product_back(torch.ones(70, shape[0]).bfloat16(), q), torch.zeros(70, shape[1]).bfloat16())
    q = QuantizedTensor.quantize(torch.randn(64, 128), "nf4")
    x = torch.randn(100, 128)
    assert not in_float32(x) and torch.equal(product(x, q, None), x @ q.dequantize(torch.float32).T)


@pytest.mark.parametrize("shape", [(4096, 4096), (11008, 4096), (4096, 4095), (32000, 8191), (3, 65), (1, 10**6)])
def test_parts_are_whole_blocks_and_no_larger_than_need_be(shape: tuple[int, int]) -> None:
    """A part beyond PART is the smallest there can be."""
    q = SimpleNamespace(shape=shape, block_size=64, double_quant=True)
    rows, (O, I) = module.part_rows(q), shape
    whole = [n for n in range(1, O) if n * I % (64 * 256) == 0]
    assert rows == O or rows in whole
    assert rows * I <= module.PART or rows == min([*whole, O])


def test_other_defaults_change_nothing() -> None:
    """In a process of its own: tables are made once, by whatever comes first."""
    done = subprocess.run([sys.executable, "-c", DEFAULTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


DEFAULTS = """
import torch
from lowrank.quant import product as module
from lowrank.quant.tensor import QuantizedTensor
w, dy = torch.randn(128, 256), torch.randn(70, 128).bfloat16()
for kind in ("fast", "slow", "none"):
    module.bf16_products = lambda: kind
    for default, device in ((torch.bfloat16, "cpu"), (torch.float64, "cpu"), (torch.float32, "meta")):
        torch.set_default_dtype(default)
        with torch.device(device):
            q = QuantizedTensor.quantize(w, "nf4-dq")
            got = module.product_back(dy, q), module.product(dy @ w.bfloat16(), q, None)
        torch.set_default_dtype(torch.float32)
        dense = q.dequantize(torch.bfloat16)
        for y, want in zip(got, (dy @ dense, dy @ w.bfloat16() @ dense.T)):
            torch.testing.assert_close(y, want, rtol=2**-7, atol=2**-3)  # 2 n 2⁻²⁴ of magnitudes that sum to 3,000
"""


def test_without_oneDNN_a_processor_has_no_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())
    assert not module._arm_has_bf16()


def test_what_a_processor_has(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    def found(machine: str, amx: bool, avx512: bool, arm: bool, maker: str) -> str:
        (tmp_path / "cpuinfo").write_text(f"vendor_id : {maker}\n")
        monkeypatch.setattr("platform.machine", lambda: machine)
        monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: amx)
        monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: avx512)
        monkeypatch.setattr(module, "_arm_has_bf16", lambda: arm)
        monkeypatch.setattr(module, "CPUINFO", tmp_path / "cpuinfo")
        return bf16_products.__wrapped__()

    assert found("x86_64", True, True, False, "GenuineIntel") == "fast"
    assert found("x86_64", False, True, False, "GenuineIntel") == "slow"
    assert found("x86_64", False, True, False, "AuthenticAMD") == "fast"
    assert found("x86_64", False, False, False, "AuthenticAMD") == "none"
    assert found("aarch64", False, False, True, "") == "fast" and found("arm64", False, False, False, "") == "none"
