"""Points in weight space that are listed one by one, in a file or an array: their coordinates along directions."""

import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from jaxscape.runtime.errors import UserError, reason
from jaxscape.runtime.remote import fetched

Coords = tuple[float, ...]


def load_points(path: str | Path) -> tuple[Coords, ...]:
    """The points in a file: a row of a .csv file, or a list in the list of a .json file, for each point.

    The first line of a CSV file may hold names. It does if none of its cells is a number.

    Raises:
        UserError: the file cannot be read, or is no list of different points with as many coordinates each.
    """
    path = fetched(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"The points in {path} cannot be read ({reason(error)}): give a CSV or JSON file.") from error
    readers = {".csv": _csv_rows, ".json": _json_rows}
    if path.suffix.lower() not in readers:
        raise UserError(f"The points in {path} cannot be read: give a file whose name ends with .csv or .json.")
    return _checked(list(readers[path.suffix.lower()](text, path)), str(path))


def as_points(points: Any) -> tuple[Coords, ...]:
    """The points of an array [points, directions], or of a list of lists.

    Raises:
        UserError: the argument is no list of different points with as many coordinates each.
    """
    if not isinstance(points, list | tuple | np.ndarray):
        raise UserError(f"The points are a {type(points).__name__}: give an array or a list of lists of coordinates.")
    return _checked([(f"point {number}", row) for number, row in enumerate(points)], "The list")


def check_coordinates(points: Sequence[Coords], num_directions: int) -> None:
    """Raise a `UserError` if the points do not have a coordinate for each direction of a set."""
    if len(points[0]) != num_directions:
        raise UserError(
            f"The points have {len(points[0])} coordinates, but there are {num_directions} directions in a set: give "
            f"one direction for each coordinate."
        )


def _csv_rows(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a CSV file, with where each stands; blank lines are left out."""
    reader = csv.reader(io.StringIO(text), strict=True)
    is_first = True
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                cells = list(map(_number, row))
                if not is_first or any(isinstance(cell, float) for cell in cells):  # names are no numbers
                    yield f"{path}, line {reader.line_num}", cells
                is_first = False
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}, is not CSV ({reason(error)}).") from error


def _json_rows(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    """The lists of a JSON file, with where each stands."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({reason(error)}).") from error
    if not isinstance(content, list):
        raise UserError(f"{path} holds no list: write the points as [[0.1, 0.2], [0.3, 0.4]].")
    yield from ((f"{path}, point {number}", row) for number, row in enumerate(content))


def _checked(rows: Sequence[tuple[str, Any]], source: str) -> tuple[Coords, ...]:
    """The rows as points.

    Raises:
        UserError: there are none, or one is no list of finite numbers, has another length, or is there twice.
    """
    if not rows:
        raise UserError(f"{source} has no points: give at least one.")
    places: dict[Coords, str] = {}
    for place, row in rows:
        point = _point(place, row)
        if (other := places.setdefault(point, place)) is not place:
            raise UserError(f"{place}: {list(point)} is there already ({other}): give each point once.")
        first = next(iter(places))
        if len(point) != len(first):
            raise UserError(f"{place}: {len(point)} coordinates, but {places[first]}, has {len(first)}.")
    return tuple(places)


def _point(place: str, row: Any) -> Coords:
    if not isinstance(row, list | tuple | np.ndarray) or np.size(row) == 0:
        raise UserError(f"{place}: {row!r:.60} is no list of coordinates.")
    for cell in row:
        if not _is_finite(cell):
            raise UserError(f"{place}: {cell!r:.60} is no coordinate: give finite numbers.")
    return tuple(float(cell) + 0.0 for cell in row)  # -0.0 is 0.0


def _is_finite(cell: Any) -> bool:
    """Whether a cell is a number that a float can hold."""
    try:
        return isinstance(cell, Real) and not isinstance(cell, bool) and math.isfinite(cell)
    except OverflowError:  # a whole number beyond all floats
        return False


def _number(cell: str) -> float | str:
    """The number that a cell's text stands for, or the text if it stands for none."""
    try:
        return cell if "_" in cell else float(cell)
    except ValueError:
        return cell
