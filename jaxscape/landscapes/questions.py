"""What a model is asked at each point: the prompts, and the texts and tokens that it is given for them."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxscape.models.encoding import encode
from jaxscape.models.model import Model
from jaxscape.prompts.chat_format import chat_texts, thinking_opening
from jaxscape.prompts.fields import Prompts
from jaxscape.runtime.errors import as_texts


@dataclass(frozen=True)
class Questions:
    """The prompts of a scan, and what the model is given for them.

    Attributes:
        sent: for each prompt, the text that the model is given.
        opening: the marker with which these texts open a block of thinking, or an empty text.
        tokens: the token ids of each of these texts.
    """

    prompts: Prompts
    sent: list[str]
    opening: str
    tokens: list[list[int]]

    @classmethod
    def of(
        cls, model: Model, prompts: Sequence[str], system_prompt: str, thinking: str, max_new_tokens: int
    ) -> "Questions":
        """The questions that these prompts are for a model.

        Raises:
            UserError: there are no prompts, or one of them cannot be asked.
        """
        texts = as_texts(prompts, "prompts")
        prompts = prompts if isinstance(prompts, Prompts) else Prompts(texts)
        sent = chat_texts(model.tokenizer, prompts, system_prompt, thinking)
        opening = thinking_opening(model.tokenizer, system_prompt, thinking)
        return cls(prompts, sent, opening, encode(model, sent, max_new_tokens))

    @property
    def openings(self) -> list[str]:
        """The opening of each prompt."""
        return [self.opening] * len(self.prompts)

    @property
    def sent_for(self) -> dict[str, str]:
        """The text that the model is given, by the prompt."""
        return dict(zip(self.prompts, self.sent, strict=True))
