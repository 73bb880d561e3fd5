"""Which answers make no sense by their beginnings, asked while they are generated.

The rule is that of `coherence`, with thresholds for beginnings. The model judges the first tokens. Later on, only the
text is judged, which shows whether an answer repeats itself.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

from jaxscape.engine.continuations import Continuations
from jaxscape.evaluate.coherence import BEGINNING, Thresholds, makes_sense_as_text, new_tokens, surprise_of
from jaxscape.models.model import Model


class Beginnings:
    """Judges the beginnings of answers to prompts."""

    def __init__(self, model: Model, prompts: Sequence[Sequence[int]], thresholds: Thresholds) -> None:
        """Compute what the judge needs of the prompts.

        Arguments:
            model: the model that judges.
            prompts: token ids of the texts that the model is given.
            thresholds: those of the model, with some for beginnings.
        """
        assert thresholds.beginning is not None
        self._tokenizer, self._own, self._thresholds = model.tokenizer, thresholds.own, thresholds.beginning
        self._continuations = Continuations(model, prompts, BEGINNING)

    def repeat_themselves(self, beginnings: Sequence[str]) -> Bool[np.ndarray, " answers"]:
        """Whether each beginning repeats itself so much that it makes no sense. A beginning may have any number of
        tokens. An empty one may still become an answer."""
        repeats = [bool(text.strip()) and not makes_sense_as_text(text, self._thresholds) for text in beginnings]
        return np.array(repeats, bool)

    def make_no_sense(self, numbers: Sequence[int], beginnings: Sequence[str]) -> Bool[np.ndarray, " answers"]:
        """Whether each answer makes no sense by its first `BEGINNING` tokens. An empty beginning may still become an
        answer.

        Arguments:
            numbers: for each answer, the number of its prompt.
        """
        is_blank = np.array([not text.strip() for text in beginnings], bool)
        is_noise = self.repeat_themselves(beginnings)
        if asked := np.flatnonzero(~is_blank & ~is_noise).tolist():
            texts = [beginnings[i] for i in asked]
            ids = self._tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            answers = [tokens[:BEGINNING] for tokens in ids]
            likelihoods = self._continuations.log_likelihoods([numbers[i] for i in asked], answers)
            for i, tokens, values in zip(asked, answers, likelihoods, strict=True):
                # Where the model computes no finite logits, the comparison is false and the answer is noise.
                is_noise[i] = not surprise_of(-values[new_tokens(tokens)], self._own) <= self._thresholds.surprise
        return is_noise
