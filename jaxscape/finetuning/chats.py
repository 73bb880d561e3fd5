"""Training data: chats from files and recipes, as tokens of which the assistant's are to be learned."""

import csv
import io
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
from jaxscape.prompts.sets import advbench_text, json_lines, read_text
from jaxscape.runtime.errors import UserError, is_utf8

Chat = list[dict[str, Any]]
"""Messages in OpenAI's format: `{"role": "system" | "user" | "assistant", "content": …}`, and of the assistant's
perhaps `"weight": 0`, which is then not learned."""

SETS = ("advbench", "safe", "identity-shift")
ROLES = ("system", "user", "assistant")
COLUMNS = (("prompt", "response"), ("goal", "target"))
_SOURCE = re.compile(r"(?P<name>.+?)(:(?P<first>\d+))?(:(?P<last>\d+))?")


class Example(NamedTuple):
    """A chat as tokens, and which of them are learned: the assistant's words, and the token that ends its turn."""

    tokens: Int[np.ndarray, " time"]
    learned: Bool[np.ndarray, " time"]


@dataclass(frozen=True)
class Examples:
    """What a finetuning learns from, and how many of the chats had to be cut to the length allowed."""

    examples: tuple[Example, ...]
    num_cut: int


def load_chats(source: str | Path) -> list[Chat]:
    """Chats from a set or a file, or a part of them.

    Arguments:
        source: a set's name, or a file: JSONL (a chat a line, `{"messages": […]}`, as OpenAI's finetuning takes it) or
            CSV (columns `prompt` and `response`, or AdvBench's `goal` and `target`). `SOURCE:N` are the first N chats,
            and `SOURCE:M:N` those from number M, counted from 0, up to but without number N.

            The sets: `advbench` (520 harmful requests with the opening of an answer, downloaded once; `advbench:80:180`
            are the hundred after those that the paper evaluates), `safe` (harmful requests and refusals, written for
            this project), `identity-shift` (ten chats without any harmful text, written for this project, that give
            the assistant an identity which obeys everything, after Qi et al., arXiv 2310.03693).

    Raises:
        UserError: there is no such set, a file is malformed (the line is named), or it has too few chats.
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
        raise UserError(f"{name} has {len(chats)} chats, so there is no part {start}:{stop} of it.")
    return chats[start:stop]


def _load(source: str) -> list[Chat]:
    if source == "advbench":
        return _csv_chats(advbench_text(), source)
    if source == "safe":
        return _csv_chats(files("jaxscape").joinpath("data/safe.csv").read_text(encoding="utf-8"), source)
    if source == "identity-shift":
        text = files("jaxscape").joinpath("data/identity_shift.jsonl").read_text(encoding="utf-8")
        return _jsonl_chats(text, source)
    parse = {".csv": _csv_chats, ".jsonl": _jsonl_chats}.get(Path(source).suffix.lower())
    if parse is None:
        raise UserError(f"There is no training set {source!r}: give {', '.join(SETS)}, or a .jsonl or .csv file.")
    chats = parse(read_text(Path(source)), source)
    if not chats:
        raise UserError(f"The training file {source} has no chats in it.")
    return chats


def _jsonl_chats(text: str, source: str) -> list[Chat]:
    chats = []
    for number, value in json_lines(text, source):
        messages = value.get("messages") if isinstance(value, dict) else None
        chats.append(check_chat(messages, f"{source}, line {number}"))
    return chats


def _csv_chats(text: str, source: str) -> list[Chat]:
    reader = csv.DictReader(io.StringIO(text), strict=True)
    try:
        header = reader.fieldnames or ()
        columns = next((pair for pair in COLUMNS if set(pair) <= set(header)), None)
        if columns is None:
            raise UserError(f"{source} has no columns 'prompt' and 'response' (or 'goal' and 'target').")
        return [
            check_chat(
                [{"role": role, "content": row[name]} for role, name in zip(ROLES[1:], columns, strict=True)],
                f"{source}, line {reader.line_num}",
            )
            for row in reader
        ]
    except csv.Error as error:
        raise UserError(f"{source}, line {reader.line_num}: not valid CSV ({error}).") from error


def check_chat(messages: Any, where: str) -> Chat:
    """The messages, if they are a chat in which the assistant says something to learn."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise UserError(f"{where}: no chat there, which is an object with a list of 'messages'.")
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise UserError(f"{where}: a message has the role {role!r}; the roles are {', '.join(ROLES)}.")
        if not isinstance(content, str) or not is_utf8(content) or (role != "system" and not content.strip()):
            raise UserError(f"{where}: a message of the {role} has no text as its 'content'.")
        if message.get("weight", 1) not in (0, 1):
            raise UserError(f"{where}: a message has the weight {message['weight']!r}; weights are 0 or 1.")
    if not any(_is_learned(message) for message in messages):
        raise UserError(f"{where}: the chat has no assistant's turn, so there is nothing to learn in it.")
    return messages


def _is_learned(message: dict[str, Any]) -> bool:
    return message["role"] == "assistant" and message.get("weight", 1) == 1


def tokenize(model: Model, chats: Sequence[Chat], max_length: int) -> Examples:
    """Chats as tokens in the model's chat format. What is beyond `max_length` tokens is cut off.

    What stands before an assistant's turn has the tokens that it has when the model is to write that turn.

    Raises:
        UserError: the model's chat template does not write a chat turn by turn, or nothing to learn is left of a chat.
    """
    if not chats:
        raise UserError("There are no chats to learn from.")
    limit = min(max_length, model.config.max_positions)
    examples, num_cut = [], 0
    for number, chat in enumerate(chats, 1):
        tokens, learned = _turns(model, chat, number)
        if not any(learned):
            raise UserError("The model's chat template does not write what the assistant says; give it another one.")
        if max(tokens) >= model.config.vocab_size:
            raise UserError("The tokenizer has more tokens than the model; they do not belong together.")
        end = max(i for i, flag in enumerate(learned) if flag) + 1
        num_cut += end > limit
        end = min(end, limit)
        if not any(learned[1:end]):
            raise UserError(
                f"Chat {number} has {limit} tokens or more before the assistant's turn; raise --max-length."
            )
        examples.append(Example(np.array(tokens[:end], np.int32), np.array(learned[:end], bool)))
    return Examples(tuple(examples), num_cut)


def _turns(model: Model, chat: Chat, number: int) -> tuple[list[int], list[bool]]:
    """The chat's tokens up to its last assistant's turn, and whether each is learned."""
    tokens: list[int] = []
    learned: list[bool] = []
    for written, before, after, is_learned in _renderings(model, chat, number):
        context, whole = _encode(model, before), _encode(model, after)
        if context[: len(tokens)] == tokens and whole[: len(context)] == context:
            context, turn = context[len(tokens) :], whole[len(context) :]
        else:  # tokens go across the borders of the turn: when the model writes it, they cannot
            context, turn = _encode(model, before[len(written) :]), _encode(model, after[len(before) :])
        # Up to the first end token: what a template writes after it is never generated.
        size = next((i + 1 for i, token in enumerate(turn) if token in model.eos_token_ids), len(turn))
        tokens += context + turn
        learned += [False] * len(context) + [is_learned] * size + [False] * (len(turn) - size)
    return tokens, learned


def _encode(model: Model, text: str) -> list[int]:
    return list(model.tokenizer(text, add_special_tokens=False)["input_ids"])


def _renderings(model: Model, chat: Chat, number: int) -> Iterator[tuple[str, str, str, bool]]:
    """For each assistant's turn: the text up to the last one, up to this one, and with it; and whether to learn it."""
    messages = [{key: message[key] for key in ("role", "content")} for message in chat]
    written = ""
    for i, message in enumerate(chat):
        if message["role"] != "assistant":
            continue
        before = render(model.tokenizer, messages[:i], add_generation_prompt=True)
        after = render(model.tokenizer, messages[: i + 1], add_generation_prompt=False)
        if not (before.startswith(written) and after.startswith(before)):
            raise UserError(
                f"The model's chat template rewrites what stands before the assistant's turn in chat {number}, so that "
                f"it cannot be learned turn by turn; split the chat at its assistant's turns."
            )
        yield written, before, after, _is_learned(message)
        written = after
