"""Prompt sets by name, and prompts from files."""

import csv
import io
from collections.abc import Callable
from functools import partial
from importlib.resources import files
from pathlib import Path

from jaxscape.prompts.fields import NAMES, Prompts, prompts_of
from jaxscape.prompts.public import PUBLIC_SETS
from jaxscape.prompts.records import normalised, read_records
from jaxscape.runtime.errors import UserError
from jaxscape.runtime.texts import did_you_mean, shown_text


def load_prompts(source: str | Path, num_prompts: int | None = None, prompt_column: str | None = None) -> Prompts:
    """The first `num_prompts` prompts of a set, or all of them, as a list that knows where they were read.

    Arguments:
        source: the name of a set or a prompt file. The package brings `harmful` and `benign` (100 prompts each: matched
            pairs in ten categories, one prompt of each category in turn) and `harmless` (3145, the prompts that
            `smollm2-135m-safe` was trained to answer). Others are downloaded once: `advbench` (520), `jailbreakbench`
            and `jailbreakbench-benign` (100 each), `harmbench` (200), `strongreject` (313), `xstest` (450),
            `xstest-safe` (250), `xstest-unsafe` (200) and `mt-bench` (80). A file is a
            table (.csv, .tsv), JSON (.json, .jsonl, .ndjson) or a list with one prompt on each line (.txt). Of a table
            and of JSON objects, the first column is taken that has one of the known names: `goal`, `prompt`,
            `behavior`, `forbidden_prompt`, `question`, `instruction`, `text`; or the last user turn of the chat in
            `messages`, `conversations` or `conversation`; or the first of MT-Bench's `turns`. Where it is blank, the
            next known name is used. Of a JailbreakBench artifact, the `prompt` of each jailbreak that has one.
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
        if source in PUBLIC_SETS:
            return PUBLIC_SETS[source].load(source)
        return Prompts(_PACKAGED[source](), shown_text(source))
    names = NAMES if prompt_column is None else (*NAMES, normalised(prompt_column))
    hint = did_you_mean(source, PROMPT_SETS)
    unknown = f"There is no prompt set {source!r}{hint}: give {', '.join(PROMPT_SETS)}"
    return prompts_of(read_records(source, names, unknown), source, prompt_column)


def _packaged_text(name: str) -> str:
    return files("jaxscape").joinpath(f"data/{name}").read_text(encoding="utf-8")


def _paired_prompts(column: str) -> list[str]:
    """A column of the table of matched harmful and benign prompts."""
    return [row[column] for row in csv.DictReader(io.StringIO(_packaged_text("prompts.csv")))]


_PACKAGED: dict[str, Callable[[], list[str]]] = {
    "harmful": partial(_paired_prompts, "harmful"),
    "benign": partial(_paired_prompts, "benign"),
    "harmless": lambda: _packaged_text("harmless.txt").split("\n")[:-1],
}

PROMPT_SETS = (*_PACKAGED, *PUBLIC_SETS)
"""The names of the prompt sets."""
