"""How the next token is chosen from the logits."""

from dataclasses import dataclass
from typing import TypedDict

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxscape.engine.options import GenerationOptions
from jaxscape.runtime.errors import UserError, check_seed


class SamplingOptions(TypedDict, total=False):
    """Keyword arguments that `generate` and `scan` pass on to `Sampling`, which describes them."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int


@dataclass(frozen=True)
class Sampling(GenerationOptions):
    """How the next token is chosen. Hashable, so that it can be a static argument of `jax.jit`.

    Attributes:
        max_new_tokens: maximum number of tokens generated for a prompt.
        temperature: 0 takes the most likely token; otherwise the logits are divided by it and a token is drawn.
        top_k: draw from the k most likely tokens only; 0 draws from all.
        top_p: draw from the smallest set of tokens whose probabilities add up to p (Holtzman et al., arXiv
            1904.09751).
        seed: seed of the draws, from 0 to 2³² − 1. Every prompt has a random stream of its own, which is the same at
            every landscape point.

    Raises:
        UserError: a value is out of range.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"The number of new tokens must be at least 1, not {self.max_new_tokens}.")
        if not (0 <= self.temperature < float("inf")):
            raise UserError(f"The temperature must be a finite number of at least 0, not {self.temperature}.")
        if self.top_k < 0:
            raise UserError(f"top_k must be 0 (all tokens) or more, not {self.top_k}.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, not {self.top_p}.")
        check_seed(self.seed)


def greedy(logits: Float[Array, "batch vocab"]) -> Int[Array, " batch"]:
    """The most likely token of each row, int32; of equally likely tokens the one with the lowest id, as `argmax`."""
    # Two reductions instead of an argmax, which XLA does not vectorise on a CPU.
    token = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    return jnp.where(logits == logits.max(-1)[:, None], token, logits.shape[-1] - 1).min(-1)


def sample(logits: Float[Array, "batch vocab"], keys: Key[Array, " batch"], sampling: Sampling) -> Int[Array, " batch"]:
    """One draw for each row, int32. Temperature, top-k and top-p are applied in this order."""
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.top_p < 1:
        descending = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(descending, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        # The most likely token is always kept, because no probability precedes it.
        least = jnp.where(before < sampling.top_p, descending, jnp.inf).min(-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
