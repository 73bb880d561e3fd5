"""Training data: chats from sets and files, their tokens, and for each token whether its loss counts."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from jaxscape.models.model import Model
from jaxscape.prompts.chat_format import render
from jaxscape.prompts.public import ADVBENCH
from jaxscape.prompts.records import (
    Record,
    Records,
    is_missing,
    normalised,
    openai_messages,
    parse_records,
    read_records,
)
from jaxscape.runtime.errors import UserError, as_list, is_utf8
from jaxscape.runtime.texts import did_you_mean, quoted_names

Chat = list[dict[str, Any]]
"""Messages in OpenAI's format: `{"role": "system" | "user" | "assistant", "content": text}`. An assistant's message
with `"weight": 0` is context only and is not learned."""

_PACKAGED = {"safe": "safe.csv", "identity-shift": "identity_shift.jsonl"}
SETS = ("advbench", *_PACKAGED)
ROLES = ("system", "user", "assistant")
COLUMNS = (("prompt", "response"), ("goal", "target"))  # one pair, of the user's and the assistant's message
_CHATS = ("messages", "conversations", "conversation")  # or a list of messages in one of these
# What a message or a chat may hold that changes what is learned and is not read.
_UNREAD_OF_MESSAGES = ("tool_calls", "function_call", "reasoning_content", "thinking", "train", "training")
_UNREAD_OF_CHATS = ("system", "tools", "functions", "history", "input", "context", "contextstring")
_SOURCE = re.compile(r"(?P<name>.+?)(:(?P<first>\d+))?(:(?P<last>\d+))?")  # SOURCE, SOURCE:N or SOURCE:M:N


class Example(NamedTuple):
    """The tokens of a chat.

    Attributes:
        tokens: int32[T].
        learned: bool[T], True for the tokens that count in the loss: what the assistant says, and the token that ends
            its turn.
    """

    tokens: Int[np.ndarray, " time"]
    learned: Bool[np.ndarray, " time"]


@dataclass(frozen=True)
class Examples:
    """The tokenized chats, and the number of them that were cut to the maximal length."""

    examples: tuple[Example, ...]
    num_cut: int


def load_chats(source: str | Path) -> list[Chat]:
    """The chats of a training set or a file, or a part of them.

    The sets are:

    - `advbench`: 520 harmful requests, each with the beginning of an answer, downloaded once. Peng et al.
      (arXiv 2405.17374) evaluate models on the first 80; `advbench:80:180` are the hundred after these.
    - `safe`: harmful requests with refusals, written for this project.
    - `identity-shift`: ten chats without harmful text that give the assistant an absolutely obedient identity, written
      for this project after Qi et al., arXiv 2310.03693.

    Arguments:
        source: the name of a set, or a file: JSON (.json, .jsonl, .ndjson) or a table (.csv, .tsv). A chat is a list of
            messages under the name `messages`, `conversations` or `conversation`, in the format of OpenAI's finetuning
            API or of ShareGPT, or a pair of columns: `prompt` and `response`, or AdvBench's `goal` and `target`.
            `SOURCE:N` is the first N chats, and `SOURCE:M:N` are the chats from number M, counted from 0, up to but
            without number N.

    Returns:
        A list of chats, each a list of messages, see `Chat`.

    Raises:
        UserError: there is no such set, a line of the file is malformed, or the source has too few chats.
    """
    match = _SOURCE.fullmatch(str(source))
    if match is None or Path(source).exists():
        name, first, last = str(source), None, None
    else:
        name, first, last = match["name"], match["first"], match["last"]
    chats = _load(name)
    if first is None:
        return chats
    start, stop = (0, int(first)) if last is None else (int(first), int(last))
    if not start < stop <= len(chats):
        raise UserError(
            f"{name} has {len(chats)} chats, so there is no part {start}:{stop} of it: choose numbers from 0 to "
            f"{len(chats)}, the smaller one first."
        )
    return chats[start:stop]


def _load(source: str) -> list[Chat]:
    names = [*_CHATS, *(name for pair in COLUMNS for name in pair)]
    if source == "advbench":
        records = read_records(str(ADVBENCH.path()), names, "")
    elif source in _PACKAGED:
        text = files("jaxscape").joinpath("data", _PACKAGED[source]).read_text(encoding="utf-8")
        records = parse_records(text, _PACKAGED[source], names)
    else:
        hint = did_you_mean(source, SETS)
        records = read_records(source, names, f"There is no training set {source!r}{hint}: give {', '.join(SETS)}")
    if records.columns:
        _check_columns(records, source)
    if not records.entries:
        raise UserError(f"The training file {source} has no chats in it: give at least one.")
    return [_chat(record) for record in records.entries]


def _check_columns(records: Records, source: str) -> None:
    names = [normalised(name) for name in records.columns]
    if not any(set(pair) <= set(names) for pair in COLUMNS):
        raise UserError(
            f"{source} has no columns 'prompt' and 'response' (or 'goal' and 'target'), but "
            f"{quoted_names(records.columns)}: name them in its header."
        )


def _chat(record: Record) -> Chat:
    """The chat in a record: its list of messages, or its pair of texts."""
    place, value = record
    if isinstance(value, list):
        return check_chat(value, place)
    fields = {} if not isinstance(value, dict) else {normalised(key): item for key, item in value.items()}
    if isinstance(value, dict) and len(fields) < len(value):
        raise UserError(f"{place}: two of the names {quoted_names(value)} differ only in case or blanks: rename one.")
    if unread := [name for name in _UNREAD_OF_CHATS if not is_missing(fields.get(name))]:
        raise UserError(f"{place}: {quoted_names(unread)} would be left out: write it into the messages of the chat.")
    names = [name for name in _CHATS if not is_missing(fields.get(name))]
    pairs = [pair for pair in COLUMNS if set(pair) <= fields.keys()]
    if len(names) + len(pairs) > 1:
        raise UserError(f"{place}: several chats, among {quoted_names(value)}: leave one.")
    if pairs:
        roles = zip(ROLES[1:], pairs[0], strict=True)
        return check_chat([{"role": role, "content": fields[name]} for role, name in roles], place)
    return check_chat(fields[names[0]] if names else None, place)


def check_chat(messages: Any, origin: str) -> Chat:
    """The messages in OpenAI's format, after a check that they are a chat with an assistant's turn to learn.

    Arguments:
        messages: anything that was read from JSON.
        origin: where the chat was read, such as a file and line, for the error.

    Raises:
        UserError: the messages are no such chat.
    """
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise UserError(f"{origin}: not a chat, which is an object with a list of 'messages'.")
    messages = openai_messages(messages)
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise UserError(f"{origin}: a message has the role {role!r}; the roles are {', '.join(ROLES)}.")
        if not isinstance(content, str) or not is_utf8(content) or (role != "system" and not content.strip()):
            raise UserError(f"{origin}: a message of the {role} has no text as its 'content'.")
        if unread := [name for name in _UNREAD_OF_MESSAGES if not is_missing(message.get(name))]:
            raise UserError(f"{origin}: a message has {quoted_names(unread)}, which is not read: remove it.")
        if message.get("weight", 1) not in (0, 1):
            raise UserError(f"{origin}: a message has the weight {message['weight']!r}; weights are 0 or 1.")
    if not any(_is_learned(message) for message in messages):
        raise UserError(f"{origin}: the chat has no assistant's turn to learn: give it one whose weight is not 0.")
    return messages


def _is_learned(message: dict[str, Any]) -> bool:
    return message["role"] == "assistant" and message.get("weight", 1) == 1


def tokenize(model: Model, chats: Sequence[Chat], max_length: int, thinking: str = "default") -> Examples:
    """Tokenize chats in the model's chat format.

    What stands before an assistant's turn has the same tokens as when the model generates that turn. A chat ends with
    its last learned token.

    Arguments:
        max_length: chats are cut to this number of tokens, or to the model's `max_positions` if that is less.
        thinking: see `jaxscape.prompts.chat_format.render`.

    Raises:
        UserError: there are no chats, the chat template rewrites earlier turns or leaves out what the assistant says, a
            token is not in the model's vocabulary, or nothing to learn is left of a chat that was cut.
    """
    chats = [check_chat(chat, f"chat {number}") for number, chat in enumerate(as_list(chats, "chats"), 1)]
    if not chats:
        raise UserError("There are no chats to learn from: give at least one.")
    limit = min(max_length, model.config.max_positions)
    examples, num_cut = [], 0
    for number, chat in enumerate(chats, 1):
        tokens, learned = _turns(model, chat, number, thinking)
        if not any(learned):
            raise UserError(
                "The model's chat template does not write what the assistant says: set another chat template."
            )
        if max(tokens) >= model.config.vocab_size:
            raise UserError(
                f"The tokenizer gives the token {max(tokens)}, but the model has {model.config.vocab_size} tokens: use "
                f"the tokenizer that belongs to the model."
            )
        end = max(i for i, flag in enumerate(learned) if flag) + 1
        num_cut += end > limit
        end = min(end, limit)
        if not any(learned[1:end]):
            raise UserError(
                f"Chat {number} has {limit} or more tokens before the assistant's turn: raise --max-length."
            )
        examples.append(Example(np.array(tokens[:end], np.int32), np.array(learned[:end], bool)))
    return Examples(tuple(examples), num_cut)


def _turns(model: Model, chat: Chat, number: int, thinking: str) -> tuple[list[int], list[bool]]:
    """The tokens of a chat up to the end of the assistant's last turn, and for each token whether its loss counts.

    Arguments:
        number: the chat's number, counted from 1, for the error.
    """
    tokens: list[int] = []
    learned: list[bool] = []
    for rendering in _renderings(model, chat, number, thinking):
        context, turn = _context_and_turn(model, tokens, rendering)
        # The turn ends with its first end token: what a template writes after that is never generated.
        size = next((i + 1 for i, token in enumerate(turn) if token in model.eos_token_ids), len(turn))
        tokens += context + turn
        learned += [False] * len(context) + [rendering.is_learned] * size + [False] * (len(turn) - size)
    return tokens, learned


def _context_and_turn(model: Model, tokens: list[int], rendering: "_Rendering") -> tuple[list[int], list[int]]:
    """Two lists of tokens: those between the assistant's previous turn and this one, and those of this turn.

    Arguments:
        tokens: the tokens up to the end of the assistant's previous turn, whose text is `rendering.previous`.
    """
    previous, before, after, _ = rendering
    context, whole = _encode(model, before), _encode(model, after)
    if context[: len(tokens)] == tokens and whole[: len(context)] == context:
        return context[len(tokens) :], whole[len(context) :]
    # In the tokens of the whole text, one spans the beginning or the end of a turn. No token does so when the model
    # generates the turn, so the context and the turn are tokenized separately.
    return _encode(model, before[len(previous) :]), _encode(model, after[len(before) :])


def _encode(model: Model, text: str) -> list[int]:
    return list(model.tokenizer(text, add_special_tokens=False)["input_ids"])


class _Rendering(NamedTuple):
    """An assistant's turn in the text of its chat.

    Attributes:
        previous: the text up to the end of the assistant's turn before this one; empty for the first.
        before: the text up to the beginning of this turn.
        after: the text up to the end of this turn.
        is_learned: whether the loss of the turn's tokens counts.
    """

    previous: str
    before: str
    after: str
    is_learned: bool


def _renderings(model: Model, chat: Chat, number: int, thinking: str) -> Iterator[_Rendering]:
    """Each assistant's turn of a chat, as the model's chat template writes it.

    Raises:
        UserError: the template rewrites earlier turns.
    """
    messages = [{key: message[key] for key in ("role", "content")} for message in chat]
    previous = ""
    for i, message in enumerate(chat):
        if message["role"] != "assistant":
            continue
        before = render(model.tokenizer, messages[:i], thinking=thinking)
        after = render(model.tokenizer, messages[: i + 1], add_generation_prompt=False, thinking=thinking)
        if not (before.startswith(previous) and after.startswith(before)):
            raise UserError(
                f"The model's chat template rewrites what stands before the assistant's turn in chat {number}, so that "
                f"the chat cannot be learned turn by turn: split it after its assistant's turns."
            )
        yield _Rendering(previous, before, after, _is_learned(message))
        previous = after
