"""Export of a run's ASR as grids that Landscaper reads (https://github.com/Vis4SciML/Landscaper, 1.3).

`landscaper.LossLandscape.load_from_npz(FILE)` expects an array `loss`, with an axis for each dimension, and an array
`coordinates`, float64[dimensions, steps], the values along each axis.
"""

import io
from pathlib import Path

import numpy as np

from jaxscape.report.run import KeptRun
from jaxscape.runtime.errors import UserError
from jaxscape.runtime.files import write_whole


def export_landscaper(run: KeptRun, out: Path) -> list[Path]:
    """Write `landscaper-0.npz`, `landscaper-1.npz`, … into a directory, one for each direction set. Returns the files.

    `loss` is the ASR in percent, which is low where the model refuses, as a loss is low in a basin. Landscaper places
    and draws the values as NumPy's `meshgrid` of the coordinates arranges points, so `loss[j, i]` is the ASR at the
    i-th value of the first axis and the j-th of the second.

    Raises:
        UserError: the run is no grid, or its axes have different numbers of values, which `coordinates` cannot hold.
    """
    land = run.landscape
    sizes = [len(axis.values) for axis in land.axes]
    if not sizes:
        raise UserError("Landscaper reads grids, and this run is a list of points: export it to csv.")
    if len(set(sizes)) > 1:
        raise UserError(
            f"Landscaper reads grids with as many values along each axis, and this one has "
            f"{' and '.join(map(str, sizes))}: export it to csv."
        )
    coordinates = np.array([axis.values for axis in land.axes], np.float64)
    paths = []
    for index, asr in enumerate(land.asr):
        buffer = io.BytesIO()
        np.savez(buffer, loss=asr.T, coordinates=coordinates)
        paths.append(out / f"landscaper-{index}.npz")
        write_whole(paths[-1], buffer.getvalue())
    return paths
