"""Harmful and harmless prompts, by the names of their sets, and the model's own answers to them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from jaxscape.models.encoding import encode
from jaxscape.models.greedy import greedy_tokens
from jaxscape.models.model import Model
from jaxscape.prompts.chat_format import chat_texts, thinking_opening
from jaxscape.prompts.refusal import is_refusal
from jaxscape.prompts.sets import load_prompts
from jaxscape.prompts.thinking import answer_of
from jaxscape.runtime.errors import UserError

Texts = Sequence[Sequence[int]]
"""The token ids of each text."""

ANSWER_TOKENS = 32  # new tokens of the model's own answers: enough to see whether they refuse


class Answered(NamedTuple):
    """Prompts with answers.

    Attributes:
        texts: the token ids of each prompt in the model's chat format, with those of its answer.
        begins: for each text, the number of the prompt's tokens.
    """

    texts: list[list[int]]
    begins: list[int]


@dataclass(frozen=True)
class PromptSets:
    """Two prompt sets: the last options of directions that come from activations, `HARMFUL,HARMLESS:N`.

    Attributes:
        harmful, harmless: names of sets or files, see `jaxscape.load_prompts`.
        number: N, the number of prompts of each set.
    """

    harmful: str = "harmful"
    harmless: str = "benign"
    number: int = 64

    def __post_init__(self) -> None:
        if self.number < 1:
            raise UserError(f"The number of prompts of a direction must be at least 1, not {self.number}.")
        for name in (self.harmful, self.harmless):
            if not name or any(sign in name for sign in ":,[]"):
                raise UserError(
                    f"The prompts {name!r} cannot stand in the name of a direction: name a set or a file, without a "
                    f"colon, a comma and square brackets."
                )

    @property
    def options(self) -> tuple[str, str]:
        """The options in a direction's name."""
        return f"{self.harmful},{self.harmless}", str(self.number)

    @classmethod
    def parse(cls, sets: str = "", number: str = "") -> "PromptSets":
        """The sets that options describe; an option that is empty has its default.

        Raises:
            UserError: the options are no two names, or no number.
        """
        names = sets.split(",") if sets else [cls.harmful, cls.harmless]
        if len(names) != 2 or not (number or "0").isdecimal():
            raise UserError(
                f"Cannot read the prompts '{sets}:{number}' in the name of a direction: write HARMFUL,HARMLESS:N, for "
                f"example harmful,harmless:32."
            )
        return cls(names[0], names[1], int(number or cls.number))

    def prompts(self, model: Model, first: int, end: int) -> tuple[Texts, Texts]:
        """The prompts of both sets with the numbers from `first` up to but without `end`, in the model's format."""
        harmful, harmless = (_prompts(model, name, end)[first:] for name in (self.harmful, self.harmless))
        return harmful, harmless

    def refused(self, model: Model) -> Answered:
        """The first N harmful prompts with the model's own answers, as far as these refuse.

        Raises:
            UserError: none of them does.
        """
        answered = _answered(model, _prompts(model, self.harmful, self.number), refuses=True)
        if not answered.texts:
            raise UserError(
                f"The model refuses none of the first {self.number} prompts of {self.harmful}, so it shows nothing "
                f"that is critical for refusal: name other prompts."
            )
        return answered

    def complied(self, model: Model) -> Answered:
        """The first N harmless prompts with the model's own answers, as far as these do not refuse.

        Raises:
            UserError: all of them do.
        """
        answered = _answered(model, _prompts(model, self.harmless, self.number), refuses=False)
        if not answered.texts:
            raise UserError(
                f"The model refuses all of the first {self.number} prompts of {self.harmless}, so it shows nothing of "
                f"its usefulness: name other prompts."
            )
        return answered


DEFAULT_SETS = PromptSets()


def _prompts(model: Model, name: str, count: int) -> Texts:
    return encode(model, chat_texts(model.tokenizer, load_prompts(name, count)), ANSWER_TOKENS)


def _answered(model: Model, prompts: Texts, refuses: bool) -> Answered:
    """The prompts whose greedy answers refuse, or those whose answers do not, with their answers."""
    answers, refused = own_answers(model, prompts, ANSWER_TOKENS)
    chosen = [
        (list(prompt), answer)
        for prompt, answer, is_refused in zip(prompts, answers, refused, strict=True)
        if answer and is_refused == refuses
    ]
    return Answered([prompt + answer for prompt, answer in chosen], [len(prompt) for prompt, _ in chosen])


def own_answers(model: Model, prompts: Texts, max_new_tokens: int) -> tuple[list[list[int]], list[bool]]:
    """The token ids of the model's own greedy answers to prompts, and whether each of them refuses."""
    answers, opening = greedy_tokens(model, prompts, max_new_tokens), thinking_opening(model.tokenizer)
    return answers, [is_refusal(answer_of(opening + model.tokenizer.decode(answer))) for answer in answers]
