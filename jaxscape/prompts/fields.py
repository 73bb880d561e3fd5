"""Which field of a record is the prompt."""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxscape.prompts.records import (
    Record,
    Records,
    is_chat,
    is_missing,
    normalised,
    openai_messages,
    quoted_names,
    shown_text,
    trimmed,
)
from jaxscape.runtime.errors import UserError, is_utf8

TEXT_NAMES = ("goal", "prompt", "behavior", "forbidden_prompt", "question", "instruction", "text")
TURNS = "turns"  # of MT-Bench: the user's turns of one chat
NAMES = (*TEXT_NAMES, "messages", "conversations", "conversation", TURNS)
"""The known names of the column that holds the prompts, in the order in which they are tried."""

# Columns without which a prompt means something else: HarmBench's context, Alpaca's input, and what is said before it.
_CONTEXT_NAMES = ("contextstring", "context", "input", "system", "system_prompt", "history")
# How programs write a missing value into a text.
_MISSING_WORDS = ("nan", "null", "none", "na", "n/a", "<na>", "#n/a")
_NUMBER = re.compile(r"[-+]?\d+([.,]\d+)?")


@dataclass(frozen=True)
class Prompts:
    """Prompts, and where they were read.

    Attributes:
        source: the name of the set or of the file.
        origin: what in the file was read, such as `the column 'goal'`; empty for a set.
        num_read: the number of prompts in the source; 0 if they are all here.
    """

    texts: tuple[str, ...]
    source: str
    origin: str = ""
    num_read: int = 0

    def first(self, number: int) -> "Prompts":
        """The first prompts, or all if there are fewer."""
        return replace(self, texts=self.texts[:number], num_read=self.num_read or len(self.texts))

    def __str__(self) -> str:
        """One line for the user: how many prompts there are, from where, and the first one."""
        number, read = len(self.texts), self.num_read or len(self.texts)
        amount = f"{number} prompts" if number == read else f"the first {number} of {read} prompts"
        origin = f" ({self.origin})" if self.origin else ""
        return f"{amount} from {shown_text(self.source)}{origin}; the first one: {shown_text(self.texts[0])}"


def prompts_of(records: Records, source: str, prompt_column: str | None = None) -> Prompts:
    """The prompts in the records of a file; see `jaxscape.load_prompts`.

    Arguments:
        source: the file's name.

    Raises:
        UserError: there are no records, or a record has no prompt.
    """
    wanted = NAMES if prompt_column is None else (normalised(prompt_column),)
    if records.columns and not any(normalised(name) in wanted for name in records.columns):
        raise UserError(_unknown_columns(source, records.columns, prompt_column))
    if not records.entries:
        raise UserError(f"The prompt file {source} has no prompts in it.")
    if prompt_column is not None and not isinstance(records.entries[0].value, dict):
        raise UserError(f"The file {source} has no columns, so {prompt_column!r} is none: leave out --prompt-column.")
    texts, keys, left_out = [], Counter[str](), Counter[str]()
    for record in records.entries:
        text, key, context = _prompt(record, prompt_column)
        texts.append(text)
        keys[key] += 1
        left_out.update(context)
    if prompt_column is None and all(map(_NUMBER.fullmatch, texts)):
        raise UserError(
            f"All prompts of {source} are numbers, {shown_text(texts[0])} is the first: name the column that has the "
            f"prompts with --prompt-column."
        )
    notes = [_origin(keys, records.of_texts)]
    notes += [f"{key!r}, which {count} of them have, is not sent" for key, count in left_out.items()]
    if any(is_chat(_value(record, key)) for record in records.entries for key in keys):
        notes.append("the last user turn of each chat, without what is said before it")
    if any(normalised(key) == TURNS for key in keys):
        notes.append("the first turn of each")
    return Prompts(tuple(texts), source, "; ".join(notes))


def _origin(keys: Mapping[str, int], of_texts: str) -> str:
    named = [f"{key!r}" if len(keys) == 1 else f"{key!r} of {count}" for key, count in keys.items() if key]
    return "; ".join([f"the column {' and '.join(named)}"] * bool(named) + [of_texts] * ("" in keys))


def _value(record: Record, key: str) -> Any:
    return record.value.get(key) if isinstance(record.value, dict) else record.value


def _prompt(record: Record, prompt_column: str | None) -> tuple[str, str, list[str]]:
    """A record's prompt, the name of its column ("" if it has none), and the columns of its context."""
    place, value = record
    if not isinstance(value, dict):
        return _text(value, "", place), "", []
    key = _key(value, place) if prompt_column is None else _named_key(value, place, prompt_column)
    text = _text(value[key], key, place)
    context = [name for name in value if normalised(name) in _CONTEXT_NAMES and name != key]
    context = [name for name in context if not is_missing(value[name])]
    if context and prompt_column is None and isinstance(value[key], str):
        raise UserError(
            f"{place}: the prompt in {key!r} goes with {quoted_names(context)}, which would be left out: write both "
            f"into one column, or send the prompt alone with --prompt-column {shown_text(key, 40)}."
        )
    return text, key, context


def _key(value: Mapping[str, Any], place: str) -> str:
    """The first known name in a record that holds something."""
    names = [[key for key in value if normalised(key) == name] for name in NAMES]
    known = [keys for keys in names if keys]
    if not known:
        raise UserError(_unknown_columns(place, value, None))
    keys = next((keys for keys in known if any(not is_missing(value[key]) for key in keys)), None)
    if keys is None:
        blank = quoted_names([key for keys in known for key in keys])
        raise UserError(f"{place}: no prompt found, because {blank} is blank: fill it, or remove the entry.")
    if len(keys) > 1:
        raise UserError(f"{place}: both {quoted_names(keys)} are there: choose one with --prompt-column.")
    return keys[0]


def _named_key(value: Mapping[str, Any], place: str, prompt_column: str) -> str:
    keys = [key for key in value if normalised(key) == normalised(prompt_column)]
    if prompt_column in keys:
        return prompt_column
    if len(keys) != 1:
        raise UserError(_unknown_columns(place, value, prompt_column))
    return keys[0]


def _unknown_columns(place: str, columns: Collection[str], prompt_column: str | None) -> str:
    names = quoted_names(columns)
    if prompt_column is not None:
        return f"{place}: there is no column {shown_text(prompt_column)} among {names}: write one of these."
    return (
        f"{place}: none of the columns {names} is known to hold prompts ({', '.join(NAMES)}): choose one with "
        f"--prompt-column, and if the first line is no header, add one, or quote texts that contain a delimiter."
    )


def _text(value: Any, key: str, place: str) -> str:
    """The prompt in a value: a text, the last user turn of a chat, or the first of MT-Bench's turns.

    Raises:
        UserError: the value holds no prompt.
    """
    held = f"{place}: {key!r} holds" if key else f"{place}: there is"
    if isinstance(value, list) and value and normalised(key) == TURNS:
        value = value[0]
    elif is_chat(value):
        value = _last_user_turn(value, place)
    if not isinstance(value, str):
        raise UserError(f"{held} {_kind(value)} where a text is expected: give a text, or a chat with a user's turn.")
    if not trimmed(value):
        raise UserError(f"{place}: no prompt found, because {key or 'it'!r} is blank: fill it, or remove the entry.")
    if trimmed(value).casefold() in _MISSING_WORDS:
        raise UserError(f"{held} {shown_text(value)}, which stands for a missing value: fill it, or remove the entry.")
    if not is_utf8(value):
        raise UserError(f"{place}: half a surrogate pair, which is not valid Unicode; remove it.")
    return trimmed(value)


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), f"the number {value}" if isinstance(value, int | float) else "no text")


def _last_user_turn(messages: Sequence[dict[str, Any]], place: str) -> Any:
    turns = [message.get("content") for message in openai_messages(messages) if message.get("role") == "user"]
    if not turns:
        raise UserError(f"{place}: the chat has no turn of the user: remove it.")
    return turns[-1]
