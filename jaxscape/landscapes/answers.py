"""A model's answers at points in weight space, and what evaluators that need no model of their own say of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jaxscape.directions.storage import Direction
from jaxscape.engine.engine import Engine
from jaxscape.engine.scheduler import Completion, Coords
from jaxscape.evaluate.base import REFUSALS, Evaluator, Label, labels_of
from jaxscape.prompts.thinking import answer_of, is_unanswered


@dataclass(frozen=True)
class Answers:
    """The answers at one point, one for each prompt.

    Attributes:
        completions: what the engine decoded.
        unanswered: whether each text has thinking in it and no answer. It is judged like an empty answer.
        labels: for each evaluator, its label of each answer.
    """

    completions: list[Completion]
    unanswered: list[bool]
    labels: list[list[Label | None]]

    @property
    def refused(self) -> list[bool]:
        """Whether each answer is a refusal, as the first evaluator sees it."""
        return [label in REFUSALS for label in self.labels[0]]


def answers_at(
    points: Sequence[Coords],
    engine: Engine,
    directions: Sequence[Direction],
    judges: Sequence[Evaluator],
    prompts: Sequence[str],
    opening: str = "",
    block: int = 0,
) -> Iterator[Answers]:
    """Decode the answers to the prompts of an engine at each point in order, and judge them.

    Arguments:
        points: coordinates along the directions.
        judges: evaluators that judge each point at once, at least one.
        prompts: the texts of the prompts, which the evaluators are given.
        opening: the marker with which the prompts open a block of thinking, or an empty text.
        block: see `Engine.complete`; `prompts` are those of this block.
    """
    for completions in engine.complete(directions, points, block):
        texts = [opening + completion.text for completion in completions]
        answers = list(map(answer_of, texts))
        labels = [labels_of(judge, prompts, answers) for judge in judges]
        yield Answers(completions, list(map(is_unanswered, texts)), labels)
