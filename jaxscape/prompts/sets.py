"""Prompt sets, and the text that a chat model is given for a prompt."""

import csv
import http.client
import io
import json
import urllib.request
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from jaxscape.runtime.errors import UserError, is_utf8
from jaxscape.runtime.files import cached_file

BUILT_IN = ("harmful", "benign")
NAMES = (*BUILT_IN, "harmless", "advbench")

# Zou et al., arXiv 2307.15043; MIT licence.
ADVBENCH_URL = (
    "https://raw.githubusercontent.com/llm-attacks/llm-attacks/098262edf85f807224e70ecd87b9d83716bf6b73"
    "/data/advbench/harmful_behaviors.csv"
)
ADVBENCH_SHA256 = "6cd1a5c63c07610d7eb67307772ee5606017ee950b5770ab288a2c487489d3e1"


def load_prompts(source: str | Path, num_prompts: int | None = None) -> list[str]:
    """The first `num_prompts` prompts of a set, or all of them.

    Arguments:
        source: `harmful` or `benign` (100 each, written for this project, pairwise matched over ten categories, which
            take turns), `harmless` (1292, which `smollm2-135m-safe` learned to answer), `advbench` (520, downloaded
            once), or a file: CSV (the `goal` column, or the first), JSONL (strings, or objects with a `goal`, a
            `prompt`, or MT-Bench's `turns`, of which the first is taken) or TXT (a prompt a line).

    Raises:
        UserError: there is no such set, a file is malformed (the line is named), or it has too few prompts.
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
    if source in BUILT_IN:
        text = files("jaxscape").joinpath("data/prompts.csv").read_text(encoding="utf-8")
        return [row[source] for row in csv.DictReader(io.StringIO(text))]
    if source == "harmless":
        return _txt_prompts(files("jaxscape").joinpath("data/harmless.txt").read_text(encoding="utf-8"), source)
    if source == "advbench":
        return _csv_prompts(advbench_text(), source)
    path = Path(source)
    parse = {".csv": _csv_prompts, ".jsonl": _jsonl_prompts, ".txt": _txt_prompts}.get(path.suffix.lower())
    if parse is None:
        raise UserError(
            f"There is no prompt set {source!r}: give {', '.join(NAMES)}, or a file ending in .csv, .jsonl or .txt."
        )
    prompts = parse(read_text(path), source)
    if not prompts:
        raise UserError(f"The prompt file {source} has no prompts in it.")
    return prompts


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The file {path} cannot be read as UTF-8 text ({error}).") from error


def advbench_text() -> str:
    """AdvBench's table of harmful behaviours, from the cache or its home: columns `goal` and `target`."""
    return read_text(cached_file("advbench.csv", ADVBENCH_SHA256, _download_advbench))


def _download_advbench(path: Path) -> None:
    try:
        with urllib.request.urlopen(ADVBENCH_URL, timeout=30) as response:
            path.write_bytes(response.read())
    except (OSError, http.client.HTTPException) as error:
        raise UserError(
            f"AdvBench could not be downloaded from {ADVBENCH_URL} ({error}); download that file by other means and "
            f"pass its path instead of 'advbench'."
        ) from error


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
                    f"{source}, line {reader.line_num}: {len(row)} columns where {len(header)} stand above."
                )
            prompts.append(_checked(row[column], source, reader.line_num))
        return prompts
    except csv.Error as error:
        raise UserError(f"{source}, line {reader.line_num}: not valid CSV ({error}).") from error


def _jsonl_prompts(text: str, source: str) -> list[str]:
    prompts = []
    for number, value in json_lines(text, source):
        if isinstance(value, dict):
            turns = value.get("turns")
            value = value.get("goal", value.get("prompt", turns[0] if isinstance(turns, list) and turns else None))
        prompts.append(_checked(value, source, number))
    return prompts


def json_lines(text: str, source: str) -> Iterator[tuple[int, Any]]:
    """The values of a JSONL text with the numbers of their lines; empty lines are passed over."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{source}, line {number}: not valid JSON ({error}).") from error
            yield number, value


def _txt_prompts(text: str, source: str) -> list[str]:
    return [line.strip() for line in text.split("\n") if line.strip()]


def _checked(value: Any, source: str, line: int) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UserError(
            f"{source}, line {line}: no prompt there (a text, or an object with a 'goal', 'prompt' or 'turns')."
        )
    if not is_utf8(value):
        raise UserError(f"{source}, line {line}: half a surrogate pair, which is no text.")
    return value.strip()
