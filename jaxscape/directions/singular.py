"""Singular directions: the ranks of each matrix that matter for refusing and not for answering (ActSVD)."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import numpy as np
from jaxtyping import Float

from jaxscape.directions.base import needs_option, recipe_name, split_options
from jaxscape.directions.examples import DEFAULT_SETS, Answered, PromptSets, Texts
from jaxscape.directions.storage import Direction, factored, zero_tensor
from jaxscape.models.activations import input_moments
from jaxscape.models.checkpoint import named_leaves, tree_of
from jaxscape.models.model import Model
from jaxscape.models.weights import is_layer_matrix
from jaxscape.runtime.errors import UserError


@dataclass(frozen=True)
class Singular:
    """`singular:RANK[:FREE]`: removal of the ranks that are critical for safety (ActSVD; Wei et al., arXiv 2402.05162).

    For a matrix W and its inputs X over the tokens of some answers, the important ranks are the left singular vectors
    of W X with the largest singular values. Let Πˢ project on the top RANK of them for the model's own refusals of
    harmful prompts. At coordinate 1, each matrix of the layers is W − Πˢ W. With FREE, the matrix becomes
    W − (I − Πᵘ) Πˢ W, where Πᵘ projects on the ranks that are important for the model's own answers to harmless
    prompts: all but the FREE least important ones. So nothing is removed that answers need.

    The authors take matrix after matrix, each with the inputs that it has after the earlier ones were changed. A
    direction is one change of all matrices, so the inputs here are those of the unperturbed model. The decompositions
    are computed on the host, in a time that grows with the cube of a matrix's smaller side.

    Attributes:
        rank, free: RANK and FREE; FREE is None if nothing is kept for the harmless prompts.
        sets: the prompts.
    """

    rank: int
    free: int | None = None
    sets: PromptSets = DEFAULT_SETS

    kind: ClassVar[str] = "singular"
    usage: ClassVar[str] = "singular:RANK[:FREE[:HARMFUL,HARMLESS[:N]]]"
    is_interpolation: ClassVar[bool] = False
    has_control: ClassVar[bool] = True
    axis_radius: ClassVar[float] = 1.0
    count: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.rank < 1 or self.free == 0:
            raise UserError(f"The direction {self} removes nothing: give ranks of at least 1.")

    @classmethod
    def parse(cls, option: str) -> "Singular":
        rank, free, *sets = split_options(needs_option(cls, option), 4)
        if not rank.isdecimal() or not (free or "1").isdecimal():
            raise UserError(
                f"Cannot read the direction 'singular:{option}': write {cls.usage}, with whole numbers, for example "
                f"singular:8 or singular:8:64."
            )
        return cls(int(rank), int(free) if free else None, PromptSets.parse(*sets))

    def __str__(self) -> str:
        free = "" if self.free is None else str(self.free)
        return recipe_name(f"{self.kind}:{self.rank}", (free, *self.sets.options), ("", *DEFAULT_SETS.options))

    def made_from(self, model: Model) -> tuple[Texts, Texts]:
        """The token ids of the prompts; see `jaxscape.directions.base.Recipe`."""
        return self.sets.prompts(model, 0, self.sets.number)

    def rank_in(self, model: Model) -> int:
        """The rank of each matrix; see `jaxscape.directions.base.Recipe`."""
        return self.rank

    def make(self, model: Model) -> list[Direction]:
        weights, shardings = named_leaves(model.params), named_leaves(model.shardings)
        names = [name for name, weight in weights.items() if is_layer_matrix(name, weight.shape)]
        narrow = min(names, key=lambda name: min(weights[name].shape))
        if self.rank > min(weights[narrow].shape):
            raise UserError(
                f"The direction {self} removes {self.rank} ranks of each matrix, but {narrow} has only "
                f"{min(weights[narrow].shape)}: give a lower rank."
            )
        safety = _moments(model, self.sets.refused(model))
        utility = _moments(model, self.sets.complied(model)) if self.free is not None else {}
        direction = {}
        for name, weight in weights.items():
            if name not in names:
                direction[name] = zero_tensor(weight.shape, shardings[name])
                continue
            matrix, module = np.asarray(jax.device_get(weight), np.float64), name.removesuffix(".weight")
            removed = left_singular_vectors(matrix, safety[module])[:, : self.rank]
            left = removed
            if self.free is not None:
                useful = left_singular_vectors(matrix, utility[module])
                useful = useful[:, : max(0, min(matrix.shape) - self.free)]
                left = removed - useful @ (useful.T @ removed)
            right = removed.T @ matrix
            direction[name] = factored((-left).astype(np.float32), right.astype(np.float32), shardings[name])
        return [tree_of(direction)]


def _moments(model: Model, answered: Answered) -> dict[str, Float[np.ndarray, "in in"]]:
    moments: dict[str, np.ndarray] = jax.device_get(input_moments(model, answered.texts, answered.begins, is_full=True))
    return moments


def left_singular_vectors(
    weight: Float[np.ndarray, "out in"], moment: Float[np.ndarray, "in in"]
) -> Float[np.ndarray, "out rank"]:
    """The left singular vectors of W X with the largest singular values first, float64[out, min(out, in)].

    Vectors whose singular value is zero up to rounding are zero.

    Arguments:
        moment: X Xᵀ.
    """
    moment = moment.astype(np.float64)
    if weight.shape[0] <= weight.shape[1]:
        squares, vectors = np.linalg.eigh(weight @ moment @ weight.T)
    else:  # W X has the singular vectors of W R, where R Rᵀ = X Xᵀ, and those are found from the smaller side
        values, axes = np.linalg.eigh(moment)
        product = weight @ (axes * np.sqrt(np.maximum(values, 0)))
        squares, rights = np.linalg.eigh(product.T @ product)
        vectors = product @ rights / np.sqrt(np.maximum(squares, np.finfo(np.float64).tiny))
    kept = squares > len(squares) * np.finfo(np.float32).eps * squares[-1]  # moments are summed in float32
    return np.asarray(np.where(kept, vectors, 0)[:, ::-1])
