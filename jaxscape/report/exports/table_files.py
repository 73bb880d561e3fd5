"""Exports of a run as two tables, `points` and `generations`: CSV for spreadsheets, Parquet for data frames."""

import io
from pathlib import Path

from jaxscape.report.csv_text import csv_text
from jaxscape.report.exports.rows import answer_rows, point_rows
from jaxscape.report.run import KeptRun
from jaxscape.runtime.extras import import_extra
from jaxscape.runtime.files import write_whole

POINTS, GENERATIONS = "points", "generations"


def export_csv(run: KeptRun, out: Path) -> list[Path]:
    """Write `points.csv` and `generations.csv` into a directory, with the columns of `point_rows` and
    `answer_rows`, and texts as `csv_text` writes them. Returns the files."""
    tables = {POINTS: csv_text(point_rows(run)), GENERATIONS: csv_text(answer_rows(run))}
    for name, text in tables.items():
        write_whole(out / f"{name}.csv", text)
    return [out / f"{name}.csv" for name in tables]


def export_parquet(run: KeptRun, out: Path) -> list[Path]:
    """Write `points.parquet` and `generations.parquet` into a directory, with the columns of `point_rows` and
    `answer_rows`.
    Texts are exactly what the model wrote. Returns the files.

    Raises:
        UserError: pyarrow is not installed.
    """
    arrow, parquet = import_extra("pyarrow", "parquet"), import_extra("pyarrow.parquet", "parquet")
    tables = {POINTS: point_rows(run), GENERATIONS: list(answer_rows(run))}
    for name, rows in tables.items():
        buffer = io.BytesIO()
        parquet.write_table(arrow.Table.from_pylist(rows), buffer)
        write_whole(out / f"{name}.parquet", buffer.getvalue())
    return [out / f"{name}.parquet" for name in tables]
