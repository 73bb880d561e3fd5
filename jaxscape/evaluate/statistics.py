"""Confidence intervals of rates, means and functions of means."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

_Z95 = 1.959963984540054  # the 97.5 % quantile of the standard normal distribution


def wilson_interval(
    percent: Float[np.ndarray, "*shape"] | float, num_prompts: int
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
