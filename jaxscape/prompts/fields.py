"""Which field of a record is the prompt."""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from jaxscape.prompts.records import (
    Record,
    Records,
    is_chat,
    is_missing,
    normalised,
    openai_messages,
    trimmed,
)
from jaxscape.runtime.errors import UserError, is_utf8
from jaxscape.runtime.texts import did_you_mean, quoted_names, shown_text

TEXT_NAMES = ("goal", "prompt", "behavior", "forbidden_prompt", "question", "instruction", "text")
TURNS = "turns"  # of MT-Bench: the user's turns of one chat
CHAT_NAMES = ("messages", "conversations", "conversation")
NAMES = (*TEXT_NAMES, *CHAT_NAMES, TURNS)
"""The known names of the column that holds the prompts, in the order in which they are tried."""

# An entry of a JailbreakBench artifact has these and others: `goal` is what the attack wants, `prompt` what it sends.
_JAILBREAK_NAMES = {"goal", "prompt", "jailbroken"}

# Columns without which a prompt means something else: HarmBench's context, Alpaca's input, and what is said before it.
_CONTEXT_NAMES = ("contextstring", "context", "input", "system", "system_prompt", "history")
# How programs write a missing value into a text.
_MISSING_WORDS = ("nan", "null", "none", "na", "n/a", "<na>", "#n/a")
_DASHES = re.compile(r":?[-\u2013\u2014]+:?")  # a missing value, or the line below the header of a Markdown table
_LABEL = re.compile(r"[-+\w.,:/#]*\d[-+\w.,:/#]*", re.ASCII)  # a number or an identifier
_WRITTEN_CHAT = re.compile(r"""\s*\[\s*\{\s*['"](role|from|content|value)['"]\s*:""")  # a chat as a table holds it
# What a text begins with that is already in a chat format, as training data often are.
_CHAT_FORMAT = re.compile(
    r"(<s>|<bos>|<\|begin_of_text\|>)?\s*"
    r"(\[INST\]|<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|<\|(user|system)\|>"
    r"|### ?(Human|Instruction|User)\b|(Human|USER|User): )"
)


class Prompts(list[str]):
    """A list of prompts that knows where they were read.

    Attributes:
        origin: the source, and what in it was read, such as `'mine.csv' (the column 'goal')`; empty if unknown.
        num_read: the number of prompts in the source.
    """

    def __init__(self, texts: Iterable[str], origin: str = "", num_read: int | None = None) -> None:
        super().__init__(texts)
        self.origin = origin
        self.num_read = len(self) if num_read is None else num_read

    def first(self, number: int) -> "Prompts":
        """The first prompts, or all if there are fewer."""
        return Prompts(self[:number], self.origin, self.num_read)

    def summary(self) -> str:
        """One line for the user: how many prompts there are, from where, and the first one."""
        amount = f"{len(self)} prompt{'s' * (len(self) != 1)}"
        if len(self) < self.num_read:
            amount = f"the first {len(self)} of {self.num_read} prompts"
        return f"{amount}{f' from {self.origin}' * bool(self.origin)}; the first one: {shown_text(self[0])}"


def prompts_of(records: Records, source: str, prompt_column: str | None = None) -> Prompts:
    """The prompts in the records of a file; see `jaxscape.load_prompts`.

    Arguments:
        source: the file's name.

    Raises:
        UserError: there are no records, or a record has no prompt.
    """
    wanted = NAMES if prompt_column is None else (normalised(prompt_column),)
    if records.columns and not any(normalised(name) in wanted for name in records.columns):
        hint = "" if prompt_column else ", or, if the first line is no header, add one"
        raise UserError(f"{_unknown_columns(source, records.columns, prompt_column)}{hint}.")
    if not records.entries:
        raise UserError(f"The prompt file {source} has no prompts in it.")
    entries, left_out = records.entries, 0
    if prompt_column is None and all(map(_is_jailbreak, entries)):
        prompt_column, entries = "prompt", [entry for entry in entries if entry.value["prompt"] is not None]
        left_out = len(records.entries) - len(entries)
        if not entries:
            raise UserError(f"The attack in {source} found no prompts: each 'prompt' is null.")
    texts, keys, not_sent = [], Counter[str](), Counter[str]()
    for record in entries:
        text, key, others = _prompt(record, prompt_column)
        texts.append(text)
        keys[key] += 1
        not_sent.update(others)
    if prompt_column is None and all(map(_LABEL.fullmatch, texts)):
        raise UserError(
            f"All prompts of {source} are numbers or identifiers, {shown_text(texts[0])} is the first: name the column "
            f"that has the prompts with --prompt-column."
        )
    notes = [_origin(keys, records.of_texts)] + [f"{left_out} goals without a prompt left out"] * bool(left_out)
    notes += [f"not sent: {others} of {count}" for others, count in not_sent.items()]
    return Prompts(texts, f"{shown_text(source)} ({'; '.join(notes)})")


def _is_jailbreak(record: Record) -> bool:
    """Whether a record is an entry of a JailbreakBench artifact."""
    return isinstance(record.value, dict) and record.value.keys() >= _JAILBREAK_NAMES


def _origin(keys: Mapping[str, int], of_texts: str) -> str:
    named = [shown_text(key, 40) + f" of {count}" * (len(keys) > 1) for key, count in keys.items() if key]
    return "; ".join([f"the column {' and '.join(named)}"] * bool(named) + [of_texts] * ("" in keys))


def _prompt(record: Record, prompt_column: str | None) -> tuple[str, str, list[str]]:
    """A record's prompt, the name of its column ("" if it has none), and what belongs to it and is not sent."""
    place, value = record
    if not isinstance(value, dict):
        if prompt_column is not None:
            raise UserError(f"{place}: there are no columns, so {shown_text(prompt_column)} is none of them.")
        turn, other_turns = _user_turn(value, "", place)
        return _text(turn, "", place), "", other_turns
    key = _key(value, place) if prompt_column is None else _named_key(value, place, prompt_column)
    turn, other_turns = _user_turn(value[key], key, place)
    text = _text(turn, key, place)
    context = [name for name in value if normalised(name) in _CONTEXT_NAMES and name != key]
    context = [name for name in context if not is_missing(value[name])]
    if context and prompt_column is None and isinstance(value[key], str):
        raise UserError(
            f"{place}: the prompt in {key!r} goes with {quoted_names(context)}, which would be left out: write both "
            f"into one column, or send the prompt alone with --prompt-column {shown_text(key, 40)}."
        )
    if (markup := _CHAT_FORMAT.match(text)) and prompt_column is None:
        raise UserError(
            f"{place}: the text in {key!r} is in a chat format already ({shown_text(markup[0])}), and the model's own "
            f"would be put around it: write the prompts alone, or send them so with --prompt-column "
            f"{shown_text(key, 40)}."
        )
    return text, key, [*(shown_text(name, 40) for name in context), *other_turns]


def _user_turn(value: Any, key: str, place: str) -> tuple[Any, list[str]]:
    """What a value gives as the prompt, and the turns of its chat that are not sent.

    It is the last turn of the user in a chat, the first of MT-Bench's turns, and otherwise the value itself.
    """
    if isinstance(value, list) and value and normalised(key) == TURNS:
        return value[0], ["the later turns"] * (len(value) > 1)
    if not is_chat(value):
        if isinstance(value, str) and normalised(key) in (*CHAT_NAMES, TURNS):
            raise UserError(f"{place}: {key!r} holds a text, not a list of messages: write the chats as JSON.")
        return value, []
    messages = openai_messages(value)
    last = max((index for index, message in enumerate(messages) if message.get("role") == "user"), default=None)
    if last is None:
        roles = quoted_names(dict.fromkeys(str(message.get("role")) for message in messages))
        raise UserError(f"{place}: the chat has no turn of the user, but only of {roles}: remove it.")
    return messages[last].get("content"), ["the turns before the user's last one"] * (last > 0)


def _key(value: Mapping[str, Any], place: str) -> str:
    """The first known name in a record that holds something."""
    names = [[key for key in value if normalised(key) == name] for name in NAMES]
    known = [keys for keys in names if keys]
    if not known:
        raise UserError(f"{_unknown_columns(place, value, None)}.")
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
        raise UserError(f"{_unknown_columns(place, value, prompt_column)}.")
    return keys[0]


def _unknown_columns(place: str, columns: Collection[str], prompt_column: str | None) -> str:
    names = quoted_names(columns)
    if prompt_column is not None:
        hint = did_you_mean(prompt_column, columns)
        return f"{place}: there is no column {shown_text(prompt_column)} among {names}{hint}: write one of these"
    return (
        f"{place}: none of the columns {names} is known to hold prompts ({', '.join(NAMES)}): choose one with "
        f"--prompt-column"
    )


def _text(value: Any, key: str, place: str) -> str:
    """The text without blanks around it, after a check that it can be a prompt."""
    start = f"{place}: {key!r} holds" if key else f"{place}: there is"
    if not isinstance(value, str):
        raise UserError(f"{start} {_kind(value)} where a text is expected: give a text, or a chat with a user's turn.")
    if _WRITTEN_CHAT.match(value):
        raise UserError(f"{start} a list of messages that is written as a text: write the chats as JSON.")
    if not trimmed(value):
        raise UserError(f"{place}: no prompt found, because {key or 'it'!r} is blank: fill it, or remove the entry.")
    if key and normalised(value) == normalised(key):
        raise UserError(f"{start} its own name: it is the header of a table once more, so remove this line.")
    if trimmed(value).casefold() in _MISSING_WORDS or _DASHES.fullmatch(trimmed(value)):
        raise UserError(f"{start} {shown_text(value)}, which stands for a missing value: fill it, or remove the entry.")
    if not is_utf8(value) or "\0" in value:
        raise UserError(f"{place}: half a surrogate pair or a NUL character, which is no text; remove it.")
    return trimmed(value)


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), f"the number {value}" if isinstance(value, int | float) else "no text")
