"""What a scan that is there was made with, so that something else can be measured at the same points."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxscape.directions.base import Recipe
from jaxscape.directions.kinds import Prepared, parse_direction
from jaxscape.landscapes.axes import Axis
from jaxscape.landscapes.store import SCAN, read_prompts
from jaxscape.models.checkpoint import fingerprint
from jaxscape.models.model import Model
from jaxscape.runtime import rundir
from jaxscape.runtime.errors import UserError, reason
from jaxscape.runtime.files import checksum, read_json


@dataclass(frozen=True)
class ScanSettings:
    """The settings of a scan that say what its points and its prompts are.

    Attributes:
        directory: the scan's directory.
        model, base, dtype: what the model was loaded from, and how.
        directions: the recipes of each direction set.
        prompts, prompt_source: the prompts, and the set or file that they were read from; None if a program gave them.
        weights, tokens: checksums of the model, and of the prompts' token ids.
        ids: what identifies the directions of each set.
    """

    directory: Path
    model: str
    base: str | None
    dtype: str
    directions: tuple[tuple[Recipe, ...], ...]
    axes: tuple[Axis, ...]
    prompts: tuple[str, ...]
    prompt_source: str | None
    system_prompt: str
    thinking: str
    weights: str
    tokens: str
    ids: list[list[Any]]

    @classmethod
    def load(cls, directory: Path) -> "ScanSettings":
        """Read the settings of the scan in a directory, finished or not.

        Raises:
            UserError: the directory holds no scan, or its directions were given by a program and have no name.
        """
        config = read_json(directory / rundir.CONFIG)
        if not config.keys() >= SCAN.marks:
            raise UserError(f"{directory} holds something other than a scan (see its {rundir.CONFIG}).")
        try:
            lines = read_prompts(directory)
            names = [tuple(map(str, item)) for item in config["direction_names"]]
            if any(name == "given" for item in names for name in item):
                raise UserError(
                    f"The directions of {directory} were given by a program, and are not kept: measure with that "
                    f"program, or save them with save_direction and scan along the files."
                )
            if config.get("points"):
                raise UserError(
                    f"{directory} is a scan of listed points, and weights are measured on a grid: scan along axes."
                )
            return cls(
                directory=directory,
                model=str(config["model"]),
                base=config.get("base"),
                dtype=str(config["dtype"]),
                directions=tuple(tuple(map(parse_direction, item)) for item in names),
                axes=tuple(map(Axis.read, config["axes"])),
                prompts=tuple(str(line["prompt"]) for line in lines),
                prompt_source=config.get("prompt_source"),
                system_prompt=str(config["system_prompt"]),
                thinking=str(config.get("thinking", "default")),
                weights=str(config["weights"]),
                tokens=str(config["tokens"]),
                ids=config["directions"],
            )
        except UserError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"The scan in {directory} cannot be read ({reason(error)}).") from error

    def check_weights(self, model: Model) -> None:
        """Raise a `UserError` if the model's weights are not those of the scan."""
        if fingerprint(model.params) != self.weights:
            raise UserError(
                f"The weights of {model.name} in {model.dtype} are not those of the scan in {self.directory}, which "
                f"were {self.model} in {self.dtype}: load the same model in the same dtype."
            )

    def check_tokens(self, prompt_tokens: Sequence[Sequence[int]]) -> None:
        """Raise a `UserError` if these token ids are not those that the scan gave the model."""
        if checksum(prompt_tokens) != self.tokens:
            raise UserError(
                f"The prompts of the scan in {self.directory} are sent in another way now: the chat template, the "
                f"tokenizer or the file of the system prompt {self.system_prompt!r} has changed since."
            )

    def check_directions(self, prepared: Sequence[Sequence[Prepared]]) -> None:
        """Raise a `UserError` if these directions are not those of the scan."""
        if [[one for direction in item for one in direction.ids_as_in(self.ids)] for item in prepared] != self.ids:
            raise UserError(
                f"The directions of the scan in {self.directory} have changed since: their files or models are others."
            )
