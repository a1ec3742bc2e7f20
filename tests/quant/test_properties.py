"""Theorems about quantization, each over drawn examples. test_counter_examples.py has where they stop.

Every run draws a few examples; `pytest -m slow` draws 125,000 in all, and LOWRANK_EXAMPLES=8 eight times as many.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowrank.kernels.nf4_codec import decision_bounds, decode_ref, encode_ref, unpack
from lowrank.quant import bounds
from lowrank.quant.codebooks import codebook
from lowrank.quant.double import dequantize_scales, quantize_scales
from lowrank.quant.tensor import QuantizedTensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TABLES = ("nf4", "fp4")
LAYOUTS = [("nf4", False), ("nf4", True), ("fp4", False), ("fp4", True), ("int8", False), ("int4", False)]
LAYOUTS = [*LAYOUTS, ("int4-affine", False)]
KINDS = ("normal", "uniform", "heavy", "bounds", "constant", "zeros", "exponents", "offset")


@dataclass(frozen=True)
class Case:
    """A weight and a way to store it: a few drawn numbers, from which torch makes the rest."""

    kind: str
    numel: int
    exponent: int
    seed: int
    values: tuple[float, ...]
    dtype: torch.dtype
    format: str
    double: bool
    block_size: int
    scale_dtype: torch.dtype = torch.float32

    def weight(self) -> Tensor:
        """Finite in `dtype`; a value that overflows it becomes its largest number."""
        draw = torch.Generator().manual_seed(self.seed)
        n = self.numel
        normal = torch.randn(n, generator=draw, dtype=torch.float64)
        spread = torch.rand(n, generator=draw, dtype=torch.float64)
        w = {
            "normal": normal,
            "uniform": spread * 2 - 1,
            "heavy": normal / (spread + 1e-3),
            "bounds": self._near_bounds(draw),
            "constant": torch.ones(n, dtype=torch.float64),
            "zeros": normal * (torch.arange(n) // self.block_size % 2),
            "exponents": normal * torch.exp2(torch.randint(-40, 40, (n,), generator=draw).double()),
            "offset": 1 + normal * 2.0 ** float(torch.randint(-30, 0, (), generator=draw)),
        }[self.kind]
        w = w * 2.0**self.exponent
        for i, value in enumerate(self.values):
            w[(i * 37 + self.seed) % n] = value
        limit = torch.finfo(self.dtype).max
        return w.clamp(-limit, limit).to(self.dtype)

    def _near_bounds(self, draw: torch.Generator) -> Tensor:
        """Values on the format's decision bounds, one ulp beside them, and on the codes; each block has a 1."""
        format = self.format if self.format in TABLES else "nf4"
        code = codebook(format)
        bounds = decision_bounds(code)[0]
        if self.format not in TABLES:
            bounds = (torch.arange(-127, 127) + 0.5) / 127 if self.format == "int8" else (torch.arange(-7, 7) + 0.5) / 7
        beside = [torch.nextafter(bounds, torch.full_like(bounds, side)) for side in (-2, 2)]
        points = torch.cat((bounds, *beside, code)).double()
        w = points[torch.randint(len(points), (self.numel,), generator=draw)]
        w[:: self.block_size] = 1
        return w

    def quantize(self) -> QuantizedTensor:
        return QuantizedTensor.quantize(self.weight(), self.format, self.block_size, self.double, self.scale_dtype)


def cases(
    layouts: list[tuple[str, bool]] = LAYOUTS,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    exponents: tuple[int, int] = (-149, 126),
    kinds: tuple[str, ...] = KINDS,
    values: st.SearchStrategy[float] | None = None,
    half_scales: bool = True,
) -> st.SearchStrategy[Case]:
    """Small draws, so that 100,000 take minutes. `exponents`: of the power of two that multiplies the weight."""
    if values is None:
        values = st.floats(width=32, allow_nan=False, allow_infinity=False)

    def build(layout: tuple[str, bool], half: bool, **rest) -> Case:
        scale = torch.float16 if half and half_scales and layout[0].startswith("int") else torch.float32
        return Case(format=layout[0], double=layout[1], scale_dtype=scale, **rest)

    return st.builds(
        build,
        layout=st.sampled_from(layouts),
        half=st.booleans(),
        kind=st.sampled_from(kinds),
        numel=st.one_of(st.integers(1, 300), st.sampled_from((64, 128, 1000, 8192 + 5))),
        exponent=st.integers(*exponents),
        seed=st.integers(0, 2**31),
        values=st.lists(values, max_size=3).map(tuple),
        dtype=st.sampled_from(dtypes),
        block_size=st.sampled_from((32, 64, 128, 4096)),
    )


FACTOR = float(os.environ.get("LOWRANK_EXAMPLES", "1"))
QUICK, SLOW = 40, 10_000
examples = pytest.mark.parametrize("count", [QUICK, pytest.param(SLOW, marks=pytest.mark.slow)])

# Ordinary magnitudes: no overflow, and nothing (A · 2^-9 included) that is subnormal in fp32.
MIDDLE = {"exponents": (-60, 60), "values": st.floats(-(2.0**60), 2.0**60, width=32, allow_subnormal=False)}
SINGLE = [layout for layout in LAYOUTS if not layout[1]]
DOUBLE = [layout for layout in LAYOUTS if layout[1]]


def for_all(count: int, strategy: st.SearchStrategy, holds: Callable[..., None], *more: st.SearchStrategy) -> None:
    """Check `holds` on `count` examples: the same ones in a quick run and in CI, fresh ones in a slow run by hand."""
    checks = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    pinned = count == QUICK or "CI" in os.environ
    profile = settings(deadline=None, suppress_health_check=checks, derandomize=pinned, print_blob=True)
    settings(profile, max_examples=int(count * FACTOR))(given(strategy, *more)(holds))()


def in_domain(case: Case) -> QuantizedTensor:
    """Quantize; an example whose range fp32, or the dtype of its scales, cannot hold is outside the domain."""
    try:
        return case.quantize()
    except ValueError as error:
        assert "does not fit" in str(error) or "overflows fp32" in str(error)
        assume(False)
        raise


def equal_values(q: QuantizedTensor, codes: Tensor, others: Tensor) -> bool:
    """Codes of equal value count as one: FP4's two zeros."""
    if q.format == "int8":
        return torch.equal(codes, others)
    values = codebook(q.format)
    return torch.equal(values[unpack(codes, q.numel).long()], values[unpack(others, q.numel).long()])


@examples
def test_the_elementwise_bound_holds_for_every_element(count: int) -> None:
    def holds(case: Case, dtype: torch.dtype) -> None:
        q = in_domain(case)
        got = q.dequantize(dtype).double()
        error = (case.weight().double() - got).abs().nan_to_num(nan=torch.inf)
        assert (error <= bounds.elementwise(q, dtype)).all()

    for_all(count * 2, cases(), holds, st.sampled_from(DTYPES))


@examples
def test_no_element_exceeds_its_blocks_worst_case(count: int) -> None:
    def holds(case: Case, dtype: torch.dtype) -> None:
        q = in_domain(case)
        worst = bounds.block_worst_case(q, dtype).repeat_interleave(q.block_size)[: q.numel]
        assert (bounds.elementwise(q, dtype) <= worst).all()

    for_all(count // 2, cases(), holds, st.sampled_from(DTYPES))


@examples
def test_the_product_bound_holds(count: int) -> None:
    def holds(case: Case, rows: int) -> None:
        q = in_domain(case)
        w = case.weight().view(-1)
        columns = max(1, w.numel() // rows)
        assume(columns * rows == w.numel())
        q = QuantizedTensor.quantize(w.view(rows, columns), case.format, case.block_size, case.double, case.scale_dtype)
        x = torch.randn(3, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(case.seed))
        error = (x @ w.view(rows, columns).double().T - x @ q.dequantize(torch.float32).double().T).abs()
        assert (error <= bounds.matmul(q, x) * (1 + 1e-9)).all()  # 1e-9: the fp64 products themselves

    for_all(count // 2, cases(**MIDDLE), holds, st.sampled_from((1, 2, 4, 5)))


@examples
def test_the_fast_codec_is_the_reference_bit_by_bit(count: int) -> None:
    def holds(case: Case, dtype: torch.dtype) -> None:
        w = case.weight()
        q = QuantizedTensor.quantize(w, case.format, case.block_size)
        codes, absmax = encode_ref(w, codebook(case.format), case.block_size)
        assert torch.equal(q.codes, codes) and torch.equal(q.scales, absmax)
        want = decode_ref(codes, absmax, codebook(case.format), w.numel(), dtype, case.block_size)
        assert torch.equal(q.dequantize(dtype).nan_to_num(7), want.nan_to_num(7))

    for_all(count, cases([(f, False) for f in TABLES]), holds, st.sampled_from(DTYPES))


@examples
def test_codes_are_idempotent_where_the_decoded_absmax_is_positive(count: int) -> None:
    """In fp32 and, for the 4-bit tables, in bf16, whose relative rounding of 2^-9 is far below their cells."""

    def holds(case: Case, dtype: torch.dtype) -> None:
        q = in_domain(case)
        assume((q.block_scales() > 2.0**-90).all())
        again = QuantizedTensor.quantize(q.dequantize(dtype), q.format, q.block_size, q.double_quant)
        assert equal_values(q, q.codes, again.codes)

    middle = {**MIDDLE, "half_scales": False, "kinds": tuple(k for k in KINDS if k != "zeros")}
    for_all(count, cases(**middle), holds, st.just(torch.float32))
    tables = [layout for layout in LAYOUTS if layout[0] in TABLES]
    for_all(count // 2, cases(tables, **middle), holds, st.just(torch.bfloat16))


@examples
def test_values_are_idempotent_without_double_quantization(count: int) -> None:
    def holds(case: Case) -> None:
        once = in_domain(case).dequantize(torch.float32)
        assert torch.equal(QuantizedTensor.quantize(once, case.format, case.block_size).dequantize(), once)

    layouts = [layout for layout in SINGLE if layout[0] != "int4-affine"]
    for_all(count, cases(layouts, **MIDDLE, half_scales=False), holds)


@examples
def test_values_rise_with_the_weights_in_each_block(count: int) -> None:
    def holds(case: Case, dtype: torch.dtype) -> None:
        w, got = case.weight().float(), in_domain(case).dequantize(dtype).float()
        for block, values in zip(w.split(case.block_size), got.split(case.block_size)):
            rising = values[block.argsort(stable=True)]
            assert (rising[1:] >= rising[:-1]).all()  # fp16 may overflow to infinity

    for_all(
        count,
        cases(SINGLE, exponents=(-149, 10), values=st.floats(-1e4, 1e4, width=32)),
        holds,
        st.sampled_from(DTYPES),
    )


@examples
def test_symmetric_integers_know_no_sign(count: int) -> None:
    def holds(case: Case) -> None:
        w, plus = case.weight(), in_domain(case)
        minus = QuantizedTensor.quantize(-w, case.format, case.block_size, False, case.scale_dtype)
        assert torch.equal(plus.dequantize(), -minus.dequantize())

    for_all(count, cases([("int4", False), ("int8", False)]), holds)


@examples
def test_fp4_knows_no_sign_away_from_ties(count: int) -> None:
    def holds(case: Case) -> None:
        w = case.weight()
        plus, minus = (QuantizedTensor.quantize(v, "fp4", case.block_size) for v in (w, -w))
        differs = plus.dequantize() != -minus.dequantize()
        scale = plus.scales.repeat_interleave(case.block_size)[: w.numel()].double()
        edges = decision_bounds(codebook("fp4"))[0].double()
        distance = (w.double()[:, None] / scale[:, None] - edges).abs().amin(dim=1)
        assert not (differs & (distance > 1e-6)).any()

    kinds = tuple(k for k in KINDS if k != "zeros")
    for_all(count // 2, cases([("fp4", False)], (torch.float32,), **MIDDLE, kinds=kinds), holds)


@examples
def test_powers_of_two_pass_through(count: int) -> None:
    def holds(case: Case, power: int) -> None:
        w = case.weight()
        one, other = (
            QuantizedTensor.quantize(v, case.format, case.block_size, case.double) for v in (w, w * 2.0**power)
        )
        assert equal_values(one, one.codes, other.codes)
        assert torch.equal(one.dequantize() * 2.0**power, other.dequantize())

    values = st.floats(-(2.0**30), 2.0**30, width=32, allow_subnormal=False).map(
        lambda v: v if abs(v) > 2**-30 else 0.0
    )
    kinds = tuple(k for k in KINDS if k != "exponents")  # those span 80 powers of two, and some would turn subnormal
    middle = cases(dtypes=(torch.float32,), exponents=(-20, 20), values=values, kinds=kinds, half_scales=False)
    for_all(count, middle, holds, st.integers(-30, 30))


@examples
def test_double_quantization_moves_a_value_by_at_most_its_own_term(count: int) -> None:
    def holds(case: Case) -> None:
        q = in_domain(case)
        plain = QuantizedTensor.quantize(case.weight(), q.format, q.block_size)
        term = bounds.scale_term(q)
        assert ((plain.scales.double() - q.block_scales().double()).abs() <= term).all()
        moved = (q.dequantize(torch.float32).double() - plain.dequantize(torch.float32).double()).abs()
        values = codebook(q.format)[unpack(q.codes, q.numel).long()].abs().double()
        each = term.repeat_interleave(q.block_size)[: q.numel]
        size = plain.scales.double().repeat_interleave(q.block_size)[: q.numel]
        rounding = values * (2 * size + each) * 2.0**-24 + 2.0**-149  # of the two products
        assert (moved <= values * each + rounding).all()

    for_all(count, cases(DOUBLE), holds)


@examples
def test_scales_survive_their_second_quantization_within_the_term(count: int) -> None:
    def holds(seed: int, n: int, spread: float, magnitude: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        absmax = (1 + spread * torch.randn(n, generator=draw)).abs() * 2.0**magnitude
        codes, nested, offset = quantize_scales(absmax)
        fields = {"scales": codes, "nested_absmax": nested, "nested_offset": offset}
        q = QuantizedTensor("nf4", (64 * n,), torch.float32, 64, torch.zeros(32 * n, dtype=torch.uint8), **fields)
        error = (absmax.double() - dequantize_scales(codes, nested, offset).double()).abs()
        assert (error <= bounds.scale_term(q)).all()

    numbers = st.integers(1, 700), st.floats(0, 10), st.integers(-120, 100)
    for_all(count, st.integers(0, 2**31), holds, *numbers)


@examples
def test_serialisation_is_a_round_trip(count: int) -> None:
    def holds(case: Case, name: str) -> None:
        q = in_domain(case)
        again = QuantizedTensor.from_state_dict(q.state_dict(name), name)
        assert (again.format, again.shape, again.dtype, again.block_size) == (q.format, q.shape, q.dtype, q.block_size)
        assert all(torch.equal(part, again.parts()[key]) for key, part in q.parts().items())

    for_all(count // 2, cases(), holds, st.text("abc._0", min_size=1))
