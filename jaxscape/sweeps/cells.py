"""The cells of a sweep: every combination of the values of its matrix, each with the name of its directory."""

import itertools
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxscape.runtime.files import checksum

MEANS_ITSELF = ("model", "direction", "directions", "prompts", "evaluator", "interpolate_to")
"""Options whose values say in a directory's name what they are; the values of others stand behind the option's name."""
MAX_LABEL, MAX_NAME = 40, 200  # characters; a file system allows 255 bytes
_PLAIN = re.compile(r"[\w@+=]([\w.@+=-]*[\w@+=])?", re.ASCII)


@dataclass(frozen=True)
class Setting:
    """An option of `jaxscape scan` with a value.

    Attributes:
        option: its name, such as `num_prompts`.
        texts: the value as the file has it; several texts for an option that takes several.
        arguments: what a command line has for it, such as `--num-prompts 20`; nothing for a switch that is off.
        value: what the parser of the command line made of it.
    """

    option: str
    texts: tuple[str, ...]
    arguments: tuple[str, ...]
    value: Any

    @property
    def text(self) -> str:
        """The value on one line."""
        return " ".join(self.texts)


@dataclass(frozen=True)
class Cell:
    """A scan of a sweep.

    Attributes:
        name: the name of its directory; it depends on the cell's own values in the matrix.
        varied: its values in the matrix.
        fixed: the options that are the same in all scans.
    """

    name: str
    varied: tuple[Setting, ...]
    fixed: tuple[Setting, ...]

    @property
    def arguments(self) -> tuple[str, ...]:
        """The arguments of `jaxscape scan`, without the run's directory."""
        return tuple(argument for setting in (*self.varied, *self.fixed) for argument in setting.arguments)


def make_cells(
    matrix: Mapping[str, Sequence[Setting]], fixed: Sequence[Setting], reserved: Collection[str]
) -> tuple[Cell, ...]:
    """A cell for each combination of values, the last option varying fastest.

    Arguments:
        matrix: the values of each option that varies.
        fixed: the options that are the same in all cells.
        reserved: names that no cell may have.
    """
    combinations = list(itertools.product(*matrix.values()))
    names = _names(combinations, reserved)
    return tuple(Cell(name, varied, tuple(fixed)) for name, varied in zip(names, combinations, strict=True))


def _names(combinations: Sequence[Sequence[Setting]], reserved: Collection[str]) -> list[str]:
    """A name for each cell. Those that would share a name, or have a reserved one, end with a checksum.

    Some file systems take upper and lower case for the same, so such names count as shared.
    """
    names = ["_".join(map(label, settings)) or "scan" for settings in combinations]
    counts = Counter(name.lower() for name in (*names, *reserved))
    return [
        name
        if counts[name.lower()] == 1 and len(name) <= MAX_NAME
        else _with_checksum(name[:MAX_NAME], [(setting.option, setting.texts) for setting in settings])
        for name, settings in zip(names, combinations, strict=True)
    ]


def label(setting: Setting) -> str:
    """The part of a directory's name that stands for a setting: `refusal`, `random-0`, `seed-1`.

    Of a long value, or one with characters that are unusual in names, it has the beginning (of a path, the end) and a
    checksum.
    """
    text = "+".join(setting.texts)
    name = text.replace(":", "-").replace("/", "--")
    if len(name) > MAX_LABEL or not _PLAIN.fullmatch(name):
        end = text.rpartition("/")[2] if len(name) > MAX_LABEL else name
        name = _with_checksum(re.sub(r"[^\w.@+=-]+", "-", end, flags=re.ASCII)[:MAX_LABEL], setting.texts)
    return name if setting.option in MEANS_ITSELF else f"{setting.option.replace('_', '-')}-{name}"


def _with_checksum(name: str, value: Any) -> str:
    return f"{name.strip('-.')}-{checksum(value)[:8]}".lstrip("-")
