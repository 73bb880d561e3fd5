"""Log-likelihoods of given answers, and logits after prompts: what a forward pass says, without decoding.

Texts of any length are computed in programs of few shapes. What all prompts begin with is computed once. The rest of
each text is packed with others into lines, as in `jaxscape.engine.layout`, and lines of one width make up a batch. The
output head is applied only to tokens whose prediction is asked for, a fixed number at a time, so that no array of
vocabulary size is larger than that.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32, Int

from jaxscape.engine.batching import bucket, common_prefix
from jaxscape.engine.layout import assign_lines, line_width
from jaxscape.engine.platforms import platform_of
from jaxscape.models.cache import Context, KVCache
from jaxscape.models.checkpoint import Params
from jaxscape.models.config import ModelConfig
from jaxscape.models.decoder import head, hidden_states
from jaxscape.models.model import Model
from jaxscape.runtime.errors import UserError
from jaxscape.runtime.hardware import platform_jit
from jaxscape.runtime.sharding import constrain, mesh_shape_of, on_mesh, replicated

Tokens = Sequence[int]

# Tokens in a line; a longer text gets a line of the next power of two. A text of 80 tokens leaves a third of a narrow
# line empty, and three of them fill a wide one. Wide lines need programs of their own, so they must save this share of
# the tokens.
NARROW_LINE, WIDE_LINE = 128, 256
WIDE_SAVES = 1 / 8
HEAD_TOKENS = 128  # tokens that the output head is applied to at a time
MIN_PREFIX = 16  # a shorter common beginning is computed with each text, because its own program would save little


class Batch(NamedTuple):
    """Texts without their common prefix, packed into L lines of T tokens.

    Attributes:
        tokens: int32[L, T].
        positions: int32[L, T], each token's position in its whole text; -1 for padding.
        segments: int32[L, T], the number of the text that each token belongs to.
        offsets: for each text in the batch, its number and the index, counted through all lines, of the token at its
            position 0; so the token at position p has the index `offsets[number] + p`.
    """

    tokens: Int[np.ndarray, "lines time"]
    positions: Int[np.ndarray, "lines time"]
    segments: Int[np.ndarray, "lines time"]
    offsets: dict[int, int]


class Division(NamedTuple):
    """Which texts lie in which line of a batch.

    Attributes:
        lines: the texts of each line. Lines of padding are left out.
        shape: the numbers of lines and of tokens in a line.
    """

    lines: Sequence[Sequence[int]]
    shape: tuple[int, int]


def log_likelihoods(
    model: Model, prompts: Sequence[Tokens], answers: Sequence[Tokens], params: Params | None = None
) -> list[Float32[np.ndarray, " tokens"]]:
    """The log-likelihood in nats of each token of each answer, given the prompt and the answer's tokens before it.

    Arguments:
        prompts, answers: token ids, one sequence each for every pair. An answer may be empty, a prompt may not.
        params: the parameters to compute with, for example those of a point of a landscape; by default the model's.
            Their leaves are arrays on the model's mesh, or weights such as `PerturbedWeight` that all texts share.

    Returns:
        For each pair, float32[tokens of its answer]; NaN where the model computes no finite logits.

    Raises:
        UserError: there are not as many answers as prompts, a prompt is empty, a text is longer than the model's
            context, or a token is not in its vocabulary.
    """
    if len(prompts) != len(answers):
        raise UserError(f"There are {len(prompts)} prompts, but {len(answers)} answers: give one for each prompt.")
    _check(model, prompts, answers)
    # The hidden state of a token predicts the next one. So nothing is computed for the last token of an answer, and
    # answers of one token to the same prompt share all that is computed.
    pairs_of: dict[Tokens, list[int]] = {}
    for pair, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        pairs_of.setdefault((*prompt, *answer[:-1]), []).append(pair)

    texts = list(pairs_of)
    run = _Run(model, params, texts, common_prefix(prompts) if texts else 0)
    computed: list[tuple[list[int], list[Array]]] = []
    for batch, states in run.batches():
        chosen = [(pair, offset) for text, offset in batch.offsets.items() for pair in pairs_of[texts[text]]]
        index = [offset + len(prompts[pair]) - 1 + np.arange(len(answers[pair])) for pair, offset in chosen]
        targets = [np.asarray(answers[pair], np.int32) for pair, _ in chosen]
        chunks = zip(_chunks(index), _chunks(targets), strict=True)
        computed.append(([pair for pair, _ in chosen], [run.log_likelihoods(states, *chunk) for chunk in chunks]))

    results: dict[int, np.ndarray] = {}
    for chosen, values in jax.device_get(computed):
        ends = np.cumsum([len(answers[pair]) for pair in chosen])
        flat = np.concatenate([*values, np.zeros(0, np.float32)])[: ends[-1]]
        results |= zip(chosen, np.split(flat, ends[:-1]), strict=True)
    return [results[pair] for pair in range(len(prompts))]


def next_token_logits(
    model: Model, prompts: Sequence[Tokens], params: Params | None = None
) -> Float32[np.ndarray, "prompts vocab"]:
    """The logits after the last token of each prompt, float32[prompts, vocab].

    The arguments and errors are those of `log_likelihoods`. Logits that are not finite stay as they are.
    """
    _check(model, prompts, [()] * len(prompts))
    run = _Run(model, params, prompts, common_prefix(prompts) if prompts else 0)
    logits = np.zeros((len(prompts), model.config.vocab_size), np.float32)
    for batch, states in run.batches():
        index = [[offset + len(prompts[text]) - 1] for text, offset in batch.offsets.items()]
        chunks = [np.asarray(run.logits(states, chunk)) for chunk in _chunks(index)]
        logits[list(batch.offsets)] = np.concatenate(chunks)[: len(index)]
    return logits


class _Run:
    """One call: the texts, the parameters and the common prefix on the devices, and the programs that compute them.

    Attributes:
        prefix: number of tokens that all texts begin with and that are computed once.
    """

    def __init__(self, model: Model, params: Params | None, texts: Sequence[Tokens], prefix: int) -> None:
        self._mesh, self._texts = model.mesh, texts
        self._config = model.config.for_length(max(map(len, texts), default=1))
        # Parameters that are kept in host memory are sent once.
        self._params = jax.device_put(model.params, model.shardings) if params is None else params
        self.prefix = prefix if len(texts) > 1 and prefix >= MIN_PREFIX else 0

    def batches(self) -> Iterator[tuple[Batch, Float[Array, "tokens dim"]]]:
        """The batches, each with the hidden states of its tokens, counted through all lines."""
        shared = self._texts[0][: self.prefix] if self.prefix else ()
        cache = prefix_cache(self._params, shared, self._config, self._mesh) if shared else None
        platform, devices = platform_of(self._mesh), mesh_shape_of(self._mesh).points
        for batch in _pack(self._texts, self.prefix, platform.prefill_tokens, platform.prefill_sizes, devices):
            arrays = self._put((batch.tokens, batch.positions, batch.segments))
            yield batch, _states(self._params, cache, arrays, config=self._config, mesh=self._mesh)

    def logits(self, states: Array, index: np.ndarray) -> Float[Array, "chunk vocab"]:
        """The logits of the tokens with these indices."""
        return _logits(self._params, states, *self._put((index,)), config=self._config, mesh=self._mesh)

    def log_likelihoods(self, states: Array, index: np.ndarray, targets: np.ndarray) -> Float[Array, " chunk"]:
        """The log-likelihood of each target, as the token after the one with this index."""
        arrays = self._put((index, targets))
        return _log_likelihoods(self._params, states, *arrays, config=self._config, mesh=self._mesh)

    def _put(self, arrays: tuple[np.ndarray, ...]) -> tuple[Array, ...]:
        return jax.device_put(arrays, replicated(self._mesh))


def _check(model: Model, prompts: Sequence[Tokens], answers: Sequence[Tokens]) -> None:
    context, vocab = model.config.max_positions, model.config.vocab_size
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True), 1):
        if not len(prompt):
            raise UserError(f"Prompt {number} has no tokens, so nothing predicts what follows it: write a text.")
        if (length := len(prompt) + len(answer)) > context:
            what = f"Prompt {number} and its answer have" if len(answer) else f"Prompt {number} has"
            raise UserError(f"{what} {length} tokens, more than the model's context of {context}: shorten the text.")
        wrong = [token for token in (*prompt, *answer) if not 0 <= token < vocab]
        if wrong:
            raise UserError(
                f"Prompt {number} or its answer has the token id {wrong[0]}, but the model's vocabulary has {vocab} "
                f"tokens: use the tokenizer that belongs to the model."
            )


def _pack(texts: Sequence[Tokens], prefix: int, max_tokens: int, sizes: int, devices: int) -> Iterator[Batch]:
    """The texts without their prefix in batches, those with the widest lines first.

    Lines are narrow, unless wide lines save the share `WIDE_SAVES` of all tokens, padding included.

    Arguments:
        max_tokens: number of tokens in a full batch for each of the devices that its lines are shared by.
        sizes: a batch has a multiple of 1 / `sizes` of the lines of a full one, so there are as many shapes of it.
    """
    lengths = [len(text) - prefix for text in texts]
    narrow, wide = (_divide(lengths, width, max_tokens, sizes, devices) for width in (NARROW_LINE, WIDE_LINE))
    is_wide = _num_tokens(wide) <= (1 - WIDE_SAVES) * _num_tokens(narrow)
    for lines, shape in wide if is_wide else narrow:
        yield _batch(texts, prefix, lines, shape)


def _divide(lengths: Sequence[int], narrowest: int, max_tokens: int, sizes: int, devices: int) -> list[Division]:
    """The lines of each batch of `_pack`, where lines have at least `narrowest` tokens."""
    lines: list[list[int]] = []
    for text, line in enumerate(assign_lines(lengths, narrowest)):
        lines += [[] for _ in range(len(lines), line + 1)]
        lines[line].append(text)
    by_width: dict[int, list[list[int]]] = {}
    for line_texts in lines:
        width = line_width(max(lengths[text] for text in line_texts), narrowest)
        by_width.setdefault(width, []).append(line_texts)
    divisions = []
    for width, same in by_width.items():
        largest = devices * max(1, max_tokens // width)
        step = devices * max(1, max_tokens // (width * sizes))
        for start in range(0, len(same), largest):
            chosen = same[start : start + largest]
            divisions.append(Division(chosen, (-(-len(chosen) // step) * step, width)))
    return divisions


def _num_tokens(divisions: Sequence[Division]) -> int:
    """The number of tokens that batches compute, with their padding."""
    return sum(lines * width for _, (lines, width) in divisions)


def _batch(texts: Sequence[Tokens], prefix: int, lines: Sequence[Sequence[int]], shape: tuple[int, int]) -> Batch:
    tokens, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    positions = np.full(shape, -1, np.int32)
    offsets = {}
    for line, line_texts in enumerate(lines):
        begin = 0
        for text in line_texts:
            own = texts[text][prefix:]
            span = (line, slice(begin, begin + len(own)))
            tokens[span], positions[span], segments[span] = own, prefix + np.arange(len(own)), text
            offsets[text] = line * shape[1] + begin - prefix
            begin += len(own)
    return Batch(tokens, positions, segments, offsets)


def _chunks(values: Sequence[Sequence[int] | np.ndarray]) -> list[Int[np.ndarray, " chunk"]]:
    """All values one after the other, in arrays of `HEAD_TOKENS` numbers; the last one is filled up with zeros."""
    flat = np.concatenate(values).astype(np.int32)
    return list(np.pad(flat, (0, -len(flat) % HEAD_TOKENS)).reshape(-1, HEAD_TOKENS))


def prefix_cache(params: Params, tokens: Tokens, config: ModelConfig, mesh: Mesh) -> KVCache:
    """The keys and values of tokens that texts begin with, one row, padded to one of a few lengths."""
    time = np.arange(bucket(len(tokens)))
    padded = np.where(time < len(tokens), np.resize(tokens, len(time)), 0)[None]
    positions = np.where(time < len(tokens), time, -1)[None]
    arrays = jax.device_put((padded.astype(np.int32), positions.astype(np.int32)), replicated(mesh))
    return _prefix_cache(params, *arrays, config=config, mesh=mesh)


@platform_jit(static_argnames=("config", "mesh"))
def _prefix_cache(
    params: Params, tokens: Int[Array, "1 time"], positions: Int[Array, "1 time"], *, config: ModelConfig, mesh: Mesh
) -> KVCache:
    """The keys and values of the beginning that all texts share."""
    with on_mesh(mesh):
        order = platform_of(mesh).order_without_kernel
        return hidden_states(config, params, tokens, positions, Context(), order)[1]


@platform_jit(static_argnames=("config", "mesh"))
def _states(
    params: Params,
    prefix: KVCache | None,
    lines: tuple[Int[Array, "lines time"], ...],
    *,
    config: ModelConfig,
    mesh: Mesh,
) -> Float[Array, "tokens dim"]:
    """The hidden states of all tokens of a batch, line after line, on every device.

    Arguments:
        lines: the tokens, positions and segments of a `Batch`.
    """
    tokens, positions, segments = lines
    with on_mesh(mesh):
        context = Context(prefix=prefix, segments=segments)
        order = platform_of(mesh).order_without_kernel
        states, _ = hidden_states(config, params, tokens, positions, context, order)
        return constrain(states.reshape(-1, states.shape[-1]), None, None)


@platform_jit(static_argnames=("config", "mesh"))
def _logits(
    params: Params, states: Float[Array, "tokens dim"], index: Int[Array, " chunk"], *, config: ModelConfig, mesh: Mesh
) -> Float[Array, "chunk vocab"]:
    with on_mesh(mesh):
        return constrain(_head(config, params, states, index), None, None)


@platform_jit(static_argnames=("config", "mesh"))
def _log_likelihoods(
    params: Params,
    states: Float[Array, "tokens dim"],
    index: Int[Array, " chunk"],
    targets: Int[Array, " chunk"],
    *,
    config: ModelConfig,
    mesh: Mesh,
) -> Float[Array, " chunk"]:
    with on_mesh(mesh):
        logits = _head(config, params, states, index)
        return constrain(-optax.softmax_cross_entropy_with_integer_labels(logits, targets), None)


def _head(config: ModelConfig, params: Params, states: Array, index: Array) -> Float[Array, "chunk vocab"]:
    """Float32 logits of some of the tokens, shared by the devices along the mesh axis `points`."""
    return head(config, params, constrain(states[index][:, None], "rows", None, None))[:, 0]
