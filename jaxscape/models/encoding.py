"""Texts as the token ids of a model."""

from collections.abc import Sequence

from jaxscape.models.model import Model
from jaxscape.runtime.errors import UserError


def encode(model: Model, texts: Sequence[str], max_new_tokens: int) -> list[list[int]]:
    """The token ids of each text. Special tokens must be spelled out in the texts, because none are added.

    Raises:
        UserError: there are no texts, a text has no tokens, a text and its new tokens exceed the model's context, or
            the tokenizer produces a token id that the model's vocabulary lacks.
    """
    if not texts:
        raise UserError("There are no prompts: give at least one.")
    encoded: list[list[int]] = model.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    for number, tokens in enumerate(encoded, 1):
        if len(tokens) + max_new_tokens > model.config.max_positions:
            raise UserError(
                f"Prompt {number} has {len(tokens)} tokens, which with {max_new_tokens} new tokens exceeds the model's "
                f"context of {model.config.max_positions}: shorten the prompt or lower --max-new-tokens."
            )
        if not tokens:
            raise UserError(f"Prompt {number} has no tokens: remove it or write a text.")
        if max(tokens) >= model.config.vocab_size:
            raise UserError(
                f"The tokenizer produced the token id {max(tokens)}, but the model's vocabulary has only "
                f"{model.config.vocab_size} tokens: use the tokenizer that belongs to the model."
            )
    return encoded
