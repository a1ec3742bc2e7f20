"""How sure a figure is: intervals for shares and means, a test for pairs."""

import math
import random
from collections.abc import Callable, Sequence
from statistics import NormalDist, fmean
from typing import Any

Interval = tuple[float, float]


def wilson(successes: int, n: int, confidence: float = 0.95) -> Interval | None:
    """Wilson's score interval of a share k / n (Wilson, 1927); None where nothing was counted.

    centre = (p + z²/2n) / (1 + z²/n)        half width = z sqrt(p (1 - p) / n + z²/4n²) / (1 + z²/n)
    """
    if n == 0:
        return None
    if not 0 <= successes <= n:
        raise ValueError(f"wanted 0 <= successes <= n, got {successes} of {n}")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p, scale = successes / n, 1 + z * z / n
    centre = (p + z * z / (2 * n)) / scale
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / scale
    low = 0.0 if successes == 0 else max(0.0, centre - half)  # exact at the ends, whatever rounding says
    return low, 1.0 if successes == n else min(1.0, centre + half)


def bootstrap(
    values: Sequence[Any],
    statistic: Callable[[Any], float] = fmean,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval | None:
    """The percentile interval of a statistic over `resamples` draws with replacement (Efron, 1979); None of nothing."""
    if not values:
        return None
    rng = random.Random(seed)
    draws = sorted(statistic(rng.choices(values, k=len(values))) for _ in range(resamples))
    tail = (1 - confidence) / 2
    return draws[round(tail * (resamples - 1))], draws[round((1 - tail) * (resamples - 1))]


def mcnemar(only_first: int, only_second: int) -> float:
    """The two-sided exact p-value of McNemar's test (1947): do the discordant pairs lean to one side?

    Of b + c questions on which two models differ, b right in the first only: a binomial with p = 1/2.
    """
    n, k = only_first + only_second, min(only_first, only_second)
    if n == 0:
        return 1.0
    tail = sum(math.comb(n, i) for i in range(k + 1)) / 2**n
    return min(1.0, 2 * tail)
