"""What a thinking model writes before its answer: where the thinking begins and ends, and what is left as the answer.

Importing this module does not import transformers.
"""

import re
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Thinking = Literal["default", "on", "off"]
"""Whether the chat template switches thinking on or off; `default` leaves the template as it is."""

MARKERS = (
    ("<think>", "</think>"),  # Qwen3, DeepSeek-R1, SmolLM3, Phi-4-reasoning
    ("<thought>", "</thought>"),  # EXAONE Deep
    ("[THINK]", "[/THINK]"),  # Magistral
)
"""The texts that begin and end a block of thinking."""

# A block that never ends reaches to the end of the text.
_BLOCK = re.compile(
    "|".join(rf"{re.escape(opening)}.*?(?:{re.escape(closing)}|\Z)" for opening, closing in MARKERS), re.DOTALL
)


# The end of a text with which an opening marker may begin.
_BEGUN = re.compile(
    "(?:" + "|".join(re.escape(opening[:size]) for opening, _ in MARKERS for size in range(1, len(opening))) + r")\Z"
)


def opening_of(text: str) -> str:
    """The marker of the block of thinking that a text opens and does not close; an empty text if there is none."""
    return next((opening for opening, closing in MARKERS if text.rfind(opening) > text.rfind(closing)), "")


def opening_after(prompt: str, sent: str) -> str:
    """The marker of the block of thinking that a chat template opens behind a prompt; see `opening_of`.

    Arguments:
        sent: the text that the model is given for the prompt.
    """
    return opening_of(sent.rpartition(prompt.strip())[2])


def end_of_thinking(opening: str) -> str:
    """What ends an empty block of thinking that `opening` begins, and a blank line, as Qwen3's chat template writes it;
    an empty text if there is no opening."""
    return f"\n\n{dict(MARKERS)[opening]}\n\n" if opening else ""


def answer_of(text: str) -> str:
    """The text without its blocks of thinking. A text that has none is returned as it is.

    A closing marker without its opening is ordinary text. Otherwise what has been read as an answer could turn into
    thinking later, and no row could end before its last token.

    Arguments:
        text: what the model wrote, after the marker with which the prompt opened a block, see
            `jaxscape.prompts.chat_format.thinking_opening`.
    """
    return _BLOCK.sub("", text).strip() if _BLOCK.search(text) else text


def is_unanswered(text: str) -> bool:
    """Whether the text, which `answer_of` describes, has thinking in it and no answer."""
    return _BLOCK.search(text) is not None and not answer_of(text)


def without_open_end(text: str) -> str:
    """The text without an end that the next token may turn into something else: the bytes of an unfinished character,
    which are decoded as U+FFFD, and what may be the beginning of an opening marker."""
    return _BEGUN.sub("", text.rstrip("\ufffd"))


def with_opening(text: str) -> str:
    """A complete text of a model, after the marker with which its prompt opened a block of thinking, if the text shows
    that there was one: it closes a block that it does not open."""
    for opening, closing in MARKERS:
        before, closed, _ = text.partition(closing)
        if closed and opening not in before:
            return opening + text
    return text


def hidden_tokens(tokenizer: "PreTrainedTokenizerBase") -> frozenset[int] | None:
    """The special tokens that do not belong into a text, if some markers of thinking are special tokens and do (as
    Magistral's); None if no marker is one, so that all special tokens can be left out."""
    special = {number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    markers = {marker for pair in MARKERS for marker in pair}
    if markers.isdisjoint(special.values()):
        return None
    return frozenset(number for number, content in special.items() if content not in markers)
