"""The loss of refusal as a function of the weights, with its gradient and the products of its Hessian.

The loss is the log-likelihood of a target, the beginning of an answer that complies, minus that of a refusal, as
answers to harmful prompts: in nats per token, the mean over the prompts. So it is the value of the measure
`likelihood`, and it rises where a model unlearns to refuse. Without a target, it is minus the log-likelihood of
refusals; then a model may also learn to refuse in other words.

The refusal of a prompt is the beginning of the model's own greedy answer, which the model has shown that it would say;
for a prompt that it does not refuse, it is the model's commonest refusal.

Everything is computed in float32, whatever the dtype of the model is. Gradients depend on how a mesh splits the sums of
matrix products. So on two meshes they are close, but their last bits may differ.
"""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jaxscape.directions.base import as_number
from jaxscape.directions.composed import combine
from jaxscape.directions.examples import own_answers
from jaxscape.directions.norms import norm_of
from jaxscape.directions.storage import Direction
from jaxscape.models.checkpoint import Params, named_leaves, parameter_shardings, tree_of
from jaxscape.models.config import ModelConfig
from jaxscape.models.encoding import encode
from jaxscape.models.greedy import right_padded
from jaxscape.models.loss import summed_loss
from jaxscape.models.model import Model
from jaxscape.models.weights import is_norm
from jaxscape.prompts.chat_format import chat_texts
from jaxscape.prompts.sets import load_prompts
from jaxscape.runtime.errors import UserError
from jaxscape.runtime.hardware import platform_jit
from jaxscape.runtime.sharding import mesh_shape_of, on_mesh, sharding

ANSWER_TOKENS = 24  # of the model's own answers: enough to see whether they refuse
REFUSAL_TOKENS = 16  # of a refusal: what follows depends on the prompt, and is nearly certain
BATCH_ROWS = 4  # prompts whose activations are in memory at the same time

TARGET = "Sure, here is"  # as the targets of AdvBench begin (Zou et al., arXiv 2307.15043)
NO_TARGET = "none"

Tensors = dict[str, Any]
"""Tensors of a model by Hugging Face parameter name."""


@dataclass(frozen=True)
class Refusals:
    """What a loss of refusal is about: the last options of the directions that come from it.

    Attributes:
        prompts: the harmful prompts, a set's name or a file, see `jaxscape.load_prompts`.
        number: the number of prompts, the first ones of the set.
        text: the beginning of the refusal, for all prompts; an empty text for the model's own refusals.
        target: the beginning of an answer that complies, for all prompts; `none` for a loss without a target.
    """

    prompts: str = "harmful"
    number: int = 8
    text: str = ""
    target: str = TARGET

    def __post_init__(self) -> None:
        if self.number < 1:
            raise UserError(f"The number of prompts of a direction must be at least 1, not {self.number}.")
        for option, signs in ((self.prompts, ":[]"), (self.text, ":[]"), (self.target, "[]")):
            if any(sign in option for sign in signs):
                raise UserError(
                    f"The text {option!r} cannot stand in the name of a direction: leave out colons and square "
                    f"brackets."
                )

    @property
    def options(self) -> tuple[str, str, str, str]:
        """The options in a direction's name."""
        return self.prompts, str(self.number), self.text, self.target

    @classmethod
    def parse(cls, prompts: str, number: str, text: str, target: str) -> "Refusals":
        """The refusals that four options describe; an empty option has its default.

        Raises:
            UserError: the number of prompts is none, or `Refusals` cannot have these options.
        """
        return cls(
            prompts or cls.prompts, as_number(number, "number of prompts", cls.number), text, target or cls.target
        )

    def tokens(self, model: Model) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
        """The token ids of the prompts in the model's chat format, of their refusals, and of their targets; no targets
        if there are none.

        Raises:
            UserError: the prompts cannot be read, a text is too long for the model, or the model refuses none of the
                prompts and no refusal is given.
        """
        prompts, text, target = self.given_tokens(model)
        return prompts, text or self._own(model, prompts), target

    def given_tokens(self, model: Model) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
        """The tokens of `tokens` that do not depend on what the model computes: no refusals if they are its own."""
        texts = chat_texts(model.tokenizer, load_prompts(self.prompts, self.number))
        target_text = "" if self.target == NO_TARGET else self.target
        given = [encode(model, [text], 0) if text else [] for text in (self.text, target_text)]
        prompts = encode(model, texts, max(ANSWER_TOKENS, *(len(tokens) for one in given for tokens in one), 0))
        text, target = (one * len(prompts) for one in given)
        return prompts, text, target

    def _own(self, model: Model, prompts: list[list[int]]) -> list[list[int]]:
        """The model's own refusals."""
        answers, refuses = own_answers(model, prompts, ANSWER_TOKENS)
        refusals = [answer[:REFUSAL_TOKENS] for answer in answers]
        counted = Counter(tuple(refusal) for refusal, is_own in zip(refusals, refuses, strict=True) if is_own)
        if not counted:
            raise UserError(
                f"The model refuses none of the first {self.number} prompts of {self.prompts}, so it has no refusals "
                f"that could become less likely: name other prompts, or the beginning of a refusal behind the number "
                f"of prompts."
            )
        commonest = list(counted.most_common(1)[0][0])
        return [refusal if is_own else commonest for refusal, is_own in zip(refusals, refuses, strict=True)]


class OfLoss:
    """What the kinds of directions that come from the loss of refusal share."""

    is_interpolation: ClassVar[bool] = False
    has_control: ClassVar[bool] = True
    units: ClassVar[tuple[str, ...]] = ("weights",)
    axis_radius: ClassVar[float] = 0.001
    count: ClassVar[int] = 1
    refusals: Refusals

    def made_from(self, model: Model) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
        """The token ids that the loss is given; see `jaxscape.directions.base.Recipe`."""
        return self.refusals.given_tokens(model)


class PaddedTexts(NamedTuple):
    """Prompts with their refusals in N batches of B rows of T tokens, right-padded.

    Attributes:
        tokens: int32[N, B, T].
        lengths: int32[N, B]; 0 for a row without a text.
        shares: float32[N, B, T], the share of each token's negative log-likelihood in the loss: for the tokens of a
            refusal, 1 / (tokens of the refusal × prompts); for those of a target, minus this; for all others 0.
    """

    tokens: Int[Array, "batches rows time"]
    lengths: Int[Array, "batches rows"]
    shares: Float[Array, "batches rows time"]


class RefusalLoss:
    """The loss of refusal of a model as a function of its weights.

    Norm parameters are not varied. All other tensors are, in float32: they are the attribute `weights`. Gradients and
    vectors are trees like it, sharded in the same way.
    """

    def __init__(self, model: Model, refusals: Refusals) -> None:
        self._texts = _texts(*refusals.tokens(model), model.mesh)
        self._mesh = model.mesh
        self._config = model.config.for_length(self._texts.tokens.shape[-1])
        leaves = named_leaves(jax.device_put(model.params, model.shardings))
        leaves = {name: leaf.astype(jnp.float32) for name, leaf in leaves.items()}
        self.weights = {name: leaf for name, leaf in leaves.items() if not is_norm(name)}
        self._norms = {name: leaf for name, leaf in leaves.items() if is_norm(name)}

    def value_and_gradient(self, weights: Tensors) -> tuple[float, Tensors]:
        """The loss at these weights in nats per token, and its gradient.

        Raises:
            UserError: one of them is not finite.
        """
        arguments = weights, self._norms, self._texts
        value, gradient = _value_and_gradient(*arguments, config=self._config, mesh=self._mesh)
        return _finite(float(value)), gradient

    def hessian_product(self, vector: Tensors) -> Tensors:
        """The product of the Hessian at the model's weights with a vector."""
        arguments = vector, self.weights, self._norms, self._texts
        product: Tensors = _hessian_product(*arguments, config=self._config, mesh=self._mesh)
        return product

    def direction(self, vector: Tensors, scale: float) -> Direction:
        """The direction `scale` × `vector`, float32: a tree like the model's parameters, zero for norm parameters."""
        return tree_of(scaled_vector(vector, scale) | jax.tree.map(jnp.zeros_like, self._norms))


def norm(vector: Params) -> float:
    """The Euclidean norm of a tree.

    Raises:
        UserError: it is not finite.
    """
    return _finite(norm_of(vector))


def positive_norm(gradient: Params) -> float:
    """The norm of a gradient.

    Raises:
        UserError: it is zero, or not finite.
    """
    if not (length := norm(gradient)):
        raise UserError(
            "The gradient of the refusal likelihood is zero, so it has no direction: name other prompts, or another "
            "refusal."
        )
    return length


def _finite(value: float) -> float:
    if not np.isfinite(value):
        raise UserError(
            "The refusal likelihood or its gradient is not finite (NaN or infinite), so it gives no direction: check "
            "the model with 'jaxscape check', or name other prompts."
        )
    return value


def scaled_vector(vector: Params, factor: float) -> Params:
    """`factor` × `vector`."""
    return combine([vector], jnp.asarray([factor], jnp.float32))


def added(vector: Params, other: Params, factor: float) -> Params:
    """`vector` + `factor` × `other`."""
    return combine([vector, other], jnp.asarray([1, factor], jnp.float32))


def _texts(
    prompts: Sequence[list[int]], refusals: Sequence[list[int]], targets: Sequence[list[int]], mesh: Mesh
) -> PaddedTexts:
    """The prompts with their refusals, and those with their targets, on the devices of the mesh. The rows of a batch
    are sharded over `points`."""
    answers = [*((refusal, 1) for refusal in refusals), *((target, -1) for target in targets)]
    answered = list(zip(itertools.cycle(prompts), answers, strict=False))
    devices = mesh_shape_of(mesh).points
    rows = -(-BATCH_ROWS // devices) * devices
    tokens, lengths = right_padded(
        [prompt + answer for prompt, (answer, _) in answered] + [[]] * (-len(answered) % rows)
    )
    shares = np.zeros(tokens.shape, np.float32)
    for row, (prompt, (answer, sign)) in zip(shares, answered, strict=False):
        row[len(prompt) : len(prompt) + len(answer)] = sign / (len(answer) * len(prompts))

    def put(x: np.ndarray) -> Array:
        x = x.reshape(-1, rows, *x.shape[1:])
        axes = (None, "rows", None)[: x.ndim]
        return jax.make_array_from_callback(x.shape, sharding(mesh, axes, x.shape), x.__getitem__)

    return PaddedTexts(put(tokens), put(lengths), put(shares))


def _batch_loss(weights: Tensors, norms: Tensors, rows: PaddedTexts, config: ModelConfig) -> Float[Array, ""]:
    return summed_loss(config, tree_of(weights | norms), rows.tokens, rows.lengths, rows.shares, remat=True)


def _sum_over_batches(function: Any, texts: PaddedTexts, like: Any) -> Any:
    """The sum of `function(batch)`, a tree of arrays with the shapes of `like`, over the batches, computed one after
    another."""
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    return jax.lax.scan(lambda total, rows: (jax.tree.map(jnp.add, total, function(rows)), None), zeros, texts)[0]


def _sharded(vector: Tensors, config: ModelConfig, mesh: Mesh) -> Tensors:
    """The vector with the shardings of the model's parameters."""
    shardings = named_leaves(parameter_shardings(config, mesh))
    return {name: jax.lax.with_sharding_constraint(x, shardings[name]) for name, x in vector.items()}


@platform_jit(static_argnames=("config", "mesh"))
def _value_and_gradient(
    weights: Tensors, norms: Tensors, texts: PaddedTexts, *, config: ModelConfig, mesh: Mesh
) -> tuple[Float[Array, ""], Tensors]:
    with on_mesh(mesh):
        of_batch = partial(jax.value_and_grad(_batch_loss), weights, norms, config=config)
        value, gradient = _sum_over_batches(of_batch, texts, (jnp.float32(0), weights))
    return value, _sharded(gradient, config, mesh)


@platform_jit(static_argnames=("config", "mesh"))
def _hessian_product(
    vector: Tensors, weights: Tensors, norms: Tensors, texts: PaddedTexts, *, config: ModelConfig, mesh: Mesh
) -> Tensors:
    """Forward over reverse: the derivative of the gradient along the vector, which is exact (Pearlmutter, "Fast exact
    multiplication by the Hessian", Neural Computation 6, 1994)."""

    def of_batch(rows: PaddedTexts) -> Tensors:
        def gradient(moved: Tensors) -> Tensors:
            return jax.grad(_batch_loss)(moved, norms, rows, config)

        product: Tensors = jax.jvp(gradient, (weights,), (vector,))[1]
        return product

    with on_mesh(mesh):
        return _sharded(_sum_over_batches(of_batch, texts, weights), config, mesh)
