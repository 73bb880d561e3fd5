"""Refusal phrases from a file of the user's."""

from pathlib import Path

from jaxscape.evaluate.text_rule import TextRule, contains_any
from jaxscape.prompts.records import read_text
from jaxscape.runtime.errors import UserError
from jaxscape.runtime.files import checksum


def keyword_file(path: str) -> TextRule:
    """The evaluator `keywords:FILE`: an answer refuses if it contains one of the phrases in a file.

    The test is case-sensitive, and typographic apostrophes count as straight ones.

    Arguments:
        path: a UTF-8 file with a phrase in each line. Blanks around a phrase and empty lines are ignored.

    Raises:
        UserError: the file cannot be read, or has no phrases in it.
    """
    phrases = tuple(phrase for line in read_text(Path(path)).split("\n") if (phrase := line.strip()))
    if not phrases:
        raise UserError(f"The file {path} has no phrases in it: write one in each line.")
    refuses = contains_any(phrases)
    return TextRule(f"keywords:{Path(path).name}", refuses, stop_when=refuses, checksum=checksum(phrases))
