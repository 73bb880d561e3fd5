"""Confidence intervals of rates, means and functions of means, and tests that may stop early."""

import math
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.special import betaincinv

_Z95 = 1.959963984540054  # the 97.5 % quantile of the standard normal distribution


def wilson_interval(
    percent: Float[np.ndarray, "*shape"] | float | int, num_prompts: int
) -> tuple[Float[np.ndarray, "*shape"], Float[np.ndarray, "*shape"]]:
    """The 95 % Wilson score interval (Wilson, 1927) of a rate in percent that was measured on `num_prompts` prompts.

    Returns:
        The lower and the upper bounds in percent, float64 arrays of the shape of `percent`.
    """
    rate = np.asarray(percent, np.float64) / 100
    spread = _Z95**2 / num_prompts
    centre = (rate + spread / 2) / (1 + spread)
    half = np.sqrt(rate * (1 - rate) * spread + spread**2 / 4) / (1 + spread)
    # At 0 and 100 % one bound is the rate itself; rounding must not move the bound past it.
    low = np.minimum(np.maximum(centre - half, 0), rate)
    high = np.maximum(np.minimum(centre + half, 1), rate)
    return np.asarray(100 * low), np.asarray(100 * high)


class Interval(NamedTuple):
    """A number, and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def bootstrap_interval(
    samples: Float[np.ndarray, "samples columns"],
    statistic: Callable[[Float[np.ndarray, "*resamples columns"]], Float[np.ndarray, "*resamples"]],
    resamples: int = 2000,
) -> Interval:
    """A function of the columns' means, with its 95 % bootstrap percentile interval over samples (Efron, 1979).

    The same samples always give the same interval.

    Arguments:
        statistic: takes means, float64[..., columns].
        resamples: number of bootstrap samples.
    """
    size = len(samples)
    weights = np.random.default_rng(0).multinomial(size, np.full(size, 1 / size), size=resamples) / size
    low, high = np.quantile(statistic(weights @ samples), [0.025, 0.975])
    return Interval(float(statistic(samples.mean(0))), float(low), float(high))


def mean_interval(samples: Float[np.ndarray, " samples"]) -> Interval:
    """The mean of samples, with its bootstrap interval."""
    return bootstrap_interval(samples[:, None], lambda means: means[..., 0])


def clopper_pearson_bound(count: int, total: int, confidence: float = 0.95) -> float:
    """The one-sided lower Clopper-Pearson bound (1934) of a probability: an exact bound, for any number of trials.

    Arguments:
        count: in how many of `total` independent trials the event happened.
        confidence: probability with which the bound lies below the event's probability, at least.
    """
    return float(betaincinv(count, total - count + 1, 1 - confidence)) if count else 0.0


@lru_cache(maxsize=65536)
def more_than(limit: int, happened: int, asked: int, total: int, error: float) -> bool | None:
    """Whether something holds for more than `limit` of `total` things, of which some were asked in random order.

    The decision may be asked for after each answer, and the asking may stop at the first one that is made: over the
    random order, a decision that is ever wrong has at most the probability `error`. It excludes each number of things K
    whose posterior probability under a uniform prior has fallen to `error` times the prior one or less. The prior over
    the posterior probability of the true K is a martingale of mean 1 under sampling without replacement
    (Waudby-Smith and Ramdas, arXiv 2006.04347), so by Ville's inequality it ever reaches 1 / `error` with at most the
    probability `error`.

    Arguments:
        happened: for how many of the `asked` things it holds.
        error: 0 decides only what no further answer can change.

    Returns:
        None while the decision is open. It never is when all things have been asked.
    """
    # posterior(K) = C(K, happened) C(total - K, asked - happened) / C(total + 1, asked + 1); the prior is
    # 1 / (total + 1). Whole numbers and fractions keep the comparison exact.
    least = Fraction(error) * math.comb(total + 1, asked + 1)
    possible = [
        number
        for number in range(total + 1)
        if (total + 1) * math.comb(number, happened) * math.comb(total - number, asked - happened) > least
    ]
    return True if min(possible) > limit else False if max(possible) <= limit else None


def block_size(limit: int, total: int, error: float, least: int = 4) -> int:
    """How many things to ask at a time before `more_than` is asked again.

    Where all answers are alike, as they are nearly everywhere, this size asks the fewest: averaged over points where it
    always holds and points where it never does. Of several sizes that do, the largest takes the fewest rounds.

    Arguments:
        least: the smallest size.
    """
    first = [
        next(n for n in range(total + 1) if more_than(limit, share * n, n, total, error) is not None)
        for share in (0, 1)
    ]

    def asked(size: int) -> int:
        return sum(min(-(-n // size) * size, total) for n in first)

    return min(range(min(least, total), total + 1), key=lambda size: (asked(size), -size))


def sign_flip_test(
    changes: Float[np.ndarray, "samples columns"], resamples: int = 10000
) -> Float[np.ndarray, " columns"]:
    """For each column, the one-sided p-value of the hypothesis that a change is as often up as down by the same size.

    This is a permutation test: the signs of all changes of a sample are flipped together, so that the columns keep
    their dependence. A column's statistic is its sum over the root of its sum of squares. The p-values are those of the
    maximum over the columns (Westfall and Young 1993): however many columns there are, a false alarm in any of them has
    at most the probability that the p-values are compared with. They are never 0 (Phipson and Smyth 2010).

    Arguments:
        resamples: number of random flips.
    """
    norms = np.sqrt((changes**2).sum(axis=0))
    scaled = np.divide(changes, norms, out=np.zeros_like(changes), where=norms > 0)
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size=(resamples, len(changes)))
    highest = (signs @ scaled).max(axis=1)
    reached = highest[:, None] >= scaled.sum(axis=0) - 1e-9  # and not by rounding alone
    return np.asarray((1 + reached.sum(axis=0)) / (1 + resamples))
