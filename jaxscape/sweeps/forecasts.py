"""Forecasts of a sweep: the hours of its scans on TPU slices that are not here."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jaxscape.engine.batching import Workload
from jaxscape.engine.options import EngineOptions
from jaxscape.forecast.chips import Slice
from jaxscape.forecast.forecast import forecast
from jaxscape.forecast.known_models import shape_config
from jaxscape.models import builtin
from jaxscape.models.config import ModelConfig
from jaxscape.models.gguf import is_gguf, open_gguf
from jaxscape.models.lora import is_adapter, load_adapter
from jaxscape.models.weights import CONFIG
from jaxscape.runtime.errors import UserError
from jaxscape.runtime.sharding import MeshShape

SECONDS_PER_HOUR = 3600


@dataclass(frozen=True)
class ScanShape:
    """All that a forecast of a scan depends on. Scans that differ in a seed or in the texts of prompts share it.

    Attributes:
        mesh_shape: None for the default of the slice.
    """

    config: ModelConfig
    workload: Workload
    options: EngineOptions
    mesh_shape: MeshShape | None
    dtype: str


@dataclass(frozen=True)
class Forecasted:
    """The forecast of scans of one shape on a slice.

    Attributes:
        topology: the slice.
        scans: what the scans are called.
        form: the faster form; empty if there is no forecast.
        hours: hours of one scan on the slice.
        device_hours: hours of all of the scans, times the number of chips of the slice.
        problem: why there is no forecast; empty if there is one.
    """

    topology: str
    scans: tuple[str, ...]
    form: str = ""
    hours: float = 0.0
    device_hours: float = 0.0
    problem: str = ""


def forecast_scans(shapes: Mapping[str, ScanShape | str], tpu_slice: Slice, quick: bool = False) -> list[Forecasted]:
    """The forecasts of scans, one for all that share a shape.

    Arguments:
        shapes: the shape of each scan by what it is called, or why it cannot be forecast.
        quick: see `jaxscape.forecast.forecast.forecast`.
    """
    groups: dict[str, list[str]] = {}
    for name, shape in shapes.items():
        groups.setdefault(repr(shape), []).append(name)
    return [_forecast(shapes[names[0]], tuple(names), tpu_slice, quick) for names in groups.values()]


def _forecast(shape: ScanShape | str, names: tuple[str, ...], tpu_slice: Slice, quick: bool) -> Forecasted:
    if isinstance(shape, str):
        return Forecasted(tpu_slice.name, names, problem=shape)
    try:
        best = forecast(
            shape.config,
            shape.workload,
            tpu_slice,
            num_sets=shape.workload.num_sets,
            mesh_shape=shape.mesh_shape,
            dtype=shape.dtype,
            options=shape.options,
            quick=quick,
        )[0]
    except UserError as error:
        return Forecasted(tpu_slice.name, names, problem=str(error))
    if not best.fits:
        return Forecasted(tpu_slice.name, names, problem=f"It needs {best.missing / 1e9:.1f} GB more on each chip.")
    hours = best.landscape_seconds / SECONDS_PER_HOUR
    return Forecasted(tpu_slice.name, names, best.form, hours, hours * len(names) * len(tpu_slice.devices))


def config_of(model: str, base: str | None) -> ModelConfig:
    """The configuration of a model that `--model` and `--base` of a scan name, without its weights. An adapter has that
    of its base.

    Raises:
        UserError: see `jaxscape.forecast.known_models.shape_config`.
    """
    path = builtin.ADAPTERS.get(model, Path(model))
    if path.is_dir() and is_adapter(path) and not (path / CONFIG).exists():
        return config_of(load_adapter(path, base).base, None)
    return open_gguf(path).config if is_gguf(path) else shape_config(model)
