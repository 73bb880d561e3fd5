"""The path of a finetuning through weight space, and its projection onto the plane of a landscape."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxscape.directions.sums import inner
from jaxscape.models.checkpoint import Params
from jaxscape.runtime.errors import UserError
from jaxscape.runtime.files import write_whole

FILE_NAME = "trajectory.json"


@dataclass(frozen=True, eq=False)
class Trajectory:
    """A finetuning's checkpoints as points of a plane (or a line).

    Attributes:
        coords: float64[checkpoints, directions]; the first is the model that the finetuning started from, at 0.
        residual: float64[checkpoints], the part of each checkpoint's distance from the start that the projection leaves
            out: 0 lies in the plane, 1 is at right angles to it.
    """

    name: str
    coords: Float[np.ndarray, "checkpoints ndim"]
    residual: Float[np.ndarray, " checkpoints"]


def project(name: str, steps: Iterable[Params], directions: Sequence[Params]) -> Trajectory:
    """Project a path onto the space that directions span, which need not be orthogonal, by least squares.

    Arguments:
        steps: the differences of each checkpoint from the start, trees like the directions; taken one at a time.

    Raises:
        UserError: a direction is zero, or two are parallel.
    """
    gram = np.array([[inner(a, b) for b in directions] for a in directions])
    lengths = np.sqrt(np.diag(gram))
    if not lengths.all() or np.linalg.cond(gram / np.outer(lengths, lengths)) > 1e6:
        raise UserError(
            f"The directions span no {len(directions)}D space to project onto: one is zero, or two parallel."
        )
    coords, residual = [np.zeros(len(directions))], [0.0]
    for step in steps:
        along = np.array([inner(direction, step) for direction in directions])
        coords.append(np.linalg.solve(gram, along))
        square = inner(step, step)
        residual.append(float(np.sqrt(max(1 - coords[-1] @ along / square, 0))) if square else 0.0)
    return Trajectory(name, np.array(coords), np.array(residual))


def save_trajectories(trajectories: Sequence[Trajectory], directory: str | Path) -> None:
    """Write `trajectory.json` beside a landscape."""
    content = [
        {"name": path.name, "coords": path.coords.tolist(), "residual": path.residual.tolist()} for path in trajectories
    ]
    try:
        write_whole(Path(directory) / FILE_NAME, json.dumps(content, indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise UserError(f"The trajectories cannot be written to {directory} ({error}).") from error


def load_trajectories(directory: str | Path) -> list[Trajectory]:
    """Read `trajectory.json`, if a run's directory has one.

    Raises:
        UserError: it is damaged.
    """
    path = Path(directory) / FILE_NAME
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        found = []
        for item in content:
            coords, residual = (np.array(item[key], np.float64) for key in ("coords", "residual"))
            if coords.ndim != 2 or residual.shape != coords.shape[:1]:
                raise ValueError(f"coordinates of shape {coords.shape}")
            found.append(Trajectory(str(item["name"]), coords, residual))
        return found
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is not a file of trajectories ({type(error).__name__}).") from error
