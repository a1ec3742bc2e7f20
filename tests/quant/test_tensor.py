"""QuantizedTensor: shapes, strides, dtypes, sizes, checks."""

import pytest
import torch

from lowrank.kernels.nf4_codec import decode_ref
from lowrank.quant import bounds, nf4
from lowrank.quant.codebooks import codebook
from lowrank.quant.formats import BLOCK_SIZES, FORMATS, parse_format
from lowrank.quant.tensor import QuantizedTensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = [(f, d) for f, spec in FORMATS.items() for d in ((False, True) if spec.table else (False,))]


def equal(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    same = (a.format, a.shape, a.dtype, a.block_size) == (b.format, b.shape, b.dtype, b.block_size)
    return same and all(torch.equal(p, b.parts()[name]) for name, p in a.parts().items())


@pytest.mark.parametrize(("format", "double"), LAYOUTS)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_the_error_is_small_for_any_shape_and_dtype(format: str, double: bool, block_size: int) -> None:
    torch.manual_seed(0)
    for shape in ((), (1,), (3, 5), (7, 64), (2, 3, 65), (130, 37)):
        for dtype in DTYPES:
            w = torch.randn(shape, dtype=dtype)
            q = QuantizedTensor.quantize(w, format, block_size, double)
            got = q.dequantize()
            assert got.shape == w.shape and got.dtype == dtype
            assert (got.float() - w.float()).abs().max() < 0.7  # half the widest cell of FP4 times about 3.5


@pytest.mark.parametrize(("format", "double"), LAYOUTS)
def test_strided_input_gives_what_its_contiguous_copy_gives(format: str, double: bool) -> None:
    w = torch.randn(96, 80)
    for view in (w.T, w[::2], w[:, 3:67], w[5:50, ::3], w.expand(2, 96, 80), w.as_strided((40, 40), (1, 7))):
        assert equal(
            QuantizedTensor.quantize(view, format, 64, double),
            QuantizedTensor.quantize(view.contiguous(), format, 64, double),
        )


@pytest.mark.parametrize(("format", "double"), LAYOUTS)
def test_empty_zero_constant_and_denormal_tensors(format: str, double: bool) -> None:
    empty = QuantizedTensor.quantize(torch.empty(0, 5), format, 64, double)
    assert empty.dequantize().shape == (0, 5) and empty.bits_per_weight == 0
    zero = torch.zeros(3, 70)
    assert torch.equal(QuantizedTensor.quantize(zero, format, 64, double).dequantize(), zero)
    constant = torch.full((3, 70), -0.7)
    got = QuantizedTensor.quantize(constant, format, 64, double).dequantize()
    assert torch.allclose(got, constant, rtol=1e-6, atol=0)
    tiny = torch.randn(3, 70) * 1e-41
    got = QuantizedTensor.quantize(tiny, format, 64, double).dequantize()
    assert torch.isfinite(got).all() and (got - tiny).abs().max() <= tiny.abs().max()


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16])
def test_affine_codes_keep_what_is_already_on_their_grid(scale_dtype: torch.dtype) -> None:
    """GGUF's Q4_1 stores fp16 d and m: values j · d + m with j over 0 ... 15 come back exactly."""
    d, m = torch.tensor([0.01, 0.5, 3.0]).half().float(), torch.tensor([-0.07, -4.0, 1.0]).half().float()
    j = torch.stack([torch.randperm(32) % 16 for _ in d])
    w = j * d[:, None] + m[:, None]
    q = QuantizedTensor.quantize(w, "int4-affine", 32, scale_dtype=scale_dtype)
    if scale_dtype == torch.float16:
        assert torch.equal(q.dequantize(), w)
        assert torch.equal(q.scales.float(), d) and torch.equal(q.zeros.float(), m)
    else:
        torch.testing.assert_close(q.dequantize(), w, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("format", "largest"), [("int4", 7), ("int8", 127)])
def test_a_code_stays_in_range_where_its_fp16_scale_was_rounded_down(format: str, largest: int) -> None:
    """max |w| / L = 1.4 of fp16's smallest number becomes 1 of them: w / s is then 1.4 L."""
    w = torch.tensor([1.0, -1.0, 0.5, 0.0]) * 1.4 * largest * 2.0**-24
    q = QuantizedTensor.quantize(w, format, scale_dtype=torch.float16)
    assert q.scales.item() == 2.0**-24
    assert (q.dequantize(torch.float32)[:2] * 2.0**24).tolist() == [largest, -largest]
    assert ((w - q.dequantize()).abs() <= bounds.elementwise(q)).all()


@pytest.mark.parametrize("shift", [0.0, 5.0, -5.0])
def test_what_fills_up_a_partial_affine_block_does_not_count(shift: float) -> None:
    w = torch.linspace(0.5, 1, 40) + shift
    part, alone = (
        QuantizedTensor.quantize(w, "int4-affine", 32),
        QuantizedTensor.quantize(w[32:].repeat(4), "int4-affine", 32),
    )
    assert part.scales[1] == alone.scales[0] and part.zeros[1] == alone.zeros[0]


def test_sizes_count_codes_scales_and_second_level() -> None:
    w = torch.randn(512, 256)
    blocks = w.numel() // 64
    assert QuantizedTensor.quantize(w, "nf4").bits_per_weight == 4.5
    double = QuantizedTensor.quantize(w, "nf4-dq")
    assert double.double_quant and double.nbytes == w.numel() // 2 + blocks + 4 * (blocks // 256) + 4
    assert QuantizedTensor.quantize(w, "int8").bits_per_weight == 8.5
    assert QuantizedTensor.quantize(w, "int4", scale_dtype=torch.float16).bits_per_weight == 4.25
    assert QuantizedTensor.quantize(w, "int4-affine", 32).bits_per_weight == 6


def test_two_to_the_31_elements_by_arithmetic() -> None:
    """Nothing is allocated: meta tensors have sizes only."""
    shape = (2**16, 2**15 + 1)
    n = shape[0] * shape[1]
    q = QuantizedTensor(
        "nf4",
        shape,
        torch.bfloat16,
        64,
        torch.empty(n // 2, dtype=torch.uint8, device="meta"),
        torch.empty(n // 64, device="meta"),
    )
    assert q.numel == n > 2**31 and q.nbytes == n // 2 + 4 * n // 64


@pytest.mark.parametrize(("format", "double"), LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 70), (0,), (1,), (), (4, 64)])
def test_state_dict_round_trip(format: str, double: bool, shape: tuple[int, ...]) -> None:
    for dtype in DTYPES:
        q = QuantizedTensor.quantize(torch.randn(shape, dtype=dtype), format, 32, double)
        state = q.state_dict("a.weight")
        assert all(key.startswith("a.weight") for key in state)
        assert equal(QuantizedTensor.from_state_dict(state, "a.weight"), q)


def test_decoding_into_a_buffer_and_at_another_dtype() -> None:
    q = QuantizedTensor.quantize(torch.randn(9, 70), "nf4-dq")
    out = torch.empty(9, 70, dtype=torch.float16)
    assert q.dequantize(out=out) is out
    assert torch.equal(out, q.dequantize(torch.float32).half())
    for bad in (torch.empty(70, 9), torch.empty(70, 9).T):
        with pytest.raises(ValueError, match="out must be a contiguous"):
            q.dequantize(torch.float32, out=bad)


def test_large_tensors_decode_in_pieces() -> None:
    w = torch.randn(2**20 + 64 * 3 + 7)
    for format in ("nf4", "fp4", "int4"):
        q = QuantizedTensor.quantize(w, format)
        for dtype in DTYPES:
            ref = decode_ref(q.codes, q.scales, codebook(format), w.numel(), dtype, 64)
            assert torch.equal(q.dequantize(dtype), ref)


def test_one_thread_and_two_give_the_same_bits() -> None:
    w = torch.randn(2**20 + 64 * 3 + 7)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            q = QuantizedTensor.quantize(w, "fp4")
            results.append((q, q.dequantize(torch.bfloat16)))
    finally:
        torch.set_num_threads(threads)
    assert equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_nf4_on_plain_tensors() -> None:
    w = torch.randn(5, 33)
    packed, absmax = nf4.quantize(w)
    assert packed.shape == (83,) and absmax.shape == (3,)
    q = QuantizedTensor.quantize(w, "nf4")
    assert torch.equal(nf4.dequantize(packed, absmax, (5, 33), torch.float32), q.dequantize())
    with pytest.raises(ValueError, match=r"absmax must be \(3,\)"):
        nf4.dequantize(packed, absmax[:2], (5, 33), torch.float32)
    with pytest.raises(ValueError, match=r"weight must be \(83,\) of torch.uint8"):
        nf4.dequantize(packed[:-1], absmax, (5, 33), torch.float32)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused_with_name_and_count(bad: float) -> None:
    w = torch.randn(10, 10)
    w[3, 4] = w[7, 7] = bad
    with pytest.raises(ValueError, match=r"mlp\.weight has 2 of 100 values that are NaN or infinite"):
        QuantizedTensor.quantize(w, "nf4", name="mlp.weight")


def test_opposite_infinities_and_huge_sums_are_told_apart() -> None:
    w = torch.tensor([float("inf"), -float("inf"), 1.0])
    with pytest.raises(ValueError, match="2 of 3"):
        QuantizedTensor.quantize(w, "int8")
    QuantizedTensor.quantize(torch.full((1000,), 3e38), "int8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nf5", 64, False), "unknown quantization format 'nf5' .*known: .*nf4"),
        (("nf4", 48, False), "unknown block size 48; known: 32, 64"),
        (("nf4", "64", False), "unknown block size '64'"),
        (("int8", 64, True), "double quantization is for nf4 and fp4, not for int8"),
        (("int4-dq", 64, False), "unknown quantization format 'int4-dq'"),
    ],
)
def test_bad_arguments_say_what_is_known(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantizedTensor.quantize(torch.randn(64), *arguments)


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"dtype torch.float64"):
        QuantizedTensor.quantize(torch.randn(64, dtype=torch.float64), "nf4")
    with pytest.raises(ValueError, match="cannot hold its scales in"):
        QuantizedTensor.quantize(torch.randn(64), "nf4", scale_dtype=torch.float16)
    with pytest.raises(ValueError, match=r"does not fit torch.float16"):
        QuantizedTensor.quantize(torch.full((64,), 1e6), "int4", scale_dtype=torch.float16)


def test_format_names() -> None:
    assert parse_format("nf4-dq") == ("nf4", True)
    assert parse_format("int4-affine") == ("int4-affine", False)
    with pytest.raises(ValueError, match="did you mean 'nf4"):
        parse_format("nf4dq")
