"""Radii along many rays and the certificate of noise: results, and their files `radius.json` and `certificate.json`."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import NormalDist
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float

from jaxscape.evaluate.statistics import Interval, clopper_pearson_bound, mean_interval, wilson_interval
from jaxscape.landscapes.numbers import rounded
from jaxscape.runtime.errors import UserError, reason
from jaxscape.runtime.files import read_json, write_whole
from jaxscape.runtime.remote import run_directory

RADII_FILE, CERTIFICATE_FILE, FIGURE = "radius.json", "certificate.json", "radius.png"
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Ray:
    """One side of a direction, and where the rate first exceeds the threshold along it.

    Attributes:
        direction: the direction's name.
        side: `positive` or `negative`.
        inside: the largest distance up to which the rate was not found to exceed the threshold.
        outside: the distance next to it, at which the rate exceeds the threshold; None if it was not found to exceed it
            up to the largest distance. Both are 0 if the rate of the model itself does.
        below_again: the distances farther out that were asked and at which the rate does not exceed the threshold.
        points: the number of points that were asked, the model itself included.
    """

    direction: str
    side: str
    inside: float
    outside: float | None
    below_again: tuple[float, ...]
    points: int

    @property
    def radius(self) -> float:
        """The middle between `inside` and `outside`; infinity if it is more than the largest distance."""
        return math.inf if self.outside is None else (self.inside + self.outside) / 2


def radius_text(ray: Ray, radius_max: float) -> str:
    """The radius of a ray, such as `0.163 (0.16 to 0.165)` or `more than 0.5`."""
    if ray.outside is None:
        return f"more than {radius_max:g}"
    return f"{ray.radius:.4g} ({ray.inside:.4g} to {ray.outside:.4g})"


@dataclass(frozen=True)
class Radii:
    """How far it is along many rays until a rate exceeds a threshold.

    Attributes:
        of: which rate: `asr`, or the share of the answers that are `complied` or `incoherent`.
        threshold: in percent.
        radius_max: the largest distance that was asked, in multiples of the directions.
        resolution: the distance between the two points that bound a radius.
        error: the probability, over the random order of the prompts, that the search along a ray ends elsewhere than
            with the answers to all prompts, at most.
        num_prompts: the number of prompts.
        num_rays: the number of rays of the run.
        rays: those that are finished.
        num_answers: the number of answers that were generated.
    """

    of: str
    threshold: float
    radius_max: float
    resolution: float
    error: float
    num_prompts: int
    num_rays: int
    rays: tuple[Ray, ...]
    num_answers: int

    @property
    def complete(self) -> bool:
        return len(self.rays) == self.num_rays

    @property
    def grid_answers(self) -> int:
        """The number of answers that all prompts at all points of a grid of the same resolution would take."""
        return (1 + self.num_rays * round(self.radius_max / self.resolution)) * self.num_prompts

    def by_direction(self) -> dict[str, list[Ray]]:
        """The rays of each direction that is finished, by its name."""
        directions: dict[str, list[Ray]] = {}
        for ray in self.rays:
            directions.setdefault(ray.direction, []).append(ray)
        return directions

    def share_within(
        self, distances: Sequence[float] | Float[np.ndarray, " distances"]
    ) -> Float[np.ndarray, "3 distances"]:
        """The share of the rays whose radius is at most each distance, and the ends of its 95 % interval.

        All radii that were not found are larger than `radius_max`, so up to there the share is the Kaplan-Meier
        estimate. The interval is Wilson's for as many trials as there are directions: the two sides of a direction are
        not independent, and the mean of two varies no more than one.

        Returns:
            float64[3, distances], each from 0 to 1: the share, and the lower and upper end.
        """
        directions = self.by_direction().values()
        shares = [[np.mean([ray.radius <= distance for ray in rays]) for rays in directions] for distance in distances]
        share = np.array(shares).reshape(len(distances), -1).mean(axis=1)
        return np.stack([share, *(end / 100 for end in wilson_interval(100 * share, len(directions)))])

    def quantile(self, share: float) -> Interval:
        """The distance within which this share of the rays have their radius, with its 95 % interval.

        It is the inverse of `share_within`, and so are the ends of its interval. Infinity stands for more than
        `radius_max`.
        """
        radii = sorted({0.0, *(ray.radius for ray in self.rays if ray.outside is not None)})
        value, high, low = (
            next((radius for radius, part in zip(radii, parts, strict=True) if part >= share - 1e-9), math.inf)
            for parts in self.share_within(radii)
        )
        return Interval(value, low, high)

    def mean(self) -> Interval:
        """The mean over the directions, with its 95 % bootstrap interval over directions; NaN for the ends of the
        interval if there is only one. A radius that was not found counts as `radius_max`; see `is_bound`."""
        samples = [np.mean([min(ray.radius, self.radius_max) for ray in rays]) for rays in self.by_direction().values()]
        if len(samples) == 1:
            return Interval(float(samples[0]), math.nan, math.nan)
        return mean_interval(np.array(samples))

    @property
    def is_bound(self) -> bool:
        """Whether a radius was not found, so that the mean is a lower bound."""
        return any(ray.outside is None for ray in self.rays)

    def to_json(self) -> str:
        """The text of `radius.json`."""
        content: dict[str, Any] = asdict(self) | {"complete": self.complete, "grid_answers": self.grid_answers}
        content["rays"] = [{**asdict(ray), "radius": _finite(ray.radius)} for ray in self.rays]
        if self.rays:
            content["mean"] = {**_entry(self.mean()), "at_least": self.is_bound}
            content["quantiles"] = {f"{share:g}": _entry(self.quantile(share)) for share in QUANTILES}
        return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def save(self, directory: Path) -> None:
        """Write `radius.json` into a directory."""
        write_whole(directory / RADII_FILE, self.to_json())

    @classmethod
    def load(cls, directory: str | Path) -> "Radii":
        """Read `radius.json` from the directory of a run of `jaxscape radius`, which may be unfinished.

        Raises:
            UserError: the file is missing or damaged.
        """
        return _loaded(cls, run_directory(directory) / RADII_FILE, rays=lambda rays: tuple(_ray(ray) for ray in rays))


@dataclass(frozen=True)
class Certificate:
    """How often Gaussian noise in the weights keeps a rate from exceeding a threshold, and what follows from it.

    Attributes:
        of, threshold, num_prompts, num_answers: see `Radii`.
        sigma: the noise's standard deviation in each tensor, in multiples of the tensor's root mean square.
        num_draws: the number of draws of the run.
        exceeded: for each draw that is finished, whether the rate exceeds the threshold.
        num_weights: the number of weights that the noise perturbs.
    """

    of: str
    threshold: float
    sigma: float
    num_prompts: int
    num_draws: int
    exceeded: tuple[bool, ...]
    num_weights: int
    num_answers: int

    @property
    def complete(self) -> bool:
        return len(self.exceeded) == self.num_draws

    @property
    def grid_answers(self) -> int:
        """The number of answers that all prompts at all draws would take."""
        return self.num_draws * self.num_prompts

    @property
    def num_safe(self) -> int:
        """In how many draws the rate does not exceed the threshold."""
        return self.exceeded.count(False)

    @property
    def probability(self) -> float:
        """The lower bound, with 95 % confidence, of the probability that noise keeps the rate from exceeding the
        threshold (Clopper and Pearson 1934); 0 while draws are missing, because their number must not depend on what
        was found."""
        return clopper_pearson_bound(self.num_safe, self.num_draws, CONFIDENCE) if self.complete else 0.0

    @property
    def smoothed_radius(self) -> float:
        """σ Φ⁻¹(`probability`), or 0 if that probability is at most a half (Cohen, Rosenfeld and Kolter, arXiv
        1902.02918, theorem 1).

        After any change of the weights with a smaller norm, noise of the same σ still keeps the rate from exceeding the
        threshold in more than half of all draws. The norm is Euclidean and counts each weight's change in multiples of
        its tensor's root mean square; tensors that the noise leaves alone must not change. Nothing is said of the
        changed model without noise.
        """
        return max(self.sigma * NormalDist().inv_cdf(self.probability), 0.0) if self.probability > 0.5 else 0.0

    @property
    def smoothed_coordinate(self) -> float:
        """`smoothed_radius` as a coordinate along a layer-normalised direction, whose norm is √`num_weights`."""
        return self.smoothed_radius / math.sqrt(self.num_weights)

    def to_json(self) -> str:
        """The text of `certificate.json`."""
        computed = ("complete", "num_safe", "probability", "smoothed_radius", "smoothed_coordinate", "grid_answers")
        content = asdict(self) | {"confidence": CONFIDENCE} | {key: getattr(self, key) for key in computed}
        return json.dumps(content, indent=1, allow_nan=False) + "\n"

    def save(self, directory: Path) -> None:
        """Write `certificate.json` into a directory."""
        write_whole(directory / CERTIFICATE_FILE, self.to_json())

    @classmethod
    def load(cls, directory: str | Path) -> "Certificate":
        """Read `certificate.json` from the directory of a run of `jaxscape radius --certify`, which may be unfinished.

        Raises:
            UserError: the file is missing or damaged.
        """
        return _loaded(cls, run_directory(directory) / CERTIFICATE_FILE, exceeded=tuple)


T = TypeVar("T")


def _loaded(kind: type[T], path: Path, **convert: Callable[[Any], Any]) -> T:
    """A dataclass from the entries of a file that are called as its fields, of which some are converted."""
    content = read_json(path)
    try:
        values = {field.name: content[field.name] for field in fields(kind)}  # type: ignore[arg-type]
        return kind(**values | {name: function(values[name]) for name, function in convert.items()})
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({reason(error)}): run its command again.") from error


def _entry(number: Interval) -> dict[str, Any]:
    """The entry of a number in `radius.json`."""
    return {"value": _finite(number.value), "interval": [_finite(number.low), _finite(number.high)]}


def _finite(value: float) -> float | None:
    """The number as JSON can hold it: None for what is not finite."""
    return rounded(value) if math.isfinite(value) else None


def _ray(entry: Mapping[str, Any]) -> Ray:
    values = {field.name: entry[field.name] for field in fields(Ray)}
    return Ray(**values | {"below_again": tuple(values["below_again"])})
