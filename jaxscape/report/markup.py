"""Plain text and rows as Markdown and LaTeX."""

import re

MINUS = "\N{MINUS SIGN}"

Rows = list[list[str]]
"""The cells of a table as plain text; the first row is the head."""


def visible(text: str) -> str:
    """The text with a question mark for each character that cannot be seen, such as a control character."""
    return "".join(character if character.isprintable() else "?" for character in text)


def markdown(text: str) -> str:
    """The text as Markdown shows it, with every mark escaped."""
    # The table is also printed, and not every terminal has a minus sign.
    return re.sub(r"([\\`*_\[\]<>|~$&#])", r"\\\1", visible(text)).replace(MINUS, "-")


def markdown_table(rows: Rows) -> str:
    """The rows as a Markdown table; the first row is the head."""
    head, *body = ([markdown(cell) for cell in row] for row in rows)
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body))


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "`": r"\textasciigrave{}",
    MINUS: "$-$",
    # After the end of a row these two would belong to its command.
    "[": "{[}",
    "*": "{*}",
    **{character: f"\\{character}" for character in "{}$&#_%"},
}


def latex(text: str) -> str:
    """The text as LaTeX shows it, with every command escaped."""
    escaped = "".join(_LATEX.get(character, character) for character in visible(text))
    return re.sub("-(?=-)", "-{}", escaped)  # two in a row would make a dash


def latex_table(rows: Rows, columns: str) -> str:
    """The rows as a LaTeX tabular with these columns; the first row is the head."""
    head, *body = (" & ".join(map(latex, row)) + r" \\" for row in rows)
    return "\n".join([rf"\begin{{tabular}}{{{columns}}}", head, r"\hline", *body, r"\end{tabular}"])
