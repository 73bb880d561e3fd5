"""The worst step of a given size: the one with the highest loss of refusal."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxscape.directions.base import as_number, recipe_name, split_options
from jaxscape.directions.objective import OfLoss, RefusalLoss, Refusals, added, norm, positive_norm, scaled_vector
from jaxscape.directions.storage import Direction
from jaxscape.models.model import Model
from jaxscape.runtime.errors import UserError
from jaxscape.runtime.progress import note


def steepest_step(
    evaluate: Callable[[Any], tuple[float, Any]], zero: Any, radius: float, steps: int
) -> tuple[Any, float]:
    """A step δ with ‖δ‖ ≤ radius at which a function is as large as projected gradient ascent finds it.

    The ascent starts at the end of the gradient, and each of its steps goes along the gradient, normalised to a length
    that falls linearly from the radius to zero; what leaves the ball is scaled back onto its surface (Madry et al.,
    arXiv 1706.06083; with normalised steps in weight space, Wu et al., arXiv 2004.05884). The best step of all is kept,
    so the result is never worse than the end of the gradient.

    Arguments:
        evaluate: the function: its value and gradient at a tree of float32 arrays.
        zero: the zero step, a tree of arrays.
        radius: the radius of the ball, positive.
        steps: number of steps of the ascent; 0 leaves the end of the gradient.

    Returns:
        The step and the function's value there.

    Raises:
        UserError: the gradient at zero is zero, or a gradient is not finite.
    """
    _, gradient = evaluate(zero)
    step = scaled_vector(gradient, radius / positive_norm(gradient))
    best, highest = step, -math.inf
    for number in range(steps + 1):
        value, gradient = evaluate(step)
        if value > highest:
            best, highest = step, value
        if number == steps or not (length := norm(gradient)):
            break
        step = added(step, gradient, radius * (1 - number / steps) / length)
        step = scaled_vector(step, min(1.0, radius / norm(step)))
    return best, highest


@dataclass(frozen=True)
class WorstCase(OfLoss):
    """`worst-case`: the step within a ball of weight space with the highest loss of refusal, see `steepest_step`.

    The worst-case landscape of Chen et al. (arXiv 2505.17646) lies along such a direction. It is scaled so that the
    step itself lies at the coordinate `radius`. If the step lies on the surface of the ball, as it does unless the loss
    has a maximum inside, the direction's norm is that of the weights without norm parameters, as that of a random
    direction.

    Attributes:
        radius: the radius of the ball, in multiples of the norm of the weights without norm parameters.
        steps: number of steps of the ascent; each takes one gradient.
    """

    radius: float = 0.0002
    steps: int = 10
    refusals: Refusals = field(default_factory=Refusals)

    kind: ClassVar[str] = "worst-case"
    usage: ClassVar[str] = "worst-case[:RADIUS[:STEPS[:PROMPTS[:N[:REFUSAL[:TARGET]]]]]]"

    def __post_init__(self) -> None:
        if self.radius <= 0:
            raise UserError(f"The radius of a worst-case direction must be positive, not {self.radius}.")
        if self.steps < 0:
            raise UserError(f"The number of steps of a worst-case direction must be at least 0, not {self.steps}.")

    @classmethod
    def parse(cls, option: str) -> "WorstCase":
        radius, steps, *refusals = split_options(option, 6)
        return cls(
            as_number(radius, "radius", cls.radius),
            as_number(steps, "number of steps", cls.steps),
            Refusals.parse(*refusals),
        )

    def __str__(self) -> str:
        options, defaults = (
            (str(recipe.radius), str(recipe.steps), *recipe.refusals.options) for recipe in (self, WorstCase())
        )
        return recipe_name(self.kind, options, defaults)

    def make(self, model: Model) -> list[Direction]:
        loss = RefusalLoss(model, self.refusals)
        zero = jax.tree.map(jnp.zeros_like, loss.weights)

        def evaluate(step: Any) -> tuple[float, Any]:
            return loss.value_and_gradient(added(loss.weights, step, 1.0))

        step, value = steepest_step(evaluate, zero, self.radius * norm(loss.weights), self.steps)
        note(f"{self}: the loss of refusal is {value:.3g} nats per token at the coordinate {self.radius:g}.")
        return [loss.direction(step, 1 / self.radius)]
