"""The principal components of finetunings: the plane that contains most of their paths through weight space."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from jaxscape.directions.base import needs_option
from jaxscape.directions.composed import combine
from jaxscape.directions.path import load_path
from jaxscape.directions.storage import Direction, inner
from jaxscape.models.checkpoint import Params
from jaxscape.models.model import Model
from jaxscape.runtime.errors import UserError


def principal_directions(steps: Sequence[Params], count: int = 2) -> list[Params]:
    """The first principal components of finetuning paths, about their common start (Li et al., arXiv 1712.09913).

    All directions have the same norm, the distance of the farthest step along the first component, so that the axes of
    the plane have the same scale. Their signs make the last step's coordinates non-negative.

    Arguments:
        steps: the difference of each checkpoint from the start, trees like the model's parameters.

    Returns:
        `count` float32 trees.

    Raises:
        UserError: the steps span fewer than `count` dimensions.
    """
    gram = np.array([[inner(a, b) for b in steps] for a in steps])
    values, vectors = np.linalg.eigh(gram)
    values, vectors = values[::-1][:count], vectors[:, ::-1][:, :count]
    if len(steps) < count or values[-1] <= 1e-9 * values[0]:
        raise UserError(
            f"The given checkpoints ({len(steps)}) span fewer than {count} dimensions: give finetunings with more "
            f"epochs, or a second finetuning."
        )
    vectors = vectors * np.where(vectors[-1] < 0, -1, 1)
    scale = np.abs(vectors[:, 0]).max() * np.sqrt(values[0])
    weights = vectors / np.sqrt(values) * scale
    return [combine(list(steps), jnp.asarray(column, jnp.float32)) for column in weights.T]


@dataclass(frozen=True)
class Principal:
    """`principal:RUN[,RUN…]`: the first two principal components of finetunings, which are the axes of a plane."""

    runs: tuple[str, ...]

    def __post_init__(self) -> None:
        if not all(self.runs) or any("," in run for run in self.runs):
            raise UserError(
                f"Cannot use the finetunings {', '.join(map(repr, self.runs))}: give directories without a comma in "
                f"their names."
            )

    kind: ClassVar[str] = "principal"
    usage: ClassVar[str] = "principal:RUN[,RUN…]"
    is_interpolation: ClassVar[bool] = False
    # The directions are scaled so that the path reaches coordinate 1 along the first; the figure has a margin.
    axis_radius: ClassVar[float] = 1.25
    count: ClassVar[int] = 2

    @classmethod
    def parse(cls, option: str) -> "Principal":
        return cls(tuple(needs_option(cls, option).split(",")))

    def __str__(self) -> str:
        return f"{self.kind}:{','.join(self.runs)}"

    def make(self, model: Model) -> list[Direction]:
        return list(principal_directions([step for run in self.runs for step in load_path(run, model)], self.count))
