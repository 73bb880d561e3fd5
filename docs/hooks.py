"""What turns the documents, which read as they are on GitHub, into pages of the site. MkDocs calls the functions."""

import ast
import html
import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
import ziamath
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
RELATIVE_LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)")
MATH_BLOCK = re.compile(r"^```math\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MATH = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
SHARED_ENTRY = re.compile(r"^( +)(\w+(?:, \w+)+)(:.*(?:\n\1 +.*)*)", re.MULTILINE)
EM = 16  # pixels in which formulas are drawn; browsers scale them
PUBLIC_NAME = re.compile(r"^\| (`js\.(\w+)[^`]*`)", re.MULTILINE)

ziamath.config.svg2 = False  # glyphs in place: formulas of a page cannot take one another's
ziamath.config.precision = 2


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The text of a page, in the syntax that MkDocs and its extensions read."""
    if page.file.src_uri == "reference/python.md":
        markdown = with_docstrings(markdown)
    markdown = MATH_BLOCK.sub(r"$$\n\1$$", markdown)
    return with_repository_links(markdown, page.file.src_uri, str(config.repo_url))


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The HTML of a page with its formulas as drawings, for which a browser needs no script and no font."""
    return MATH.sub(lambda match: drawn(html.unescape(match[3]), is_inline=match[2] == "("), content)


def drawn(formula: str, is_inline: bool) -> str:
    """An SVG image of a LaTeX formula, in the size and the colour of the text around it."""
    image = ziamath.Latex(formula, size=EM, inline=is_inline, color="currentColor", title=formula.strip())
    svg = re.sub(
        r'(width|height)="([\d.]+)"', lambda match: f'{match[1]}="{float(match[2]) / EM:.3f}em"', image.svg(), count=2
    )
    style = (
        f"vertical-align: {image.getyofst() / EM:.3f}em"
        if is_inline
        else "display: block; margin: 1em auto; max-width: 100%"
    )
    return svg.replace("<svg ", f'<svg role="img" style="{style}" ', 1)


def with_repository_links(markdown: str, source: str, repository: str) -> str:
    """The text of the page `source` (a path in docs/), in which links to files outside docs/ lead to the repository."""

    def link(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(source), match[1]))
        if path.startswith("docs/"):
            return match[1]
        return f"{repository}/{'tree' if (ROOT / path).is_dir() else 'blob'}/main/{path}"

    return RELATIVE_LINK.sub(link, markdown)


def with_docstrings(markdown: str) -> str:
    """The Python reference, in which the docstrings of a section's names follow its table, which links to them."""
    modules = modules_of_public_names()
    first, *sections = re.split(r"^(?=## )", markdown, flags=re.MULTILINE)
    parts = [first]
    for section in sections:
        names = [name for _, name in PUBLIC_NAME.findall(section)]
        linked = PUBLIC_NAME.sub(lambda match: f"| [{match[1]}][{modules[match[2]]}.{match[2]}]", section)
        docstrings = [
            f"::: {modules[name]}.{name}\n    options:\n      heading: js.{name}\n      toc_label: js.{name}\n"
            for name in names
        ]
        parts.append("\n".join([linked, *docstrings]))
    return "\n".join(parts)


def modules_of_public_names() -> dict[str, str]:
    """The module that defines each public name of the package."""
    stub = ast.parse((ROOT / "jaxscape" / "__init__.pyi").read_text(encoding="utf-8"))
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: f"jaxscape.{node.module}" for node in imports for alias in node.names}


class SplitNames(griffe.Extension):
    """Gives each name of a docstring's entry for several names (`low, high: the ends`) an entry of its own."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = with_split_names(obj.docstring.value)


def with_split_names(docstring: str) -> str:
    """The docstring in which each entry has one name."""
    return SHARED_ENTRY.sub(
        lambda match: "\n".join(f"{match[1]}{name}{match[3]}" for name in match[2].split(", ")), docstring
    )
