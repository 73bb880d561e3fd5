"""Texts for messages: escaped, quoted, shortened and listed, because names and files can hold any characters."""

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence

from rich.cells import cell_len, set_cell_size


def printable(text: str, kept: str = "") -> str:
    """The text with escapes in place of control characters, which would change the terminal.

    Arguments:
        kept: control characters that stay.
    """
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)


def shown_text(text: str, length: int = 80) -> str:
    """A text that is not to be trusted, quoted on one line, shortened, with control characters escaped."""
    return repr(text if len(text) <= length else text[: length - 1] + "…")


def listed(items: Sequence[str], limit: int = 5, separator: str = ", ") -> str:
    """The first items of a list on one line, and how many more there are: `a, b and 3 more`."""
    return separator.join(items[:limit]) + (f" and {len(items) - limit} more" if len(items) > limit else "")


def quoted_names(names: Collection[str]) -> str:
    """The first twelve names, each as `shown_text` shows it: `'a', 'b' and 3 more`."""
    return listed([shown_text(name, 40) for name in names], 12)


def did_you_mean(name: object, known: Iterable[str], forms: Mapping[str, str] | None = None) -> str:
    """` (did you mean A or B?)` with the known names that are nearest to a misspelled one, or an empty text if none is
    near. Upper and lower case do not matter.

    Arguments:
        forms: how a known name is written, such as `random:SEED` for `random`; None shows the names themselves.
    """
    lowered = {item.lower(): item if forms is None else forms[item] for item in known}
    near = [lowered[item] for item in difflib.get_close_matches(str(name).lower(), lowered)]
    if not near:
        return ""
    *others, last = near
    return f" (did you mean {', '.join(others)}{' or ' if others else ''}{last}?)"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """The rows of a table with columns of equal width, for a terminal; control characters are escaped."""
    cells = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(map(set_cell_size, row, widths)) for row in cells)
    return "\n".join(line.rstrip() for line in lines)
