"""The path of a finetuning through weight space, projected onto the plane of a landscape, and its file.

Importing this module does not import jax, which a figure can be drawn without.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from jaxscape.runtime.errors import UserError, reason
from jaxscape.runtime.files import write_whole

if TYPE_CHECKING:
    from jaxscape.models.checkpoint import Params

FILE_NAME = "trajectory.json"
MAX_CONDITION = 1e6  # directions whose normalised Gram matrix has a larger condition number count as parallel


@dataclass(frozen=True, eq=False)
class Trajectory:
    """A finetuning's checkpoints as points of a plane or a line.

    Attributes:
        name: the label of the path in figures.
        coords: float64[checkpoints, directions], coordinates along the directions. The first checkpoint is the model
            that the finetuning started from, at 0.
        residual: float64[checkpoints], the fraction of each checkpoint's distance from the start that is orthogonal to
            the plane: 0 for a checkpoint in the plane, 1 for one at a right angle to it.
    """

    name: str
    coords: Float[np.ndarray, "checkpoints ndim"]
    residual: Float[np.ndarray, " checkpoints"]


def project(name: str, steps: Iterable["Params"], directions: Sequence["Params"]) -> Trajectory:
    """Project a path onto the space that the directions span, by least squares. They need not be orthogonal.

    Arguments:
        name: the label of the path.
        steps: each checkpoint minus the start, as a tree like the directions. They are read one at a time.
        directions: the axes of the plane or line.

    Raises:
        UserError: a direction is zero, or two are parallel.
    """
    from jaxscape.directions.storage import inner

    gram = np.array([[inner(a, b) for b in directions] for a in directions])
    norms = np.sqrt(np.diag(gram))
    if not norms.all() or np.linalg.cond(gram / np.outer(norms, norms)) > MAX_CONDITION:
        raise UserError(
            f"The directions do not span a {len(directions)}D space to project onto: one is zero, or two are "
            f"parallel. Choose other directions."
        )
    coords, residual = [np.zeros(len(directions))], [0.0]
    for step in steps:
        products = np.array([inner(direction, step) for direction in directions])
        coords.append(np.linalg.solve(gram, products))
        square = inner(step, step)
        residual.append(float(np.sqrt(max(1 - coords[-1] @ products / square, 0))) if square else 0.0)
    return Trajectory(name, np.array(coords), np.array(residual))


def save_trajectories(trajectories: Sequence[Trajectory], directory: str | Path) -> None:
    """Write `trajectory.json` into the directory of a landscape.

    Raises:
        UserError: the file cannot be written.
    """
    records = [
        {"name": path.name, "coords": path.coords.tolist(), "residual": path.residual.tolist()} for path in trajectories
    ]
    try:
        write_whole(Path(directory) / FILE_NAME, json.dumps(records, indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise UserError(f"The trajectories cannot be written to {directory} ({reason(error)}).") from error


def load_trajectories(directory: str | Path) -> list[Trajectory]:
    """Read `trajectory.json` from the directory of a landscape; an empty list if there is none.

    Raises:
        UserError: the file is damaged.
    """
    path = Path(directory) / FILE_NAME
    try:
        records: Any = json.loads(path.read_text(encoding="utf-8"))
        trajectories = []
        for record in records:
            coords, residual = (np.array(record[key], np.float64) for key in ("coords", "residual"))
            if coords.ndim != 2 or residual.shape != coords.shape[:1]:
                raise ValueError(f"coords has shape {coords.shape}, and residual {residual.shape}")
            trajectories.append(Trajectory(str(record["name"]), coords, residual))
        return trajectories
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is not a file of trajectories ({reason(error)}).") from error
