"""Intervals and tests against their equations, closed forms and other implementations."""

import math
import random

import pytest

from lowrank.evaluation.stats import bootstrap, mcnemar, wilson


def test_wilson_at_the_ends_has_a_closed_form() -> None:
    z2 = 1.959963984540054**2
    assert wilson(0, 20) == (0.0, pytest.approx(z2 / (20 + z2)))
    assert wilson(20, 20) == (pytest.approx(20 / (20 + z2)), 1.0)
    assert wilson(0, 0) is None


def test_wilson_bounds_solve_their_equation() -> None:
    """The ends are the p at which the observed share lies exactly z standard errors away."""
    for k, n in ((3, 17), (50, 60), (199, 200)):
        for p in wilson(k, n) or ():
            assert abs(k / n - p) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / n), rel=1e-5)


def test_wilson_refuses_impossible_counts() -> None:
    with pytest.raises(ValueError, match="3 of 2"):
        wilson(3, 2)


def test_bootstrap_of_a_mean_is_close_to_the_normal_interval() -> None:
    rng = random.Random(0)
    values = [rng.gauss(5, 2) for _ in range(400)]
    low, high = bootstrap(values) or (0, 0)
    mean = sum(values) / 400
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / 400)
    half = 1.96 * deviation / 20
    # the percentile of 2000 draws is itself uncertain by about 4 % of the half width
    assert low == pytest.approx(mean - half, abs=0.15 * half) and high == pytest.approx(mean + half, abs=0.15 * half)


def test_bootstrap_is_deterministic_and_covers_constants() -> None:
    assert bootstrap([1.0, 2.0, 3.0]) == bootstrap([1.0, 2.0, 3.0])
    assert bootstrap([2.0] * 5) == (2.0, 2.0)
    assert bootstrap([]) is None


def test_mcnemar_is_the_exact_binomial() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 5) == 1.0
    assert mcnemar(0, 5) == pytest.approx(2 / 2**5)
    assert mcnemar(1, 9) == pytest.approx(2 * (1 + 10) / 2**10)
    assert mcnemar(9, 1) == mcnemar(1, 9)
