"""Differences between arms that share their seeds: how large, how sure, and how many seeds they would take."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.05  # of tests; intervals are of 1 - LEVEL
POWER = 0.8
RESAMPLES = 9999  # up to 13 seeds, all sign flips are fewer, and the test is exact
_DECIMALS = 9  # sums that agree so far are ties: accuracies are hits / images, and differ by far more or by rounding
_MOST_SEEDS = 100_000


@dataclass(frozen=True)
class Difference:
    """Of an arm to a reference, over the seeds that both have; in the unit of what was compared."""

    seeds: int
    mean: float
    deviation: float | None  # between seeds; None of one seed
    interval: tuple[float, float] | None  # BCa bootstrap, of the mean
    p: float | None  # two-sided sign-flip test
    corrected: float | None = None  # that p by Holm, over the arms that are compared with the reference

    @property
    def found(self) -> bool:
        """Whether the test says that there is one."""
        return self.corrected is not None and self.corrected < LEVEL


def paired(arm: Mapping[int, float], reference: Mapping[int, float]) -> Difference | None:
    """The difference over common seeds; None where there are none."""
    seeds = sorted(arm.keys() & reference.keys())
    if not seeds:
        return None
    values = np.array([arm[seed] - reference[seed] for seed in seeds])
    mean = float(values.mean())
    if len(values) < 2:
        return Difference(1, mean, None, None, None)
    return Difference(len(values), mean, float(values.std(ddof=1)), bootstrap(values), sign_flip(values))


def bootstrap(values: np.ndarray) -> tuple[float, float] | None:
    """BCa interval of the mean (Efron 1987); None where the seeds do not determine one."""
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # of two or three seeds; it gives NaN
        found = stats.bootstrap(
            (values,),
            np.mean,
            method="BCa",
            confidence_level=1 - LEVEL,
            n_resamples=RESAMPLES,
            random_state=np.random.default_rng(0),
        ).confidence_interval
    return None if math.isnan(found.low + found.high) else (float(found.low), float(found.high))


def sign_flip(values: np.ndarray) -> float:
    """p of the hypothesis that each difference could as well have had the other sign."""
    if not values.any():
        return 1.0
    observed = abs(values.sum())

    def excess(flipped: np.ndarray, axis: int = -1) -> np.ndarray:
        """How much more extreme than what was observed; 0 of a tie, whatever the rounding of its sum."""
        return np.round(np.abs(flipped.sum(axis)) - observed, _DECIMALS)

    return float(
        stats.permutation_test(
            (values,),
            excess,
            permutation_type="samples",
            n_resamples=RESAMPLES,
            alternative="greater",
            random_state=np.random.default_rng(0),
        ).pvalue
    )


def smallest_p(seeds: int) -> float:
    """Of a sign-flip test: all differences on one side, of 2^n flips two are as extreme."""
    return 2.0 / 2**seeds


def holm(ps: Sequence[float]) -> list[float]:
    """Holm 1979: the i-th smallest of m times ``m - i + 1``, not below the ones before it, at most 1."""
    corrected = [0.0] * len(ps)
    before = 0.0
    for rank, place in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        before = max(before, min(1.0, ps[place] * (len(ps) - rank)))
        corrected[place] = before
    return corrected


def against(arms: Mapping[str, Mapping[int, float]], reference: str) -> dict[str, Difference]:
    """Every other arm's difference to the reference, with p corrected over these arms."""
    found = {}
    for name, values in arms.items():
        if name != reference and (difference := paired(values, arms[reference])) is not None:
            found[name] = difference
    tested = [name for name, difference in found.items() if difference.p is not None]
    corrected = holm([found[name].p or 0.0 for name in tested])
    for name, p in zip(tested, corrected, strict=True):
        known = found[name]
        found[name] = Difference(known.seeds, known.mean, known.deviation, known.interval, known.p, p)
    return found


def seeds_needed(deviation: float, effect: float) -> int | None:
    """Pairs after which a t-test at LEVEL finds a difference of ``effect`` with probability POWER; None: very many.

    ``deviation``: of the differences between seeds.
    """
    if deviation == 0:
        return 2
    # The normal approximation is never more than a few pairs too low.
    z = stats.norm.ppf(1 - LEVEL / 2) + stats.norm.ppf(POWER)
    n = max(2, math.floor((z * deviation / effect) ** 2))
    while n < _MOST_SEEDS:
        shift = effect / deviation * math.sqrt(n)
        critical = stats.t.ppf(1 - LEVEL / 2, n - 1)
        power = stats.nct.sf(critical, n - 1, shift) + stats.nct.cdf(-critical, n - 1, shift)
        if power >= POWER:
            return n
        n += 1
    return None
