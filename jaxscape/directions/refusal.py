"""The refusal direction: the one direction of the residual stream that mediates refusal, as a change of the weights."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxscape.directions.base import recipe_name, split_options
from jaxscape.directions.examples import ANSWER_TOKENS, DEFAULT_SETS, PromptSets, Texts, own_answers
from jaxscape.directions.point import materialise
from jaxscape.directions.storage import Direction, Factored, factored, zero_tensor
from jaxscape.models.activations import next_token_logits, residual_stream
from jaxscape.models.checkpoint import Params, named_leaves, tree_of
from jaxscape.models.model import Model
from jaxscape.models.weights import EMBEDDING
from jaxscape.runtime.errors import UserError
from jaxscape.runtime.progress import note

MAX_POSITIONS = 8  # at most so many of the last tokens, which all prompts share, are candidates
LAST_LAYERS = 0.2  # the part of the layers, the last ones, that are no candidates, as in the paper
NUM_CANDIDATES = 8  # candidates that are ablated
MAX_DAMAGE = 0.1  # nats, as in the paper


@dataclass(frozen=True)
class Refusal:
    """`refusal[:LAYER[:HARMFUL,HARMLESS[:N]]]`: ablation of the refusal direction (Arditi et al., arXiv 2406.11717).

    The refusal direction r is the difference between the mean activations on the first N prompts of two sets, one
    harmful and one harmless, in the residual stream before one layer and at one token behind the user's words,
    normalised. Each matrix W that writes to the residual stream (the embedding, the output projections of attention and
    of the feed-forward layer, and their biases) becomes W − r rᵀ W at coordinate 1, where no layer writes along r any
    more. Each matrix changes by one of rank one.

    - Where a family normalises what a layer has computed before it is written (Gemma 2 and 3, OLMo 2), the matrix is
      made orthogonal to r times the norm's weights instead, so that nothing along r comes out of the norm.
    - A factor of the embeddings, as in Gemma, changes nothing, because it is one number. A tied embedding is one
      tensor, so the output head does not read along r any more either; so it is in the authors' program.

    Attributes:
        layer, position: the activations are those before the layer with this number, counted from 0, at this token of
            each prompt, counted from the end: −1 is the last one. If the layer is None, `choose` chooses both.
        sets: the prompts.
        unit: r, float32[dim]; None if it was not computed yet.
    """

    layer: int | None = None
    position: int = -1
    sets: PromptSets = DEFAULT_SETS
    unit: Float[np.ndarray, " dim"] | None = field(default=None, repr=False, compare=False)

    kind: ClassVar[str] = "refusal"
    usage: ClassVar[str] = "refusal[:LAYER[@POSITION][:HARMFUL,HARMLESS[:N]]]"
    is_interpolation: ClassVar[bool] = False
    has_control: ClassVar[bool] = True
    axis_radius: ClassVar[float] = 1.0
    count: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.position >= 0:
            raise UserError(f"Tokens are counted from the end, from -1, so there is no token {self.position}.")

    @classmethod
    def parse(cls, option: str) -> "Refusal":
        where, *sets = split_options(option, 3)
        match = re.fullmatch(r"(?:auto)?|(\d+)(?:@(-[1-9]\d*))?", where)
        if match is None:
            raise UserError(
                f"Cannot read the layer {where!r} of a refusal direction: write {cls.usage}, for example refusal:14, "
                f"refusal:14@-5 or refusal:auto:harmful,harmless:32."
            )
        layer = None if match[1] is None else int(match[1])
        return cls(layer, int(match[2] or cls.position), PromptSets.parse(*sets))

    def __str__(self) -> str:
        return recipe_name(self.kind, self._options, Refusal()._options)

    @property
    def _options(self) -> tuple[str, ...]:
        where = "auto" if self.layer is None else f"{self.layer}" + (f"@{self.position}" if self.position != -1 else "")
        return where, *self.sets.options

    def make(self, model: Model) -> list[Direction]:
        unit = self.settled(model).unit
        assert unit is not None
        return [ablation(model, unit)]

    def made_from(self, model: Model) -> tuple[Texts, Texts]:
        """The token ids of the prompts; see `jaxscape.directions.base.Recipe`."""
        return self.sets.prompts(model, 0, self.sets.number)

    def rank_in(self, model: Model) -> int | None:
        """1, unless biases are moved too; see `jaxscape.directions.base.Recipe`."""
        weights = named_leaves(model.params)
        return 1 if all(weights[name].ndim == 2 for name in _norms_of_writers(model) if name in weights) else None

    def settled(self, model: Model) -> "Refusal":
        """This direction with its layer and position, and with its r."""
        if self.unit is not None:
            return self
        chosen, unit = self.choose(model) if self.layer is None else (self, self.unit_vector(model))
        return replace(chosen, unit=unit)

    def unit_vector(self, model: Model) -> Float[np.ndarray, " dim"]:
        """The refusal direction in the residual stream, r: float32[dim].

        Raises:
            UserError: the model has no such layer, a prompt no such token, or the mean activations do not differ.
        """
        assert self.layer is not None
        if self.layer >= model.config.num_layers:
            raise UserError(
                f"The direction {self} needs the layer {self.layer}, but {model.name} has the layers 0 to "
                f"{model.config.num_layers - 1}."
            )
        harmful, harmless = self.sets.prompts(model, 0, self.sets.number)
        if -self.position > min(map(len, (*harmful, *harmless))):
            raise UserError(f"The direction {self} needs the token {self.position} of each prompt, but one is shorter.")
        units = mean_difference(
            *(residual_stream(model, texts, -self.position)[:, [self.layer], :1] for texts in (harmful, harmless))
        )
        if not units.any():
            raise UserError(
                f"The activations of the harmful and harmless prompts do not differ at the layer {self.layer} and the "
                f"token {self.position}: choose another layer or token for {self}."
            )
        return units[0, 0]

    def choose(self, model: Model) -> tuple["Refusal", Float[np.ndarray, " dim"]]:
        """This direction with its layer and position, chosen by what ablation does, as in the paper; and its r.

        The candidates are the tokens behind the user's words, before each layer but the last fifth. Of each layer, the
        token is taken at which N / 4 further prompts of the two sets lie farthest apart along r, and of all layers the
        eight where they lie farthest apart. Each of these directions is ablated. The refusal score is then the mean
        log-odds of the model's refusals at the first token of its answers to the harmful prompts; the damage is the
        mean KL divergence of that token from the unperturbed model's on the harmless prompts. The direction with the
        lowest score is chosen whose damage is at most 0.1 nats or, because small models do not reach that, 1.5 times
        the least damage of all that bring the score below 0.

        Raises:
            UserError: the model refuses none of the further harmful prompts.
        """
        number = self.sets.number
        if number < 4:
            raise UserError(f"The layer of {self} is chosen on a fourth of the prompts: give at least 4, or a layer.")
        train = self.sets.prompts(model, 0, number)
        held_out = self.sets.prompts(model, number, number + number // 4)
        count = min(MAX_POSITIONS, max(1, common_suffix([*train[0], *train[1]])))
        units = mean_difference(*(residual_stream(model, texts, count) for texts in train))
        apart = separation(units, *(residual_stream(model, texts, count) for texts in held_out))
        last = max(2, int(model.config.num_layers * (1 - LAST_LAYERS)))
        layers = sorted(range(1, last), key=lambda layer: -apart[layer].max())[:NUM_CANDIDATES]
        places = [(layer, int(apart[layer].argmax()) - count) for layer in layers]

        trial, params = _Trial.of(model, *held_out, self), None
        outcomes: dict[tuple[int, int], Outcome] = {}
        for layer, position in places:
            direction = ablation(model, units[layer, position])
            params = materialise(model.params, [direction], np.ones(1, np.float32), params)
            outcomes[layer, position] = trial.outcome(params)
        place = best_place(outcomes)
        chosen = replace(self, layer=place[0], position=place[1])
        note(
            f"{self}: chose {chosen} on {len(held_out[0])} further prompts of each set; there the log-odds of refusal "
            f"at the first token fall from {trial.unperturbed_score:.2f} to {outcomes[place].score:.2f}, and the KL "
            f"divergence on harmless prompts is {outcomes[place].damage:.2f} nats."
        )
        return chosen, units[place]


def mean_difference(
    harmful: Float[np.ndarray, "texts *place dim"], harmless: Float[np.ndarray, "others *place dim"]
) -> Float[np.ndarray, "*place dim"]:
    """The difference of the means over texts, normalised, float32; 0 where the means do not differ."""
    difference = harmful.mean(0, dtype=np.float64) - harmless.mean(0, dtype=np.float64)
    norm = np.linalg.norm(difference, axis=-1, keepdims=True)
    return (difference / np.where(norm > 0, norm, 1)).astype(np.float32)


def separation(
    units: Float[np.ndarray, "*place dim"],
    harmful: Float[np.ndarray, "texts *place dim"],
    harmless: Float[np.ndarray, "others *place dim"],
) -> Float[np.ndarray, "*place"]:
    """How far apart two sets of activations lie along unit vectors: the difference of their means over the root mean
    square of their standard deviations (Cohen's d); 0 where neither varies."""
    ours, others = ((texts * units).sum(-1, dtype=np.float64) for texts in (harmful, harmless))
    deviation = np.sqrt((ours.var(0) + others.var(0)) / 2)
    return np.asarray((ours.mean(0) - others.mean(0)) / np.where(deviation > 0, deviation, np.inf))


def common_suffix(texts: Texts) -> int:
    """How many tokens all texts end with."""
    ends = zip(*(reversed(text) for text in texts), strict=False)
    return next((i for i, tokens in enumerate(ends) if len(set(tokens)) > 1), min(map(len, texts)))


class Outcome(NamedTuple):
    """What ablated weights do: the refusal score and the damage, see `Refusal.choose`."""

    score: float
    damage: float


def best_place(outcomes: Mapping[tuple[int, int], Outcome]) -> tuple[int, int]:
    """The layer and position of the lowest refusal score at a small damage, see `Refusal.choose`."""
    ends = {place: outcome for place, outcome in outcomes.items() if outcome.score < 0} or outcomes
    most = max(MAX_DAMAGE, 1.5 * min(outcome.damage for outcome in ends.values()))
    return min((place for place in ends if ends[place].damage <= most), key=lambda place: ends[place].score)


def ablation(model: Model, unit: Float[np.ndarray, " dim"]) -> Direction:
    """The change of the weights after which nothing is written to the residual stream along a unit vector."""
    weights, shardings = named_leaves(model.params), named_leaves(model.shardings)
    norms = _norms_of_writers(model)

    def tensor(name: str, weight: Float[Array, "*shape"]) -> Factored:
        if name not in norms:
            return zero_tensor(weight.shape, shardings[name])
        vector, norm = jnp.asarray(unit), norms[name]
        if norm is not None:
            vector = vector * (jnp.asarray(weights[norm], jnp.float32) + model.config.norm_offset)
            vector = vector / jnp.linalg.norm(vector)
        removed = _removed_from_rows if name == EMBEDDING else _removed
        left, right = removed(jax.device_put(weight, shardings[name]), vector)
        return factored(left, right, shardings[name])

    return tree_of({name: tensor(name, weight) for name, weight in weights.items()})


def _norms_of_writers(model: Model) -> dict[str, str | None]:
    """For each parameter that writes to the residual stream, the weights of the norm that follows it; None without
    one."""
    _, after_attention, _, after_mlp = model.config.norms
    norms: dict[str, str | None] = {EMBEDDING: None}
    for layer in range(model.config.num_layers):
        block = f"model.layers.{layer}"
        for module, norm in (("self_attn.o_proj", after_attention), ("mlp.down_proj", after_mlp)):
            weights = None if norm is None else f"{block}.{norm}.weight"
            norms |= {f"{block}.{module}.{kind}": weights for kind in ("weight", "bias")}
    return norms


@jax.jit
def _removed(
    weight: Float[Array, "dim *in"], unit: Float[Array, " dim"]
) -> tuple[Float[Array, "dim 1"], Float[Array, "1 *in"]]:
    """The factors of −r rᵀ W."""
    along = jnp.tensordot(unit, weight.astype(jnp.float32), 1, precision=jax.lax.Precision.HIGHEST)
    return -unit[:, None], along[None]


@jax.jit
def _removed_from_rows(
    weight: Float[Array, "vocab dim"], unit: Float[Array, " dim"]
) -> tuple[Float[Array, "vocab 1"], Float[Array, "1 dim"]]:
    """The factors of −W r rᵀ."""
    along = jnp.tensordot(weight.astype(jnp.float32), unit, 1, precision=jax.lax.Precision.HIGHEST)
    return -along[:, None], unit[None]


@dataclass(frozen=True, eq=False)
class _Trial:
    """Prompts on which ablated weights are tried.

    Attributes:
        refusal_tokens: the tokens with which the model's own refusals begin.
        unperturbed: the log-probabilities of the unperturbed model's first token on the harmless prompts.
    """

    model: Model
    harmful: Texts
    harmless: Texts
    refusal_tokens: list[int]
    unperturbed: Float[np.ndarray, "prompts vocab"]
    unperturbed_score: float

    @classmethod
    def of(cls, model: Model, harmful: Texts, harmless: Texts, recipe: Refusal) -> "_Trial":
        answers, refuses = own_answers(model, harmful, ANSWER_TOKENS)
        tokens = sorted({answer[0] for answer, refused in zip(answers, refuses, strict=True) if refused})
        if not tokens:
            raise UserError(
                f"The model refuses none of {len(harmful)} prompts of {recipe.sets.harmful}, so the layer of {recipe} "
                f"cannot be chosen by what ends refusal: give a layer, for example {replace(recipe, layer=1)}."
            )
        unperturbed = log_softmax(next_token_logits(model, harmless))
        score = refusal_score(log_softmax(next_token_logits(model, harmful)), tokens)
        return cls(model, harmful, harmless, tokens, unperturbed, score)

    def outcome(self, params: Params) -> Outcome:
        score = refusal_score(log_softmax(next_token_logits(self.model, self.harmful, params)), self.refusal_tokens)
        moved = log_softmax(next_token_logits(self.model, self.harmless, params))
        return Outcome(score, float((np.exp(self.unperturbed) * (self.unperturbed - moved)).sum(1).mean()))


def refusal_score(log_probabilities: Float[np.ndarray, "prompts vocab"], tokens: Sequence[int]) -> float:
    """The mean log-odds of some first tokens, log p − log(1 − p), where p is the probability of all of them together
    (Arditi et al., arXiv 2406.11717)."""
    probability = np.clip(np.exp(log_probabilities[:, list(tokens)]).sum(1), 1e-8, 1 - 1e-8)
    return float(np.log(probability / (1 - probability)).mean())


def log_softmax(logits: Float[np.ndarray, "prompts vocab"]) -> Float[np.ndarray, "prompts vocab"]:
    """Log-probabilities, float64."""
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(1, keepdims=True)))
