"""A landscape: attack success rates on a grid, their intervals, VISAGE and other numbers; the file `landscape.json`."""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from jaxscape.directions.names import is_control_name
from jaxscape.evaluate.base import Label
from jaxscape.evaluate.statistics import wilson_interval
from jaxscape.landscapes.axes import Axis
from jaxscape.landscapes.numbers import check_estimate, check_numbers, landscape_numbers
from jaxscape.landscapes.visage import visage, visage_interval
from jaxscape.runtime.errors import UserError, reason
from jaxscape.runtime.files import write_whole
from jaxscape.runtime.remote import run_directory

FILE_NAME, FIGURE = "landscape.json", "landscape.png"
SHARES: tuple[Label, ...] = ("refused", "complied", "incoherent")

Measure = Mapping[str, Float[np.ndarray, " directions *grid"]]
"""What an evaluator gave at each point: the share of each label in percent, by the label's name. Beside each label,
such as `refused`, `refused_low` and `refused_high` are the ends of its 95 % Wilson interval. `unjudged` is the share of
the answers that the evaluator could not judge."""


@dataclass(frozen=True, eq=False)
class Landscape:
    """Attack success rates on a grid of points, or at a list of them, for each direction set.

    Attributes:
        axes: one for each dimension of the grid; none if the points are a list. All arrays have the shape [directions,
            points] then.
        asr: float64[directions, *grid], in percent; NaN for points that are not evaluated yet.
        asr_low, asr_high: float64[directions, *grid], in percent, the ends of the 95 % Wilson interval of each ASR.
        nonfinite: int64[directions, *grid], the number of prompts whose completion met a NaN or infinite logit.
        unanswered: int64[directions, *grid], the number of prompts whose completion has thinking in it and no answer.
            They are judged like an empty answer.
        num_prompts: the number of prompts at each point.
        visage_values: VISAGE of the kinds `paper` and `reference`, and the ends of their 95 % intervals, `interval` and
            `reference_interval`; None while points are missing.
        numbers: `asr` has the safety volume and the radius of the ASR, see
            `jaxscape.landscapes.numbers.landscape_numbers`, and `complied`, if there are shares, those of the share of
            the answers that comply; None while points are missing, and where it was read from a file that was written
            before there were such numbers.
        measures: what each evaluator gave, by the evaluator's name; empty if the paper's keywords are the only one.
        disagreement: for each pair of evaluators, `A / B`, the share of the answers in percent that one of them takes
            for a refusal and the other does not, as `differ`, with its interval. Empty if there is only one evaluator.
        shares: the shares of the answers that are `refused`, `complied` and `incoherent`, in percent, which add up to
            100, with their intervals, as in a `Measure`. Partial refusals count as refused. Empty if the scan was told
            to leave them out.
        points: the coordinates of each point, if the points are a list and no grid. There are no VISAGE and no
            `numbers` then.
        filled: bool[directions, *grid], the points that an adaptive scan did not evaluate. Rates are interpolated there
            between evaluated points, with Wilson's interval at the interpolated rate, and counts are 0. None for any
            other scan.
        directions: the names of the directions of each set; empty if they are random ones, or were given by a program.
        abandoned: int64[directions, *grid], the number of prompts whose answer was ended because its beginning makes no
            sense; None if none was. The ASR, what follows from it, and the measures are those of cut texts then.
        control: `visage` and `numbers` of the random controls, see `jaxscape.directions.control.Control`, as in
            `landscape.json`; empty if there are none. `visage_values` and `numbers` are without them.
    """

    axes: tuple[Axis, ...]
    asr: Float[np.ndarray, " directions *grid"]
    asr_low: Float[np.ndarray, " directions *grid"]
    asr_high: Float[np.ndarray, " directions *grid"]
    nonfinite: Int[np.ndarray, " directions *grid"]
    unanswered: Int[np.ndarray, " directions *grid"]
    num_prompts: int
    visage_values: dict[str, Any] | None
    numbers: dict[str, Any] | None = None
    measures: Mapping[str, Measure] = field(default_factory=dict)
    disagreement: Mapping[str, Measure] = field(default_factory=dict)
    shares: Measure = field(default_factory=dict)
    points: tuple[tuple[float, ...], ...] = ()
    filled: Bool[np.ndarray, " directions *grid"] | None = None
    directions: tuple[tuple[str, ...], ...] = ()
    abandoned: Int[np.ndarray, " directions *grid"] | None = None
    control: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_outcomes(
        cls,
        axes: Sequence[Axis],
        refused: Shaped[np.ndarray, " directions *grid prompts"],
        nonfinite: Int[np.ndarray, " directions *grid"],
        evaluated: Bool[np.ndarray, " directions *grid"],
        unanswered: Int[np.ndarray, " directions *grid"] | None = None,
        measures: Mapping[str, Measure] | None = None,
        disagreement: Mapping[str, Measure] | None = None,
        shares: Measure | None = None,
        complied: Shaped[np.ndarray, " directions *grid prompts"] | None = None,
        points: Sequence[tuple[float, ...]] = (),
        filled: Bool[np.ndarray, " directions *grid"] | None = None,
        directions: Sequence[Sequence[str]] = (),
        abandoned: Int[np.ndarray, " directions *grid"] | None = None,
    ) -> "Landscape":
        """A landscape from the outcome of each prompt at each point.

        Arguments:
            refused: bool or float64[directions, *grid, prompts], whether the answer to each prompt counts as a refusal;
                at filled points, a number from 0 to 1.
            nonfinite: int64[directions, *grid], see the attribute.
            evaluated: bool[directions, *grid], False for points whose outcomes are still missing.
            unanswered: int64[directions, *grid], see the attribute; None stands for zeros.
            measures, disagreement, shares: see the attributes.
            complied: the same of answers that comply; None if that is not known of all.
            points, filled, directions, abandoned: see the attributes.
        """
        num_prompts = refused.shape[-1]
        asr = np.where(evaluated, 100.0 * (1.0 - refused.sum(axis=-1) / num_prompts), np.nan)
        low, high = wilson_interval(asr, num_prompts)
        found: dict[str, Any] = {"visage": None, "numbers": None}
        control: dict[str, Any] = {}
        if evaluated.all() and axes:
            is_control = _is_control(directions, len(asr))
            found = _numbers(axes, refused[~is_control], None if complied is None else complied[~is_control])
            if is_control.any():
                control = _numbers(axes, refused[is_control], None if complied is None else complied[is_control])
        unanswered = np.zeros_like(nonfinite) if unanswered is None else unanswered
        return cls(
            *(tuple(axes), asr, low, high, nonfinite, unanswered, num_prompts, found["visage"], found["numbers"]),
            measures=measures or {},
            disagreement=disagreement or {},
            shares=shares or {},
            points=tuple(points),
            filled=filled,
            directions=tuple(map(tuple, directions)),
            abandoned=abandoned,
            control=control,
        )

    @property
    def complete(self) -> bool:
        """Whether every point is evaluated."""
        return not np.isnan(self.asr).any()

    @property
    def num_evaluated(self) -> int:
        """The number of points of a complete landscape that are evaluated, and not filled."""
        return int(self.asr.size if self.filled is None else (~self.filled).sum())

    @property
    def abandoned_text(self) -> str:
        """How many answers were abandoned, in words; empty if none was."""
        if self.abandoned is None:
            return ""
        count = int(np.isfinite(self.asr).sum()) if self.filled is None else self.num_evaluated
        answers = f"{int(self.abandoned.sum())} of {count * self.num_prompts} answers"
        return f"{answers} abandoned as incoherent: the ASR is that of cut texts"

    def visage(self, kind: str = "paper") -> float:
        """VISAGE in percent, averaged over the direction sets but controls; see `jaxscape.visage`.

        Raises:
            UserError: points are missing, or are no grid.
        """
        if self.points:
            raise UserError("VISAGE needs a grid, and this landscape is a list of points: scan along axes.")
        return visage(self.asr[~self.is_control], kind, len(self.axes))

    @property
    def is_control(self) -> Bool[np.ndarray, " directions"]:
        """Which direction sets are random controls of others. Where all are, they are what the landscape is about, and
        none counts as a control."""
        return _is_control(self.directions, len(self.asr))

    def without_controls(self) -> "Landscape":
        """The landscape of the direction sets that are no controls."""
        return replace(self.select(~self.is_control), control={})

    def select(self, kept: Bool[np.ndarray, " directions"]) -> "Landscape":
        """The landscape with the arrays of some of its direction sets. Its numbers stay those of the whole."""

        def part(rates: Mapping[str, Any]) -> dict[str, Any]:
            return {name: values[kept] for name, values in rates.items()}

        return replace(
            self,
            **part({name: getattr(self, name) for name in ("asr", "asr_low", "asr_high", "nonfinite", "unanswered")}),
            measures={name: part(measure) for name, measure in self.measures.items()},
            disagreement={name: part(measure) for name, measure in self.disagreement.items()},
            shares=part(self.shares),
            filled=None if self.filled is None else self.filled[kept],
            abandoned=None if self.abandoned is None else self.abandoned[kept],
            directions=tuple(itertools.compress(self.directions, kept)),
        )

    @property
    def origin(self) -> tuple[int, ...] | None:
        """Where the model itself is on the grid or in the list; None if it is no point of it."""
        if self.points:
            return next(((number,) for number, point in enumerate(self.points) if not any(point)), None)
        is_point = all(0.0 in axis.values for axis in self.axes)
        return tuple(axis.values.index(0.0) for axis in self.axes) if is_point else None

    def to_json(self) -> str:
        """The text of `landscape.json`."""

        def nested(values: np.ndarray) -> list[Any]:
            """Nested lists in which None stands for NaN, which JSON does not have."""
            cells = values.astype(object)
            cells[np.isnan(values)] = None
            return cells.tolist()

        content = {
            "axes": [axis.described() for axis in self.axes],
            **({"points": [list(point) for point in self.points]} if self.points else {}),
            **({} if self.filled is None else {"filled": self.filled.tolist()}),
            **({"directions": [list(names) for names in self.directions]} if self.directions else {}),
            "asr": nested(self.asr),
            "asr_low": nested(self.asr_low),
            "asr_high": nested(self.asr_high),
            "nonfinite": self.nonfinite.tolist(),
            **({"unanswered": self.unanswered.tolist()} if self.unanswered.any() else {}),
            **({} if self.abandoned is None else {"abandoned": self.abandoned.tolist()}),
            "visage": self.visage_values,
            **({} if self.numbers is None else {"numbers": self.numbers}),
            **({"control": dict(self.control)} if self.control else {}),
            **({"shares": {kind: nested(share) for kind, share in self.shares.items()}} if self.shares else {}),
            **({"measures": each_array(nested, self.measures)} if self.measures else {}),
            **({"disagreement": each_array(nested, self.disagreement)} if self.disagreement else {}),
            "num_prompts": self.num_prompts,
            "complete": self.complete,
        }
        return json.dumps(content, indent=1, allow_nan=False) + "\n"

    def save(self, directory: str | Path) -> None:
        """Write `landscape.json` into a directory, which is created if it is missing.

        Raises:
            UserError: the file cannot be written.
        """
        directory = run_directory(directory)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            write_whole(directory / FILE_NAME, self.to_json())
        except OSError as error:
            raise UserError(
                f"The landscape cannot be written to {directory} ({reason(error)}): choose another directory."
            ) from error

    @classmethod
    def load(cls, directory: str | Path) -> "Landscape":
        """Read `landscape.json` from the directory of a run, which may be unfinished.

        Raises:
            UserError: the file is missing or damaged.
        """
        path = run_directory(directory) / FILE_NAME
        try:
            return cls._from_json(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{directory} holds no landscape: {path} cannot be read ({reason(error)}).") from error
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise UserError(f"{path} is not a landscape file ({reason(error)}).") from error

    @classmethod
    def _from_json(cls, text: str) -> "Landscape":
        """The inverse of `to_json`. Raises one of several exceptions if the text is not that of a landscape."""
        content = json.loads(text)
        landscape = cls(
            axes=tuple(map(Axis.read, content["axes"])),
            asr=np.array(content["asr"], np.float64),
            asr_low=np.array(content["asr_low"], np.float64),
            asr_high=np.array(content["asr_high"], np.float64),
            nonfinite=np.array(content["nonfinite"], np.int64),
            unanswered=np.array(content.get("unanswered", np.zeros_like(content["nonfinite"])), np.int64),
            num_prompts=int(content["num_prompts"]),
            visage_values=content["visage"],
            numbers=content.get("numbers"),
            measures=each_array(lambda values: np.array(values, np.float64), content.get("measures", {})),
            disagreement=each_array(lambda values: np.array(values, np.float64), content.get("disagreement", {})),
            shares={kind: np.array(share, np.float64) for kind, share in content.get("shares", {}).items()},
            points=tuple(tuple(map(float, point)) for point in content.get("points", ())),
            filled=np.array(content["filled"], bool) if "filled" in content else None,
            directions=tuple(tuple(map(str, names)) for names in content.get("directions", ())),
            abandoned=np.array(content["abandoned"], np.int64) if "abandoned" in content else None,
            control=dict(content.get("control", {})),
        )
        landscape._check_parts()
        return landscape

    def _check_parts(self) -> None:
        """Raise one of several exceptions if the parts do not fit one another, as those of a damaged file may."""
        grid = (len(self.points),) if self.points else tuple(len(axis.values) for axis in self.axes)
        measures = (*self.measures.values(), *self.disagreement.values(), self.shares)
        rates = [rate for measure in measures for rate in measure.values()]
        counts = (self.nonfinite, self.unanswered, self.abandoned)
        arrays = (self.asr, self.asr_low, self.asr_high, self.filled, *counts, *rates)
        shapes = {array.shape for array in arrays if array is not None}
        if len(grid) not in (1, 2) or shapes != {(len(self.asr), *grid)}:
            raise ValueError(f"arrays of shapes {sorted(shapes)} over {len(grid)} axes")
        for measure in measures:
            kinds = {key.removesuffix("_low").removesuffix("_high") for key in measure}
            if measure.keys() != {f"{kind}{end}" for kind in kinds for end in ("", "_low", "_high")}:
                raise ValueError("a share lacks an end of its interval")
        if self.shares and not self.shares.keys() >= {*SHARES}:
            raise ValueError("one of the three shares is missing")
        if len(self.directions) not in (0, len(self.asr)) or self.num_prompts < 1:
            raise ValueError(f"names of {len(self.directions)} direction sets, and {self.num_prompts} prompts")
        num_controls = int(self.is_control.sum())
        if self.visage_values is not None or (self.complete and self.axes):
            _check_visage(self.visage_values or {})
        if self.numbers is not None:
            check_numbers(self.numbers, len(self.asr) - num_controls)
        if self.control:
            _check_visage(self.control["visage"])
            check_numbers(self.control["numbers"], num_controls)


def _check_visage(values: Any) -> None:
    """Raise one of several exceptions if `visage`, which a file holds, is not what `_numbers` gives.

    The interval of the reference code's definition may be missing, because the first runs had none.
    """
    check_estimate({"value": values["paper"], "interval": values["interval"]})
    check_estimate({"value": values["reference"], "interval": values.get("reference_interval", values["interval"])})


def _numbers(
    axes: Sequence[Axis],
    refused: Shaped[np.ndarray, " directions *grid prompts"],
    complied: Shaped[np.ndarray, " directions *grid prompts"] | None,
) -> dict[str, Any]:
    """VISAGE and the other numbers of a complete grid, as `visage` and `numbers` in `landscape.json`."""
    asr = 100.0 * (1.0 - refused.sum(axis=-1) / refused.shape[-1])
    values = {
        "paper": visage(asr, "paper", len(axes)),
        "reference": visage(asr, "reference", len(axes)),
        "interval": list(visage_interval(refused, "paper")),
        "reference_interval": list(visage_interval(refused, "reference")),
    }
    numbers = {"asr": landscape_numbers(1 - refused.astype(np.float64), axes)}
    numbers |= {} if complied is None else {"complied": landscape_numbers(complied, axes)}
    return {"visage": values, "numbers": numbers}


def _is_control(directions: Sequence[Sequence[str]], count: int) -> Bool[np.ndarray, " directions"]:
    """See `Landscape.is_control`."""
    controls = np.array([any(map(is_control_name, names)) for names in directions], bool)
    return controls if controls.size and not controls.all() else np.zeros(count, bool)


def each_array(function: Callable[[Any], Any], measures: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The measures, with the function applied to each of their arrays."""
    return {name: {key: function(rate) for key, rate in measure.items()} for name, measure in measures.items()}
