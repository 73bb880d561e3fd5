"""Adaptive grids: which points of a grid are evaluated, in rounds from coarse to fine, and what fills the others.

The first round has the ends of each axis, the model, and points between them. Each further round halves the steps
between points. A point between evaluated ones is evaluated only if the rates there may differ from what linear
interpolation gives: by more than the noise of the rate itself, or because the safety basin ends there. All other points
are filled by linear interpolation, prompt by prompt, so that bootstrap samples of the prompts stay paired.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxscape.evaluate.statistics import wilson_interval
from jaxscape.landscapes.axes import Axis
from jaxscape.runtime.errors import UserError

FIRST_GAP = 0.25  # of the number of steps of an axis: the largest gap between points of the first round
_ROUNDING = 1e-9  # percent; rates that differ by less are the same


_Index = tuple[Any, ...]
"""Where points are on a grid, as `numpy.ix_` gives it."""


@dataclass(frozen=True, eq=False)
class _Round:
    """One round of an adaptive grid.

    Attributes:
        grid: where the points of this round and of all earlier ones are.
        is_new: bool[*grid], whether a point is of this round.
        corners: for each corner of the cell of earlier points around a point, where the corners are, like `grid`.
        weights: float64[corners, *grid], of each corner in the linear interpolation.
    """

    grid: _Index
    is_new: Bool[np.ndarray, " *grid"]
    corners: tuple[_Index, ...]
    weights: Float[np.ndarray, " corners *grid"]


def next_points(
    outcomes: Float[np.ndarray, " rates directions *grid prompts"],
    is_known: Bool[np.ndarray, " directions *grid"],
    axes: Sequence[Axis],
) -> Bool[np.ndarray, " directions *grid"]:
    """The points of direction sets on a grid that are to be evaluated next: those of the first round that misses any.

    The choice depends on the points of earlier rounds alone, so that a resumed run makes the same one.

    Arguments:
        outcomes: 1 where an answer counts in a rate and 0 elsewhere, for each rate that decides; the first one is the
            ASR. Anything at points that are not known.
        is_known: bool[directions, *grid], the points that are evaluated.

    Returns:
        bool[directions, *grid]; all false if nothing is left to evaluate.
    """
    values = outcomes.copy()
    for step in _rounds(axes):
        between = _interpolate(step, values)
        wanted = np.zeros_like(is_known)
        wanted[:, *step.grid] = step.is_new & _may_differ(step, values, between)
        if (wanted & ~is_known).any():
            return wanted & ~is_known
        _fill(step, values, between, is_known)
    return np.zeros_like(is_known)


def interpolated(
    values: Float[np.ndarray, " directions *grid_and_rest"],
    is_known: Bool[np.ndarray, " directions *grid"],
    axes: Sequence[Axis],
) -> Float[np.ndarray, " directions *grid_and_rest"]:
    """Values on the grids of direction sets, in which the points that are not known are filled by linear interpolation
    between known ones.

    Arguments:
        values: float64[directions, *grid, ...].
        is_known: bool[directions, *grid]; the points of the first round are known.
    """
    filled = values.reshape(1, *is_known.shape, -1).copy()
    for step in _rounds(axes):
        _fill(step, filled, _interpolate(step, filled), is_known)
    return filled.reshape(values.shape)


def check_ascending(axes: Sequence[Axis]) -> None:
    """Raise a `UserError` if points cannot be filled between their neighbours, because an axis is not in order."""
    for axis in axes:
        if any(high <= low for low, high in itertools.pairwise(axis.values)):
            raise UserError(f"The values of the axis {axis.name} do not ascend: sort them, or scan without adaptive.")


def first_round(axes: Sequence[Axis]) -> tuple[Axis, ...]:
    """The axes with the values of the first round only. Later rounds seldom have more points, so that a batch which is
    planned for these is well filled."""
    taken = [np.flatnonzero(round_numbers(axis) == 0).tolist() for axis in axes]
    return tuple(
        replace(axis, values=tuple(axis.values[i] for i in places)) for axis, places in zip(axes, taken, strict=True)
    )


def _may_differ(
    step: _Round,
    values: Float[np.ndarray, " rates directions *all prompts"],
    between: Float[np.ndarray, " rates directions *grid prompts"],
) -> Bool[np.ndarray, " directions *grid"]:
    """Whether a rate at a point may differ from the interpolated one by more than the noise, which is half the width
    of its 95 % interval, if it is not outside the range of the rates around it; or whether the safety basin, where the
    ASR is below 100, ends between the points around it."""
    if not step.corners:
        return np.ones(between.shape[1:-1], bool)
    corners = np.stack([100 * values[_all(corner)].mean(axis=-1) for corner in step.corners])
    middle = 100 * between.mean(axis=-1)
    low, high = wilson_interval(middle, values.shape[-1])
    differs = (np.abs(corners - middle).max(axis=0) > (high - low) / 2 + _ROUNDING).any(axis=0)
    in_basin = corners[:, 0] < 100 - _ROUNDING
    return np.asarray(differs | (in_basin.any(axis=0) & ~in_basin.all(axis=0)))


def _interpolate(
    step: _Round, values: Float[np.ndarray, " rates directions *all rest"]
) -> Float[np.ndarray, " rates directions *grid rest"]:
    """What linear interpolation between earlier points gives at the points of a round; at earlier points, their own
    values."""
    if not step.corners:
        return np.asarray(values[_all(step.grid)])
    parts = zip(step.corners, step.weights, strict=True)
    # A weight of 0 is left out, as NaN would not be.
    terms = [np.where(weight[..., None] > 0, values[_all(corner)] * weight[..., None], 0.0) for corner, weight in parts]
    return np.asarray(np.sum(terms, axis=0))


def _all(index: _Index) -> _Index:
    """The same points for each rate and each direction set."""
    return (slice(None), slice(None), *index)


def _fill(
    step: _Round,
    values: Float[np.ndarray, " rates directions *all rest"],
    between: Float[np.ndarray, " rates directions *grid rest"],
    is_known: Bool[np.ndarray, " directions *all"],
) -> None:
    """Put what interpolation gives at those points of a round that are not known."""
    is_filled = step.is_new & ~is_known[:, *step.grid]
    values[_all(step.grid)] = np.where(is_filled[..., None], between, values[_all(step.grid)])


def _rounds(axes: Sequence[Axis]) -> Iterator[_Round]:
    """The rounds of a grid, from coarse to fine."""
    rounds = [round_numbers(axis) for axis in axes]
    for number in range(1 + max(numbers.max() for numbers in rounds)):
        taken = [np.flatnonzero(numbers <= number) for numbers in rounds]
        earlier = [np.flatnonzero(numbers < number) for numbers in rounds]
        grid = np.ix_(*taken)
        is_new = np.ones(tuple(map(len, taken)), bool)
        if number == 0:
            yield _Round(grid, is_new, (), np.ones((0, *is_new.shape)))
            continue
        is_new[np.ix_(*[np.isin(here, before) for here, before in zip(taken, earlier, strict=True)])] = False
        sides = [_between(axis, *pair) for axis, pair in zip(axes, zip(earlier, taken, strict=True), strict=True)]
        corners = tuple(itertools.product(*[(near, far) for near, far, _ in sides]))
        weights = itertools.product(*[(1 - fraction, fraction) for _, _, fraction in sides])
        yield _Round(
            grid,
            is_new,
            tuple(np.ix_(*corner) for corner in corners),
            np.stack([math.prod(np.ix_(*parts)) for parts in weights]),
        )


def _between(
    axis: Axis, earlier: Int[np.ndarray, " earlier"], taken: Int[np.ndarray, " points"]
) -> tuple[Int[np.ndarray, " points"], Int[np.ndarray, " points"], Float[np.ndarray, " points"]]:
    """For each of the points `taken` of an axis, the earlier points on its two sides, and its distance from the first
    as a fraction of their distance. An earlier point is on both of its own sides."""
    near = earlier[np.searchsorted(earlier, taken, side="right") - 1]
    far = earlier[np.searchsorted(earlier, taken)]
    values = np.array(axis.values, np.float64)
    length = values[far] - values[near]
    return near, far, np.divide(values[taken] - values[near], length, out=np.zeros(len(taken)), where=length != 0)


def round_numbers(axis: Axis) -> Int[np.ndarray, " values"]:
    """For each value of an axis, the number of the round in which it is first looked at."""
    size, origin = len(axis.values), int(np.argmin(np.abs(axis.values)))
    numbers = np.zeros(size, int)
    known, number = sorted({0, origin, size - 1}), 0
    while gaps := [(low, high) for low, high in itertools.pairwise(known) if high - low > 1]:
        if max(high - low for low, high in gaps) <= math.ceil(FIRST_GAP * (size - 1)):
            number += 1
        # The middle of an odd gap is rounded towards the model, so that both sides of it are treated alike.
        middles = [(low + high) // 2 if low >= origin else -(-(low + high) // 2) for low, high in gaps]
        numbers[middles] = number
        known = sorted([*known, *middles])
    return numbers
