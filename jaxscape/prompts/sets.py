"""Prompt sets by name, and prompts from files."""

import csv
import http.client
import io
import json
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from jaxscape.runtime.errors import UserError, is_utf8, reason
from jaxscape.runtime.files import cached_file

# Zou et al., arXiv 2307.15043; MIT licence.
ADVBENCH_URL = (
    "https://raw.githubusercontent.com/llm-attacks/llm-attacks/098262edf85f807224e70ecd87b9d83716bf6b73"
    "/data/advbench/harmful_behaviors.csv"
)
ADVBENCH_SHA256 = "6cd1a5c63c07610d7eb67307772ee5606017ee950b5770ab288a2c487489d3e1"


def load_prompts(source: str | Path, num_prompts: int | None = None) -> list[str]:
    """The first `num_prompts` prompts of a set, or all of them.

    Arguments:
        source: the name of a set or a prompt file. The sets are `harmful` and `benign` (100 prompts each, written for
            this project: matched pairs in ten categories, one prompt of each category in turn), `harmless` (1292, the
            prompts that `smollm2-135m-safe` was trained to answer) and `advbench` (520, downloaded once). A file is
            CSV (the column `goal`, or else the first column), JSONL (strings, or objects with a `goal`, a `prompt`, or
            MT-Bench's `turns`, of which the first is taken) or TXT (one prompt on each line).

    Raises:
        UserError: there is no set of this name, a file is malformed (the message names the line), or the set has fewer
            than `num_prompts` prompts.
    """
    prompts = _load(str(source))
    if num_prompts is None:
        return prompts
    if num_prompts < 1:
        raise UserError(f"The number of prompts must be at least 1, not {num_prompts}.")
    if num_prompts > len(prompts):
        raise UserError(f"{source} has {len(prompts)} prompts, but {num_prompts} were asked for.")
    return prompts[:num_prompts]


def _load(source: str) -> list[str]:
    if source in PROMPT_SETS:
        return PROMPT_SETS[source]()
    path = Path(source)
    parse = PARSERS.get(path.suffix.lower())
    if parse is None:
        *endings, last_ending = PARSERS
        raise UserError(
            f"There is no prompt set {source!r}: give {', '.join(PROMPT_SETS)}, or a file ending in "
            f"{', '.join(endings)} or {last_ending}."
        )
    prompts = parse(read_text(path), source)
    if not prompts:
        raise UserError(f"The prompt file {source} has no prompts in it.")
    return prompts


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Raises:
        UserError: the file cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The file {path} cannot be read as UTF-8 text ({reason(error)}).") from error


def advbench_text() -> str:
    """AdvBench's table of harmful behaviours as CSV with the columns `goal` and `target`. It is downloaded once and
    cached."""
    return read_text(cached_file("advbench.csv", ADVBENCH_SHA256, _download_advbench))


def _download_advbench(path: Path) -> None:
    try:
        with urllib.request.urlopen(ADVBENCH_URL, timeout=30) as response:
            path.write_bytes(response.read())
    except (OSError, http.client.HTTPException) as error:
        raise UserError(
            f"AdvBench could not be downloaded from {ADVBENCH_URL} ({reason(error)}): download the file in another "
            f"way and pass its path instead of 'advbench'."
        ) from error


def _packaged_text(name: str) -> str:
    return files("jaxscape").joinpath(f"data/{name}").read_text(encoding="utf-8")


def _paired_prompts(column: str) -> list[str]:
    """A column of the table of matched harmful and benign prompts."""
    return [row[column] for row in csv.DictReader(io.StringIO(_packaged_text("prompts.csv")))]


def _csv_prompts(text: str, source: str) -> list[str]:
    reader = csv.reader(io.StringIO(text), strict=True)
    try:
        header = next(reader, [])
        column = header.index("goal") if "goal" in header else 0
        prompts = []
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                raise UserError(
                    f"{source}, line {reader.line_num}: {len(row)} columns, but the header has {len(header)}; quote "
                    f"texts that contain commas."
                )
            prompts.append(_checked_prompt(row[column], source, reader.line_num))
        return prompts
    except csv.Error as error:
        raise UserError(f"{source}, line {reader.line_num}: not valid CSV ({reason(error)}).") from error


def _jsonl_prompts(text: str, source: str) -> list[str]:
    prompts = []
    for number, value in json_lines(text, source):
        if isinstance(value, dict):
            turns = value.get("turns")
            value = value.get("goal", value.get("prompt", turns[0] if isinstance(turns, list) and turns else None))
        prompts.append(_checked_prompt(value, source, number))
    return prompts


def json_lines(text: str, source: str) -> Iterator[tuple[int, Any]]:
    """The line number, counted from 1, and the value of each line of a JSONL text. Empty lines are skipped.

    Arguments:
        source: the file's name in error messages.

    Raises:
        UserError: a line is not valid JSON.
    """
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{source}, line {number}: not valid JSON ({reason(error)}).") from error
            yield number, value


def _txt_prompts(text: str, source: str) -> list[str]:
    return [line.strip() for line in text.split("\n") if line.strip()]


def _checked_prompt(value: Any, source: str, line: int) -> str:
    """The value without spaces around it. Raises a `UserError` if it is no text, or only spaces."""
    if not isinstance(value, str) or not value.strip():
        raise UserError(
            f"{source}, line {line}: no prompt found; give a text, or an object with a 'goal', 'prompt' or 'turns'."
        )
    if not is_utf8(value):
        raise UserError(f"{source}, line {line}: half a surrogate pair, which is not valid Unicode; remove it.")
    return value.strip()


PROMPT_SETS: dict[str, Callable[[], list[str]]] = {
    "harmful": partial(_paired_prompts, "harmful"),
    "benign": partial(_paired_prompts, "benign"),
    "harmless": lambda: _txt_prompts(_packaged_text("harmless.txt"), "harmless"),
    "advbench": lambda: _csv_prompts(advbench_text(), "advbench"),
}
"""The prompt sets by name, as functions that load them."""

PARSERS: dict[str, Callable[[str, str], list[str]]] = {
    ".csv": _csv_prompts,
    ".jsonl": _jsonl_prompts,
    ".txt": _txt_prompts,
}
"""For each file ending, the function that returns the prompts in a file's text. Its second argument is the file's name
for error messages."""
