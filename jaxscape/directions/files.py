"""Directions in safetensors files."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.flax import save_file

from jaxscape.directions.base import needs_option
from jaxscape.directions.storage import Direction, dense
from jaxscape.models.checkpoint import Params, check_tensors, named_leaves, tensor_shapes, to_dtype, tree_of
from jaxscape.models.model import Model
from jaxscape.runtime.errors import UserError, reason
from jaxscape.runtime.remote import fetched


def save_direction(direction: Direction, path: str | Path, model: Model) -> None:
    """Write a direction as safetensors, under Hugging Face parameter names and in Hugging Face layouts.

    Tensors that are stored as something else than arrays are written as arrays in the parameters' dtypes.

    Raises:
        UserError: the direction does not fit the model, or the file cannot be written.
    """
    check_direction(direction, model)
    weights = named_leaves(model.params)
    tensors = {
        name: tensor if isinstance(tensor, jax.Array | np.ndarray) else dense(tensor).astype(weights[name].dtype)
        for name, tensor in named_leaves(direction).items()
    }
    try:
        save_file(tensors, path, metadata={"format": "flax", "model": model.name})
    except (OSError, SafetensorError) as error:
        raise UserError(f"The direction cannot be written to {path} ({reason(error)}).") from error


def load_direction(path: str | Path, model: Model) -> Params:
    """Read a direction for this model from a safetensors file.

    Returns:
        A tree like `model.params`, in the parameters' dtypes, on the model's mesh.

    Raises:
        UserError: the file cannot be read, or the names or shapes of its tensors are not those of the model; the
            message lists the differences.
    """
    try:
        with safe_open(fetched(path), framework="flax") as file:
            names = list(file.keys())
            found = {name: tuple(file.get_slice(name).get_shape()) for name in names}
            check_tensors(tensor_shapes(model.params), found, f"the direction {path}")
            weights, shardings = named_leaves(model.params), named_leaves(model.shardings)
            return tree_of(
                {
                    name: jax.device_put(to_dtype(file.get_tensor(name), weights[name].dtype), shardings[name])
                    for name in names
                }
            )
    except (SafetensorError, OSError) as error:
        raise UserError(f"The direction {path} cannot be read as safetensors ({reason(error)}).") from error


def check_direction(direction: Direction, model: Model) -> None:
    """Raise a `UserError` if a direction's tensors do not have the names and shapes of the model's parameters; it lists
    the differences."""
    check_tensors(tensor_shapes(model.params), tensor_shapes(direction), "the direction")


@dataclass(frozen=True)
class File:
    """`file:PATH`: the direction in a safetensors file."""

    path: str

    kind: ClassVar[str] = "file"
    usage: ClassVar[str] = "file:PATH"
    is_interpolation: ClassVar[bool] = False
    count: ClassVar[int] = 1

    @classmethod
    def parse(cls, option: str) -> "File":
        return cls(needs_option(cls, option))

    def __str__(self) -> str:
        return f"{self.kind}:{self.path}"

    def make(self, model: Model) -> list[Direction]:
        return [load_direction(self.path, model)]
