"""The formats that `jaxscape export` writes, by name."""

from collections.abc import Callable
from pathlib import Path

from jaxscape.report.exports.hub import FOLDER, export_hub
from jaxscape.report.exports.inspect_log import export_inspect
from jaxscape.report.exports.landscaper import export_landscaper
from jaxscape.report.exports.reference import export_reference
from jaxscape.report.exports.table_files import export_csv, export_parquet
from jaxscape.report.run import KeptRun, load_finished
from jaxscape.runtime.errors import UserError, reason, unknown_name
from jaxscape.runtime.remote import push, run_directory

DEFAULT_EXPORT = "reference"
EXPORTS: dict[str, Callable[[KeptRun, Path], list[Path]]] = {
    DEFAULT_EXPORT: export_reference,
    "inspect": export_inspect,
    "csv": export_csv,
    "parquet": export_parquet,
    "landscaper": export_landscaper,
    "hub": export_hub,
}
FOLDERS = {"hub": FOLDER}
"""The exports that get a folder of their own in the run's directory."""


def export_run(directory: str | Path, to: str = DEFAULT_EXPORT, out: str | Path | None = None) -> list[Path]:
    """Write a finished scan in the format of another tool.

    Arguments:
        directory: the run's directory.
        to: the name of the format, one of `EXPORTS`.
        out: the directory to write to, which is made if it is missing; None for the run's own directory, or a folder in
            it for what consists of a folder.

    Returns:
        The files written.

    Raises:
        UserError: there is no format of this name, the directory holds no finished scan, the format cannot hold it, a
            library that it needs is not installed, or a file cannot be written.
    """
    if to not in EXPORTS:
        raise unknown_name("format", to, EXPORTS)
    directory = run_directory(directory)
    run = load_finished(directory)
    out = directory / FOLDERS.get(to, "") if out is None else run_directory(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        paths = EXPORTS[to](run, out)
    except OSError as error:
        raise UserError(f"The export cannot be written to {out} ({reason(error)}): choose another --out.") from error
    push(out)
    return paths
