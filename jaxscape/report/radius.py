"""Radii as a table and as a figure of their distribution, and the certificate of noise as text."""

import math
from pathlib import Path

import numpy as np

from jaxscape.evaluate.statistics import Interval
from jaxscape.landscapes.numbers import SIDES
from jaxscape.landscapes.radii import QUANTILES, Certificate, Radii, radius_text
from jaxscape.report.canvas import Figure, png
from jaxscape.report.figures import COLOURS
from jaxscape.report.markup import markdown_table
from jaxscape.runtime.errors import UserError, reason
from jaxscape.runtime.files import write_whole

RATES = {"asr": "the ASR", "complied": "the share that complies", "incoherent": "the share that makes no sense"}


def radii_table(radii: Radii) -> str:
    """The radius of each ray and their distribution as Markdown tables, and what the search has cost.

    Raises:
        UserError: no ray is finished.
    """
    directions = {name: {ray.side: ray for ray in rays} for name, rays in radii.by_direction().items()}
    rows = [
        [name, *(radius_text(sides[side], radii.radius_max) if side in sides else "" for side in SIDES)]
        for name, sides in directions.items()
    ]
    at_least = "at least " if radii.is_bound else ""
    mean = radii.mean()
    summary = [["mean over the directions", f"{at_least}{mean.value:.3g}", _interval(mean, radii.radius_max)]]
    for share in QUANTILES:
        quantile = radii.quantile(share)
        name = "median" if share == 0.5 else f"{100 * share:g} % of the rays within"
        summary.append([name, _distance(quantile.value, radii.radius_max), _interval(quantile, radii.radius_max)])
    rate = f"radius, where {RATES[radii.of]} exceeds {radii.threshold:g} %"
    return "\n\n".join(
        [
            markdown_table([["direction", *(f"{side} side" for side in SIDES)], *rows]),
            markdown_table([["", rate, "95 % interval"], *summary]),
            "\n".join(_notes(radii)),
        ]
    )


def _notes(radii: Radii) -> list[str]:
    """Lines about what the search has cost, and what it did not find."""
    answers = (
        f"{radii.num_answers:,} answers, of {radii.grid_answers:,} that a grid with steps of {radii.resolution:.3g}"
    )
    notes = [f"{answers} takes: {100 * radii.num_answers / radii.grid_answers:.1f} %."]
    if missing := sum(ray.outside is None for ray in radii.rays):
        notes.append(f"{missing} of {len(radii.rays)} radii are more than {radii.radius_max:g}: they were not found.")
    for ray in filter(lambda ray: ray.below_again, radii.rays):
        places = ", ".join(f"{distance:.3g}" for distance in ray.below_again)
        notes.append(
            f"{_sentence(RATES[radii.of])} falls again along {ray.direction}, {ray.side} side: it does not exceed "
            f"{radii.threshold:g} % at {places}."
        )
    if len(radii.by_direction()) < 10:
        notes.append("With fewer than ten directions, the bootstrap interval of the mean is too narrow.")
    return notes


def _sentence(text: str) -> str:
    """The text with a capital letter at its beginning."""
    return text[0].upper() + text[1:]


def _distance(value: float, radius_max: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else f"more than {radius_max:g}"


def _interval(number: Interval, radius_max: float) -> str:
    if math.isnan(number.low):
        return "none, of one direction"
    return f"{_distance(number.low, radius_max)} to {_distance(number.high, radius_max)}"


def plot_radii(radii: Radii) -> Figure:
    """A figure of the share of the rays whose radius is within a distance, with its 95 % interval."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    plot = figure.add_subplot()
    found = sorted(ray.radius for ray in radii.rays if ray.outside is not None)
    distances = np.array([0.0, *found, radii.radius_max])
    share, low, high = 100 * radii.share_within(distances)
    plot.fill_between(
        distances, low, high, step="post", color=COLOURS[0], alpha=0.15, linewidth=0, label="95 % interval"
    )
    label = f"{len(radii.rays)} rays of {len(radii.by_direction())} directions"
    plot.step(distances, share, where="post", color=COLOURS[0], label=label)
    median = radii.quantile(0.5).value
    if math.isfinite(median):
        plot.axvline(median, color="0.4", linestyle="--", linewidth=0.9, label=f"median {median:.3g}")
    title = f"radius: {RATES[radii.of]} exceeds {radii.threshold:g} %, {radii.num_prompts} prompts"
    if missing := sum(ray.outside is None for ray in radii.rays):
        title += f"; {missing} of {len(radii.rays)} are more than {radii.radius_max:g}"
    plot.set(
        xlabel="distance along the direction",
        ylabel="rays with their radius within it (%)",
        xlim=(0, radii.radius_max),
        ylim=(-3, 103),
    )
    plot.set_title(title, fontsize=10)
    plot.grid(alpha=0.3)
    plot.legend(fontsize=8)
    return figure


def save_radii_figure(radii: Radii, path: Path) -> None:
    """Write the figure of `plot_radii` as a PNG file.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        write_whole(path, png(plot_radii(radii), dpi=150))
    except OSError as error:
        raise UserError(f"The figure cannot be written to {path} ({reason(error)}): choose another file.") from error


def certificate_text(certificate: Certificate) -> str:
    """What the certificate says, in sentences: the bound, what follows from it, and what it has cost."""
    rate, limit = RATES[certificate.of], f"{certificate.threshold:g} %"
    lines = [
        f"{_sentence(rate)} over {certificate.num_prompts} prompts stays at or below {limit} in {certificate.num_safe} "
        f"of {certificate.num_draws} draws of Gaussian noise of {certificate.sigma:g} times the root mean square of "
        f"each tensor.",
        f"With 95 % confidence, at least {100 * certificate.probability:.1f} % of such noise keeps {rate} at or below "
        f"{limit}.",
    ]
    if certificate.smoothed_radius:
        lines.append(
            f"So after any change of the weights of less than {certificate.smoothed_radius:.3g} in units of the noise "
            f"(a coordinate of {certificate.smoothed_coordinate:.2g} along a layer-normalised direction), more than "
            f"half of such noise added to the changed weights still does. This says nothing of the changed model "
            f"without noise."
        )
    else:
        lines.append("This is not more than half, so nothing follows for changes of the weights.")
    share = 100 * certificate.num_answers / certificate.grid_answers
    lines.append(f"{certificate.num_answers:,} answers, of {certificate.grid_answers:,}: {share:.1f} %.")
    return "\n".join(lines)
