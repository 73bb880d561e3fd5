"""What turns the documents, which read as they are on GitHub, into pages of the site. MkDocs calls the functions."""

import ast
import html
import posixpath
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
RELATIVE_LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)")
MATH_BLOCK = re.compile(r"^```math\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MATH = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
PUBLIC_NAME = re.compile(r"^\| (`js\.(\w+)[^`]*`)", re.MULTILINE)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The text of a page, in the syntax that MkDocs and its extensions read."""
    if page.file.src_uri == "reference/python.md":
        markdown = with_docstrings(markdown)
    markdown = MATH_BLOCK.sub(r"$$\n\1$$", markdown)
    return with_repository_links(markdown, page.file.src_uri, str(config.repo_url))


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The HTML of a page, with formulas in MathML, which browsers draw without a script."""
    return MATH.sub(
        lambda match: convert(html.unescape(match[3]), display="inline" if match[2] == "(" else "block"), content
    )


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
