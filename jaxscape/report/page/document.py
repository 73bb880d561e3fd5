"""The report as one HTML file, which needs no network.

What a run holds, model output above all, is untrusted. It reaches the file in two forms only, which no browser runs or
reads as HTML: as JSON in which `<`, `>` and `&` are escaped, and as Base64. The page's scripts show it as text. A
Content-Security-Policy names those scripts by their checksums. The browser runs nothing else, and loads nothing.
"""

import base64
import gzip
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jaxscape.landscapes.comparison import run_names
from jaxscape.report.page.content import answers_content, page_content
from jaxscape.report.run import KeptRun, load_run
from jaxscape.runtime.errors import UserError, as_list, reason
from jaxscape.runtime.files import write_whole
from jaxscape.runtime.remote import run_directory

FILE_NAME = "report.html"
STYLE, TEMPLATE = "page.css", "page.html"
SCRIPTS = ("texts.js", "places.js", "drawings.js", "figures.js", "answers.js", "reader.js", "tables.js", "page.js")
_PLACE = re.compile(r"\{\{(\w+)\}\}")


def save_report(runs: str | Path | Sequence[str | Path], path: str | Path | None = None) -> Path:
    """Write a report on scans, finished or not, as one HTML file. The same runs always give the same bytes.

    Arguments:
        runs: the directories of the scans.
        path: the file; None stands for `report.html`, in the directory of the scan if there is one, and in the current
            directory if there are several.

    Returns:
        The file written.

    Raises:
        UserError: there are no runs, one is given twice, a directory holds no scan, or the file cannot be written.
    """
    directories = [run_directory(run) for run in ([runs] if isinstance(runs, str | Path) else as_list(runs, "runs"))]
    if not directories:
        raise UserError("A report needs at least one run: give the directory of a scan.")
    names = run_names(directories)
    text = document(dict(zip(names, map(load_run, directories), strict=True)))
    path = Path(path or (directories[0] / FILE_NAME if len(directories) == 1 else FILE_NAME))
    try:
        write_whole(path, text)
    except OSError as error:
        raise UserError(f"The report cannot be written to {path} ({reason(error)}): choose another --out.") from error
    return path


def document(runs: Mapping[str, KeptRun]) -> str:
    """The text of the HTML file, which shows runs by their names."""
    scripts = [_plotly(), "\n".join(map(_asset, SCRIPTS))]
    parts = {
        "policy": policy(scripts),
        "style": _asset(STYLE),
        "content": json_text(page_content(runs)),
        "answers": "\n".join(_answers(list(runs.values()))),
        "plotly": scripts[0],
        "script": scripts[1],
    }
    return _PLACE.sub(lambda place: parts[place[1]], _asset(TEMPLATE))


def policy(scripts: Sequence[str]) -> str:
    """A Content-Security-Policy that allows these scripts, styles, and images that are part of the page.

    Plotly writes a style sheet, and draws its surfaces into images of the page.
    """
    checksums = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = {
        "default-src": "'none'",
        "script-src": " ".join(f"'sha256-{checksum}'" for checksum in checksums),
        "style-src": "'unsafe-inline'",
        "img-src": "data: blob:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in allowed.items())


def json_text(value: Any) -> str:
    """The value as JSON that is safe within HTML: in ASCII, which escapes U+2028 and lone surrogates too, and with no
    character that could end the element or begin another one."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return re.sub("[<>&]", lambda character: f"\\u{ord(character[0]):04x}", text)


def packed(value: Any) -> str:
    """The value as JSON, compressed by gzip, in Base64."""
    return base64.b64encode(gzip.compress(json_text(value).encode(), mtime=0)).decode()


def _answers(runs: Sequence[KeptRun]) -> list[str]:
    """For each point of each run, an element with its answers."""
    return [
        f'<script type="application/gzip" id="answers-{index}-{point[0]}-{run.numbers[point]}">'
        f"{packed(answers_content(run, number))}</script>"
        for index, run in enumerate(runs)
        for number, point in enumerate(run.points)
    ]


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _plotly() -> str:
    """The source of plotly.js, which draws the figures."""
    source = resources.files("plotly").joinpath("package_data", "plotly.min.js").read_text(encoding="utf-8")
    return source.replace("</script", "<\\/script")
