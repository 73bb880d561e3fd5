"""Rows as the text of a CSV file, which a spreadsheet can open without running what is in it."""

import csv
import io
from collections.abc import Iterable, Mapping
from typing import Any

FORMULA_STARTS = (
    *"=+-@\t\r\n",
    "\N{FULLWIDTH EQUALS SIGN}",
    "\N{FULLWIDTH PLUS SIGN}",
    "\N{FULLWIDTH HYPHEN-MINUS}",
    "\N{FULLWIDTH COMMERCIAL AT}",
)
"""What a cell begins with that a spreadsheet runs as a formula, or may; see OWASP, "CSV Injection"."""


def csv_text(rows: Iterable[Mapping[str, Any]]) -> str:
    """The text of a CSV file with a head, in the format of RFC 4180 but for lines that end with a newline alone.

    Texts stand in quotes and numbers do not, so a text that looks like a number stays a text. Texts are as
    `without_formula` gives them. None is an empty cell.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    for index, row in enumerate(rows):
        if index == 0:
            writer.writerow(map(without_formula, row))
        writer.writerow([without_formula(cell) if isinstance(cell, str) else cell for cell in row.values()])
    return text.getvalue()


def without_formula(text: str) -> str:
    """The text with an apostrophe before it if a spreadsheet would take it for a formula. A text that begins with an
    apostrophe gets one more, so that leaving out one at the beginning gives the text back."""
    return f"'{text}" if text.startswith((*FORMULA_STARTS, "'")) else text
