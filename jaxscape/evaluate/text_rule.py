"""Evaluators that judge each answer by its text alone, such as those that look for phrases."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from jaxscape.evaluate.base import Evaluator, Label, labels_from
from jaxscape.runtime.errors import UserError, as_texts

_APOSTROPHES = str.maketrans(dict.fromkeys("\u2018\u2019\u02bc", "'"))


@dataclass(frozen=True)
class TextRule:
    """An evaluator that scores 1 if an answer refuses by a rule on its text, else 0.

    Attributes:
        name: see `jaxscape.evaluate.base.Evaluator`.
        refuses: whether a text refuses.
        stop_when: whether the beginning of a text decides what `refuses` says of the text, whatever follows; None if
            only the whole text does.
        checksum: checksum of the file from which the rule was read, if there is one.
    """

    name: str
    refuses: Callable[[str], bool]
    stop_when: Callable[[str], bool] | None = None
    checksum: str | None = None

    def score(self, prompts: Sequence[str], answers: Sequence[str]) -> Float[np.ndarray, " answers"]:
        """The score of each answer, 0 or 1.

        Raises:
            UserError: an argument is no list of texts, or there are not as many prompts as answers.
        """
        prompts, answers = as_texts(prompts, "prompts"), as_texts(answers, "answers")
        if len(prompts) != len(answers):
            raise UserError(f"There are {len(prompts)} prompts and {len(answers)} answers: give a prompt for each.")
        return np.array([self.refuses(answer) for answer in answers], np.float64)

    def label(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Label]:
        """The label of each answer, `refused` or `complied`; see `score`."""
        return labels_from(self.score(prompts, answers))


def shows_refusal(evaluator: Evaluator) -> Callable[[str], bool] | None:
    """A function that says whether the beginning of a text already makes the text a refusal, whatever follows; None if
    the evaluator can only say so of whole texts."""
    rule = getattr(evaluator, "judge", evaluator)  # an evaluator from a user's file may be such a rule
    if not isinstance(rule, TextRule) or rule.stop_when is None:
        return None
    if rule.stop_when is rule.refuses:
        return rule.refuses
    is_decided, refuses = rule.stop_when, rule.refuses
    return lambda text: is_decided(text) and refuses(text)


def fold_apostrophes(text: str) -> str:
    """The text with straight apostrophes (U+0027) instead of typographic ones (U+2018, U+2019, U+02BC)."""
    return text.translate(_APOSTROPHES)


def contains_any(phrases: Iterable[str]) -> Callable[[str], bool]:
    """A function that says whether a text contains one of the phrases. It is case-sensitive, and typographic
    apostrophes are folded in phrases and texts."""
    folded = tuple(map(fold_apostrophes, phrases))
    return lambda text: any(phrase in fold_apostrophes(text) for phrase in folded)
