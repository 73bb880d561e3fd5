"""The protocol of a measure of weights: what it computes at a point, without decoding, and what it is made from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from jaxscape.engine.batching import tokenize
from jaxscape.engine.engine import generate
from jaxscape.evaluate.statistics import Interval
from jaxscape.models.checkpoint import Params
from jaxscape.models.encoding import encode
from jaxscape.models.model import Model
from jaxscape.prompts.chat_format import thinking_opening
from jaxscape.prompts.refusal import is_refusal
from jaxscape.prompts.thinking import answer_of
from jaxscape.runtime.errors import UserError

OWN_TOKENS = 24  # new tokens of the model's own answers: enough to see whether they refuse


@dataclass(frozen=True)
class Subject:
    """What measures are made from: the unperturbed model, and what it is asked.

    Attributes:
        prompts: harmful prompts.
        targets: for each prompt, the beginning of an answer that complies; None if there are none.
        refusal: the beginning of a refusal; None for those of the model itself.
        harmless: prompts that the model should answer.
        num_shots: number of solved examples before a question of multiple choice; None for five if there is a file of
            examples, and else none.
        recorded: the model's own answers, if a run has recorded them.
        system_prompt, thinking: see `jaxscape.prompts.chat_format.chat_text`.
    """

    model: Model
    prompts: Sequence[str]
    targets: Sequence[str] | None = None
    refusal: str | None = None
    harmless: Sequence[str] = ()
    num_shots: int | None = None
    recorded: Sequence[str] | None = None
    system_prompt: str = "default"
    thinking: str = "default"

    @cached_property
    def prompt_tokens(self) -> list[list[int]]:
        """The token ids of each harmful prompt, in the model's chat format."""
        return self.chat_tokens(self.prompts)

    def chat_tokens(self, prompts: Sequence[str]) -> list[list[int]]:
        """The token ids of prompts in the model's chat format."""
        return tokenize(self.model, prompts, self.system_prompt, OWN_TOKENS, self.thinking)

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of texts as they are, for example of answers."""
        return encode(self.model, texts, 0)

    @cached_property
    def own_answers(self) -> list[str]:
        """The beginning of the unperturbed model's greedy answer to each prompt. A run keeps them."""
        if self.recorded is not None:
            return list(self.recorded)
        prompts, options = list(self.prompts), {"system_prompt": self.system_prompt, "thinking": self.thinking}
        return generate(self.model, prompts, max_new_tokens=OWN_TOKENS, **options)  # type: ignore[arg-type]

    def own_refusals(self) -> dict[int, str]:
        """The own answers that refuse, by the paper's keywords, by the number of their prompt.

        Raises:
            UserError: there are none.
        """
        opening = thinking_opening(self.model.tokenizer, self.system_prompt, self.thinking)
        refusals = {i: text for i, text in enumerate(self.own_answers) if is_refusal(answer_of(opening + text))}
        if not refusals:
            hint = f", or --thinking off, because its text begins inside {opening}" if opening else ""
            raise UserError(
                f"The model refuses none of the {len(self.prompts)} prompts, so it shows no refusal of its own: give "
                f"the beginning of a refusal with --refusal (refusal= in Python){hint}."
            )
        return refusals


@runtime_checkable
class WeightMeasure(Protocol):
    """Numbers that weights have. `jaxscape.evaluate.measures` lists the measures that have a name.

    Attributes:
        name: the measure's name on the command line and in a run's files.
        label: what `value` is, with its unit, for figures.
        settings: what the measure was made from, for a run's files: anything that JSON can hold.
    """

    @property
    def name(self) -> str: ...

    @property
    def label(self) -> str: ...

    @property
    def settings(self) -> Mapping[str, Any]: ...

    def samples(self, params: Params) -> Float[np.ndarray, "samples columns"]:
        """What each prompt or question gives under these weights, float64; NaN where logits are not finite."""
        ...

    def summary(self, samples: Float[np.ndarray, "samples columns"]) -> Mapping[str, Interval]:
        """The measure's numbers, each with its 95 % interval, from finite samples. The first is `value`."""
        ...
