"""Text generation: prompts to tokens, a jitted prefill and decode loop, and tokens to texts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxscape.errors import UserError, check_seed
from jaxscape.models import Model
from jaxscape.models.checkpoint import Params
from jaxscape.models.config import ModelConfig
from jaxscape.models.decoder import KVCache, forward
from jaxscape.prompts import chat_text

LENGTH_MULTIPLE = 16  # prompts are padded to a multiple of it, so that few lengths are compiled
BATCH_SIZE = 128


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; hashable, so that it can be a static argument of `jax.jit`.

    Attributes:
        max_new_tokens: the most tokens generated for a prompt.
        temperature: 0 takes the most likely token; otherwise logits are divided by it and a token is drawn.
        top_k: draw from the k most likely tokens only; 0 for all.
        top_p: draw from the fewest tokens whose probabilities reach p (Holtzman et al., arXiv 1904.09751).
        seed: of the draws. Every prompt has its own stream, which is the same at every landscape point.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"The number of new tokens must be at least 1, not {self.max_new_tokens}.")
        if not (0 <= self.temperature < float("inf")):
            raise UserError(f"The temperature must be a number from 0 up, not {self.temperature}.")
        if self.top_k < 0:
            raise UserError(f"top_k must be 0 (all tokens) or more, not {self.top_k}.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, not {self.top_p}.")
        check_seed(self.seed)


class Batch(NamedTuple):
    """Equally many rows of left-padded prompts; a row of length 0 is there to fill up the batch.

    `rows` are the prompts' indices in the whole set: a prompt's random stream does not depend on its batch.
    """

    tokens: Int[np.ndarray, "batch time"]
    lengths: Int[np.ndarray, " batch"]
    rows: Int[np.ndarray, " batch"]


class Generated(NamedTuple):
    """What a batch was completed with.

    Attributes:
        tokens: int32[B, N], a row's new tokens, of which the first `lengths` count; the end token is not among them.
        finite: False for a row that met a NaN or infinite logit, where it ended.
    """

    tokens: Int[Array, "batch new"]
    lengths: Int[Array, " batch"]
    finite: Bool[Array, " batch"]


class Carry(NamedTuple):
    """What the decode loop hands on: the number of tokens chosen, and the state after choosing them."""

    step: Int[Array, ""]
    out: Generated
    ended: Bool[Array, " batch"]
    cache: KVCache


class Completion(NamedTuple):
    """A prompt's completion, and whether all logits on the way were finite."""

    text: str
    finite: bool


def encode(
    model: Model, prompts: Sequence[str], *, system_prompt: str, max_new_tokens: int, batch_size: int = BATCH_SIZE
) -> list[Batch]:
    """Prompts as batches of one shape, so that one compiled program serves them all.

    Raises:
        UserError: there are no prompts, or a prompt and its new tokens exceed the model's context.
    """
    if not prompts:
        raise UserError("There are no prompts.")
    if batch_size < 1:
        raise UserError(f"The batch size must be at least 1, not {batch_size}.")
    texts = [chat_text(model.tokenizer, prompt, system_prompt) for prompt in prompts]
    # A chat template spells the special tokens out; where there is none, they are the tokenizer's to add.
    rows = model.tokenizer(texts, add_special_tokens=model.tokenizer.chat_template is None)["input_ids"]
    for number, row in enumerate(rows, 1):
        if len(row) + max_new_tokens > model.config.max_positions:
            raise UserError(
                f"Prompt {number} has {len(row)} tokens, which with {max_new_tokens} new ones exceeds the model's "
                f"context of {model.config.max_positions}; shorten it or lower --max-new-tokens."
            )
        if not row:
            raise UserError(f"Prompt {number} is empty.")
        if max(row) >= model.config.vocab_size:
            raise UserError(
                f"The tokenizer gives token {max(row)}, but the model has only {model.config.vocab_size} of them; "
                f"they do not belong together."
            )
    width = -(-max(map(len, rows)) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    num_batches = -(-len(rows) // batch_size)
    size = -(-len(rows) // num_batches)
    tokens = np.zeros((num_batches * size, width), np.int32)
    lengths = np.zeros(num_batches * size, np.int32)
    for i, row in enumerate(rows):
        tokens[i, width - len(row) :] = row
        lengths[i] = len(row)
    indices = np.arange(num_batches * size, dtype=np.int32)
    return [Batch(tokens[s], lengths[s], indices[s]) for s in np.split(indices, num_batches)]


def generate(
    model: Model,
    prompts: Sequence[str],
    *,
    system_prompt: str = "default",
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
) -> list[str]:
    """The model's answers to prompts, each given as a user's turn in the model's chat format.

    See `Sampling` for the options, and `jaxscape.prompts.chat_text` for `system_prompt`. The texts end before the
    model's end token and hold no special tokens; they are a model's output and as such not to be trusted.
    """
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed)
    batches = encode(model, prompts, system_prompt=system_prompt, max_new_tokens=max_new_tokens, batch_size=batch_size)
    return [completion.text for completion in complete(model, model.params, batches, sampling)]


def complete(model: Model, params: Params, batches: Sequence[Batch], sampling: Sampling) -> list[Completion]:
    """Complete every prompt with `params` in the place of the model's own."""
    stream = jax.random.key(sampling.seed, impl="threefry2x32")
    outputs = [
        generate_tokens(
            params,
            *map(jnp.asarray, batch),
            stream,
            config=model.config,
            sampling=replace(sampling, seed=0),  # another seed is another stream, not another program
            eos_token_ids=model.eos_token_ids,
        )
        for batch in batches  # dispatched all at once; the device works through them
    ]
    completions: list[Completion] = []
    for batch, output in zip(batches, jax.device_get(outputs), strict=True):
        real = batch.lengths > 0
        texts = model.tokenizer.batch_decode(
            [row[:n].tolist() for row, n in zip(output.tokens[real], output.lengths[real], strict=True)],
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        completions += map(Completion, texts, output.finite[real].tolist())
    return completions


@partial(jax.jit, static_argnames=("config", "sampling", "eos_token_ids"))
def generate_tokens(
    params: Params,
    tokens: Int[Array, "batch time"],
    lengths: Int[Array, " batch"],
    rows: Int[Array, " batch"],
    stream: Key[Array, ""],
    *,
    config: ModelConfig,
    sampling: Sampling,
    eos_token_ids: tuple[int, ...],
) -> Generated:
    """Prefill, then decode token by token until every row has ended.

    Compiled once for each shape and each static argument; the parameters are an ordinary argument, so every landscape
    point runs the same program.
    """
    width, new = tokens.shape[1], sampling.max_new_tokens
    keys = jax.vmap(jax.random.fold_in, (None, 0))(stream, rows)
    eos = jnp.asarray(eos_token_ids, jnp.int32)

    def choose(
        logits: Float[Array, "batch 1 vocab"], step: Int[Array, ""], out: Generated, ended: Bool[Array, " batch"]
    ) -> tuple[Generated, Bool[Array, " batch"]]:
        """Add a token to the rows that go on; a row ends at an end token, or at a logit that is not finite."""
        chosen = sample(logits[:, 0], jax.vmap(jax.random.fold_in, (0, None))(keys, step), sampling)
        finite = jnp.isfinite(logits[:, 0]).all(-1)
        going = ~ended & finite & ~jnp.isin(chosen, eos)
        out = Generated(
            tokens=out.tokens.at[:, step].set(jnp.where(going, chosen, 0)),
            lengths=out.lengths + going,
            finite=out.finite & (finite | ended),
        )
        return out, ~going

    def unfinished(carry: Carry) -> Bool[Array, ""]:
        return (carry.step < new) & ~carry.ended.all()

    def decode_step(carry: Carry) -> Carry:
        step, out, ended, cache = carry
        last = jax.lax.dynamic_slice_in_dim(out.tokens, step - 1, 1, axis=1)
        logits, cache = forward(config, params, last, lengths[:, None] + step - 1, cache, width + step - 1)
        out, ended = choose(logits, step, out, ended)
        return Carry(step + 1, out, ended, cache)

    # Prompts are padded on the left, so that each row's next token goes to the same slot; padding is at position -1.
    positions = jnp.maximum(jnp.arange(width) - (width - lengths[:, None]), -1)
    logits, cache = forward(config, params, tokens, positions, last_only=True)
    nothing = Generated(
        tokens=jnp.zeros((tokens.shape[0], new), jnp.int32),
        lengths=jnp.zeros_like(lengths),
        finite=jnp.ones(lengths.shape, bool),
    )
    out, ended = choose(logits, jnp.int32(0), nothing, lengths == 0)
    return jax.lax.while_loop(unfinished, decode_step, Carry(jnp.int32(1), out, ended, cache.padded(new))).out


def sample(logits: Float[Array, "batch vocab"], keys: Key[Array, " batch"], sampling: Sampling) -> Int[Array, " batch"]:
    """The next token of each row. Top-k and top-p act on the logits after the temperature, in this order."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.top_p < 1:
        descending = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(descending, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        # The most likely token is always kept: nothing stands before it.
        least = jnp.where(before < sampling.top_p, descending, jnp.inf).min(-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
