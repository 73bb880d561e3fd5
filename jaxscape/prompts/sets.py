"""Prompt sets by name, and prompts from files."""

import csv
import http.client
import io
import urllib.request
from collections.abc import Callable
from functools import partial
from importlib.resources import files
from pathlib import Path

from jaxscape.prompts.fields import NAMES, Prompts, prompts_of
from jaxscape.prompts.records import normalised, parse_records, read_records, read_text
from jaxscape.runtime.errors import UserError, reason
from jaxscape.runtime.files import cached_file
from jaxscape.runtime.texts import shown_text

# Zou et al., arXiv 2307.15043; MIT licence.
ADVBENCH_URL = (
    "https://raw.githubusercontent.com/llm-attacks/llm-attacks/098262edf85f807224e70ecd87b9d83716bf6b73"
    "/data/advbench/harmful_behaviors.csv"
)
ADVBENCH_SHA256 = "6cd1a5c63c07610d7eb67307772ee5606017ee950b5770ab288a2c487489d3e1"


def load_prompts(source: str | Path, num_prompts: int | None = None, prompt_column: str | None = None) -> Prompts:
    """The first `num_prompts` prompts of a set, or all of them, as a list that knows where they were read.

    Arguments:
        source: the name of a set or a prompt file. The sets are `harmful` and `benign` (100 prompts each, written for
            this project: matched pairs in ten categories, one prompt of each category in turn), `harmless` (1292, the
            prompts that `smollm2-135m-safe` was trained to answer) and `advbench` (520, downloaded once). A file is a
            table (.csv, .tsv), JSON (.json, .jsonl, .ndjson) or a list with one prompt on each line (.txt). Of a table
            and of JSON objects, the first column is taken that has one of the known names: `goal`, `prompt`,
            `behavior`, `forbidden_prompt`, `question`, `instruction`, `text`; or the last user turn of the chat in
            `messages`, `conversations` or `conversation`; or the first of MT-Bench's `turns`. Where it is blank, the
            next known name is used.
        prompt_column: the column to take instead.

    Raises:
        UserError: there is no set of this name; a file is malformed (the message names the line); a table or JSON has
            none of these columns; a prompt is blank, is no text, or needs another column (such as HarmBench's
            `ContextString`) that would be left out; or there are fewer than `num_prompts` prompts.
    """
    prompts = _load(str(source), prompt_column)
    if num_prompts is None:
        return prompts
    if num_prompts < 1:
        raise UserError(f"The number of prompts must be at least 1, not {num_prompts}.")
    if num_prompts > len(prompts):
        raise UserError(f"{source} has {len(prompts)} prompts, but {num_prompts} were asked for.")
    return prompts.first(num_prompts)


def _load(source: str, prompt_column: str | None) -> Prompts:
    if source in PROMPT_SETS:
        if prompt_column is not None:
            raise UserError(f"The prompt set {source!r} has no columns: leave out --prompt-column.")
        return Prompts(PROMPT_SETS[source](), shown_text(source))
    names = NAMES if prompt_column is None else (*NAMES, normalised(prompt_column))
    unknown = f"There is no prompt set {source!r}: give {', '.join(PROMPT_SETS)}"
    return prompts_of(read_records(source, names, unknown), source, prompt_column)


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


def _advbench_prompts() -> list[str]:
    return prompts_of(parse_records(advbench_text(), "advbench.csv", NAMES), "advbench")


PROMPT_SETS: dict[str, Callable[[], list[str]]] = {
    "harmful": partial(_paired_prompts, "harmful"),
    "benign": partial(_paired_prompts, "benign"),
    "harmless": lambda: _packaged_text("harmless.txt").split("\n")[:-1],
    "advbench": _advbench_prompts,
}
"""The prompt sets by name, as functions that load them."""
