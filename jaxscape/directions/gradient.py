"""The direction in which a model unlearns to refuse fastest."""

from dataclasses import dataclass, field
from typing import ClassVar

from jaxscape.directions.base import recipe_name, split_options
from jaxscape.directions.objective import OfLoss, RefusalLoss, Refusals, norm, positive_norm
from jaxscape.directions.storage import Direction
from jaxscape.models.model import Model


@dataclass(frozen=True)
class Gradient(OfLoss):
    """`gradient`: the gradient of the loss of refusal, see `jaxscape.directions.objective`.

    It is scaled to the norm of the weights without norm parameters, which is also the norm of a random direction. So at
    a coordinate c the weights have moved by c times their norm. The loss rises where c is positive.
    """

    refusals: Refusals = field(default_factory=Refusals)

    kind: ClassVar[str] = "gradient"
    usage: ClassVar[str] = "gradient[:PROMPTS[:N[:REFUSAL[:TARGET]]]]"

    @classmethod
    def parse(cls, option: str) -> "Gradient":
        return cls(Refusals.parse(*split_options(option, 4)))

    def __str__(self) -> str:
        return recipe_name(self.kind, self.refusals.options, Refusals().options)

    def make(self, model: Model) -> list[Direction]:
        loss = RefusalLoss(model, self.refusals)
        _, gradient = loss.value_and_gradient(loss.weights)
        return [loss.direction(gradient, norm(loss.weights) / positive_norm(gradient))]
