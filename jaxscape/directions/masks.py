"""Masks of safety-critical weights: those that matter for refusing and not for answering."""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxscape.directions.base import (
    Recipe,
    as_number,
    check_no_option,
    check_parts,
    exact_text,
    recipe_name,
    split_options,
)
from jaxscape.directions.examples import DEFAULT_SETS, PromptSets, Texts
from jaxscape.directions.importance import layer_matrices, snip_scores, wanda_scores
from jaxscape.directions.storage import Direction, dense, zero_tensor
from jaxscape.models.checkpoint import Params, named_leaves, tree_of
from jaxscape.models.model import Model
from jaxscape.runtime.errors import UserError

SCORES = {"snip": snip_scores, "wanda": wanda_scores}


@dataclass(frozen=True)
class Mask:
    """`mask:snip|wanda[:P[:Q]]`: pruning of the weights that are critical for safety (Wei et al., arXiv 2402.05162).

    The weights are the top P percent by their importance for the model's own refusals of harmful prompts, without the
    top Q percent by their importance for its own answers to harmless prompts. They are zero at coordinate 1. Only the
    matrices of the layers are considered. As in the authors' program, SNIP scores are compared within each matrix, and
    Wanda scores within each row.

    Attributes:
        score: how importance is scored, see `jaxscape.directions.importance`.
        safety, utility: P and Q, in percent; Q is P if it is not given.
        sets: the prompts.
    """

    score: str
    safety: float = 3.0
    utility: float = 3.0
    sets: PromptSets = DEFAULT_SETS

    kind: ClassVar[str] = "mask"
    usage: ClassVar[str] = "mask:snip|wanda[:P[:Q[:HARMFUL,HARMLESS[:N]]]]"
    is_interpolation: ClassVar[bool] = False
    has_control: ClassVar[bool] = True
    axis_radius: ClassVar[float] = 1.0
    count: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.score not in SCORES or not (0 < self.safety <= 100 and 0 <= self.utility <= 100):
            raise UserError(
                f"There is no direction {self}: write {self.usage}, with P and Q in percent, for example mask:snip:3:5."
            )

    @classmethod
    def parse(cls, option: str) -> "Mask":
        score, safety, utility, *sets = split_options(option, 5)
        top = as_number(safety, "percentage of safety", cls.safety)
        return cls(score, top, as_number(utility, "percentage of utility", top), PromptSets.parse(*sets))

    def __str__(self) -> str:
        utility = "" if self.utility == self.safety else exact_text(self.utility)
        options = (exact_text(self.safety), utility, *self.sets.options)
        return recipe_name(f"{self.kind}:{self.score}", options, (exact_text(Mask.safety), "", *DEFAULT_SETS.options))

    def made_from(self, model: Model) -> tuple[Texts, Texts]:
        """The token ids of the prompts; see `jaxscape.directions.base.Recipe`."""
        return self.sets.prompts(model, 0, self.sets.number)

    def make(self, model: Model) -> list[Direction]:
        masks, matrices, shardings = (
            named_leaves(self.mask(model)),
            layer_matrices(model),
            named_leaves(model.shardings),
        )
        direction = {
            name: jnp.where(mask, -matrices[name], 0) if name in matrices else zero_tensor(mask.shape, shardings[name])
            for name, mask in masks.items()
        }
        return [tree_of(direction)]

    def mask(self, model: Model) -> Params:
        """A tree like the parameters, bool: True for the weights that are critical for safety.

        Raises:
            UserError: there are none.
        """
        scores = SCORES[self.score]
        is_by_row = self.score == "wanda"
        safety, utility = scores(model, self.sets.refused(model)), scores(model, self.sets.complied(model))
        masks = {
            name: top(safety[name], self.safety, is_by_row) & ~top(utility[name], self.utility, is_by_row)
            for name in safety
        }
        if not any(bool(mask.any()) for mask in masks.values()):
            raise UserError(
                f"The mask {self} selects no weight: raise the first percentage, which is of safety, or lower the "
                f"second one, which is of utility."
            )
        shardings = named_leaves(model.shardings)
        return tree_of(
            {
                name: masks.get(name, jnp.zeros(leaf.shape, bool, device=shardings[name]))
                for name, leaf in named_leaves(model.params).items()
            }
        )


@dataclass(frozen=True)
class Masked:
    """`masked:[A][MASK]`: direction A in the weights that a mask selects, and zero elsewhere."""

    of: Recipe
    by: Mask

    kind: ClassVar[str] = "masked"
    usage: ClassVar[str] = "masked:[DIRECTION][MASK]"
    is_interpolation: ClassVar[bool] = False
    has_control: ClassVar[bool] = True
    count: ClassVar[int] = 1

    @classmethod
    def compose(cls, parts: tuple[Recipe, ...], option: str) -> "Masked":
        check_parts(cls, parts, 2, 2)
        check_no_option(cls, option)
        of, by = parts
        if not isinstance(by, Mask):
            raise UserError(f"The direction {by} is no mask: write {cls.usage}, with a mask such as {Mask('snip')}.")
        return cls(of, by)

    def __str__(self) -> str:
        return f"{self.kind}:[{self.of}][{self.by}]"

    def make(self, model: Model) -> list[Direction]:
        mask = self.by.mask(model)
        return [jax.tree.map(_selected, mask, direction) for direction in self.of.make(model)]


@jax.jit
def _selected(mask: Bool[Array, "*shape"], tensor: Any) -> Float[Array, "*shape"]:
    return jnp.where(mask, dense(tensor), 0)


@partial(jax.jit, static_argnums=(1, 2))
def top(scores: Float[Array, "out in"], percent: float, is_by_row: bool) -> Bool[Array, "out in"]:
    """The highest scores of a matrix, or of each of its rows: so many percent of them, rounded down."""
    groups = scores if is_by_row else scores.reshape(1, -1)
    count = int(percent / 100 * groups.shape[1])
    if count == 0:
        return jnp.zeros(scores.shape, bool)
    least = jnp.sort(groups, axis=1)[:, -count, None]
    return (groups >= least).reshape(scores.shape)
