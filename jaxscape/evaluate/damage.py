"""Damage: how far the first token on harmless prompts has moved from the unperturbed model's."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxscape.engine.prefill import next_token_logits
from jaxscape.evaluate.measure import Subject
from jaxscape.evaluate.statistics import Interval, mean_interval
from jaxscape.models.checkpoint import Params
from jaxscape.models.model import Model
from jaxscape.runtime.errors import UserError


@dataclass(frozen=True, eq=False)
class Damage:
    """The KL divergence of the first token's distribution from the unperturbed model's, in nats, on harmless prompts.

    It is the mean of KL(p₀ ‖ p) = Σ p₀ log(p₀ / p), where p₀ is the unperturbed model's distribution, as in Arditi et
    al. (arXiv 2406.11717).

    Attributes:
        prompt_tokens: the harmless prompts.
        unperturbed: float64[prompts, vocab], log p₀.
    """

    model: Model
    prompt_tokens: list[list[int]]
    unperturbed: Float[np.ndarray, "prompts vocab"]
    name: str = "damage"
    label: str = "KL divergence of the first token (nats)"

    @classmethod
    def make(cls, subject: Subject, option: str) -> "Damage":
        if option:
            raise UserError(f"The measure 'damage' takes nothing after its name, not {option!r}: name --harmless.")
        if not subject.harmless:
            raise UserError("The measure 'damage' needs harmless prompts: name some with --harmless (harmless=).")
        tokens = subject.chat_tokens(subject.harmless)
        return cls(subject.model, tokens, _log_softmax(next_token_logits(subject.model, tokens)))

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"num_prompts": len(self.prompt_tokens)}

    def samples(self, params: Params) -> Float[np.ndarray, "prompts 1"]:
        moved = _log_softmax(next_token_logits(self.model, self.prompt_tokens, params))
        return (np.exp(self.unperturbed) * (self.unperturbed - moved)).sum(1, keepdims=True)

    def summary(self, samples: Float[np.ndarray, "prompts 1"]) -> Mapping[str, Interval]:
        return {"value": mean_interval(samples[:, 0])}


def _log_softmax(logits: Float[np.ndarray, "prompts vocab"]) -> Float[np.ndarray, "prompts vocab"]:
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(1, keepdims=True)))
