"""How do scans scale over TPU chips, by their compiled programs, and over the devices that are here?

`python benchmarks/benchmark_scaling.py` forecasts a landscape's points per hour on slices of up to 64 chips, in both
forms, on a line and on a plane, and writes a table and a figure. No TPU is needed. With `--measure` it decodes the same
rows on more and more of the devices that are here, and checks that they give the same texts.
"""

import io
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from jaxscape.cli.main import run_program
from jaxscape.cli.options import DEFAULT_MODEL, write_line
from jaxscape.directions.kinds import make_directions
from jaxscape.engine.batching import Workload, tokenize
from jaxscape.engine.engine import Engine
from jaxscape.engine.options import EngineOptions
from jaxscape.engine.planner import make_plan
from jaxscape.engine.sampling import Sampling
from jaxscape.forecast.chips import CHIPS, open_slice, shape_on
from jaxscape.forecast.forecast import Forecast, forecast, make_workload
from jaxscape.forecast.known_models import shape_config
from jaxscape.landscapes.axes import symmetric_axes
from jaxscape.models.decoder import parameter_shapes
from jaxscape.models.model import load_model
from jaxscape.prompts.sets import load_prompts
from jaxscape.report.figures import COLOURS, MARKERS, STYLES
from jaxscape.runtime.errors import UserError
from jaxscape.runtime.files import write_whole
from jaxscape.runtime.sharding import MeshShape, mesh_shape_of

FLAT = {1: "1x1", 2: "1x2", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8"}
CUBES = {1: "1x1x1", 2: "2x1x1", 4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4"}
SLICES = {"v5e": FLAT, "v5p": CUBES, "v6e": FLAT}
GROUP = 4  # chips that share the weights where scaling along `points` is looked at
FORMS = ("materialised", "factorised")
# Of the standard prompts in the format of Llama-2: tokens of the longest, and those that all begin with.
PROMPT_TOKENS, SHARED_TOKENS = 56, 26


@dataclass(frozen=True)
class Scaling:
    """Points of a landscape per hour against chips."""

    measure: bool = False
    """Measure on the devices that are here, instead of forecasting for TPUs."""
    models: tuple[str, ...] = ("llama-2-7b", "llama-2-13b", "llama-3-70b")
    """Known by their shapes."""
    kinds: tuple[str, ...] = tuple(SLICES)
    chips: tuple[int, ...] = (4, 16, 64)
    """Where they cannot even hold the weights, nothing is forecast; the smaller are of use to find the smallest."""
    points: int = 21
    """Along each axis."""
    prompts: int = 80
    max_new_tokens: int = 512
    out: Path = Path("docs")
    """Where scaling.md and scaling.png go, and scaling.jsonl: forecasts that are in it are not made again."""
    measured_model: str = DEFAULT_MODEL
    """The model that is measured."""
    measured_form: str = "materialised"

    def run(self) -> None:
        if self.measure:
            measure(self)
            return
        wrong = [f"{kind} with {n} chips" for kind in self.kinds for n in self.chips if n not in SLICES.get(kind, {})]
        if wrong:
            raise UserError(f"There are no slices for {', '.join(wrong)}; choose among {SLICES}.")
        kept = Kept(self.out / "scaling.jsonl")
        jax.config.update("jax_platforms", "cpu")  # the compiler needs no device
        scaled = [record for ask in self._asked() for record in kept.records(ask)]
        if not scaled:
            raise UserError("None of these slices can hold the weights: ask for more --chips.")
        efficient = [record for ask in self._asked_along_points(scaled) for record in kept.records(ask)]
        content = io.BytesIO()
        figure(scaled).savefig(content, format="png", dpi=120, metadata={"Software": None})
        self.out.mkdir(parents=True, exist_ok=True)
        write_whole(self.out / "scaling.png", content.getvalue())
        asks = [
            self._ask(model, kind, n, ndim)
            for model in self.models
            for kind in self.kinds
            for n in FLAT
            for ndim in (1, 2)
        ]
        tried = [record for ask in asks for record in kept.known(ask)]
        write_whole(self.out / "scaling.md", report(self, scaled, tried, efficient))
        write_line(f"{self.out / 'scaling.md'}\n{self.out / 'scaling.png'}")

    def _asked(self) -> Iterator[dict[str, Any]]:
        """A landscape of so many points and prompts on more and more chips."""
        for model in self.models:
            weights = 2 * sum(leaf.size for leaf in jax.tree.leaves(parameter_shapes(shape_config(model))))
            for kind in self.kinds:
                for chips in (n for n in self.chips if weights < n * CHIPS[kind].memory):
                    for ndim in (1, 2):
                        yield self._ask(model, kind, chips, ndim)

    def _asked_along_points(self, scaled: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """For each group of chips the prompts and the slots that one group has alone."""
        alone = [r for r in scaled if (r["model"], r["chips"], len(r["grid"])) == (self.models[0], GROUP, 1)]
        for group in (record for record in alone if record["fits"]):
            for times in (chips // GROUP for chips in self.chips if chips % GROUP == 0):
                ask = self._ask(group["model"], group["kind"], GROUP * times, 1) | {"prompts": self.prompts * times}
                yield ask | {"groups_of": GROUP, "form": group["form"], "slots": group["rows"] * times}

    def _ask(self, model: str, kind: str, chips: int, ndim: int) -> dict[str, Any]:
        what = {"model": model, "kind": kind, "chips": chips, "grid": [self.points] * ndim}
        return what | {"prompts": self.prompts, "max_new_tokens": self.max_new_tokens}


@dataclass(frozen=True)
class Kept:
    """Forecasts in a file, one to a line: what was asked, and what was found."""

    path: Path

    def known(self, ask: dict[str, Any]) -> list[dict[str, Any]]:
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        keys = {*ask, "groups_of"}
        return [record for record in map(json.loads, lines) if all(record.get(key) == ask.get(key) for key in keys)]

    def records(self, ask: dict[str, Any]) -> list[dict[str, Any]]:
        """What is known, or is found out now."""
        found = self.known(ask)
        if not found:
            found = [ask | each for each in answers(ask)]
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.writelines(json.dumps(record) + "\n" for record in found)
            write_line(f"{ask}: {', '.join(str(record['points_per_hour']) for record in found)}")
        return found


def answers(ask: dict[str, Any]) -> list[dict[str, Any]]:
    """The forecasts of both forms, or of the one that is asked for."""
    config = shape_config(ask["model"])
    where = open_slice(f"{ask['kind']}:{SLICES[ask['kind']][ask['chips']]}")
    work = make_workload(ask["prompts"], PROMPT_TOKENS, SHARED_TOKENS, ask["max_new_tokens"], tuple(ask["grid"]))
    if "groups_of" not in ask:
        return [record(each) for each in forecast(config, work, where, quick=True)]
    # All groups split the weights as one does.
    group = open_slice(f"{ask['kind']}:{SLICES[ask['kind']][ask['groups_of']]}")
    model = mesh_shape_of(shape_on(config, group, None, "bfloat16").mesh).model
    mesh_shape, options = MeshShape(ask["chips"] // model, model), EngineOptions(form=ask["form"], slots=ask["slots"])
    return [record(each) for each in forecast(config, work, where, mesh_shape=mesh_shape, options=options, quick=True)]


def record(found: Forecast) -> dict[str, Any]:
    decode = found.programs["decode"]
    return {
        "form": found.form,
        "mesh": found.mesh,
        "fits": found.fits,
        "missing_gb": round(found.missing / 1e9, 2),
        "rows": found.plan.layout.batch,
        "points_per_hour": round(3600 / found.point_seconds, 1) if found.fits else None,
        "limit_per_hour": round(3600 / found.point_limit, 1) if found.fits else None,
        "decode_share": round(found.decode_share, 3),
        "step_ms": round(1e3 * decode.seconds, 3) if found.fits else None,
        "step_gb": round(decode.memory_bytes / 1e9, 3),
        "step_sent_mb": round(decode.sent_bytes / 1e6, 2),
        "step_collectives": decode.collectives,
    }


def figure(records: Sequence[dict[str, Any]]) -> Figure:
    models, kinds = (list(dict.fromkeys(record[key] for record in records)) for key in ("model", "kind"))
    drawn = Figure(figsize=(3.6 * len(kinds), 3 * len(models)), layout="constrained")
    all_axes = drawn.subplots(len(models), len(kinds), sharex=True, sharey="row", squeeze=False)
    for i, model in enumerate(models):
        for j, kind in enumerate(kinds):
            axes, here = all_axes[i, j], [r for r in records if (r["model"], r["kind"]) == (model, kind) and r["fits"]]
            for number, (form, ndim) in enumerate((form, ndim) for ndim in (1, 2) for form in FORMS):
                line = [r for r in here if r["form"] == form and len(r["grid"]) == ndim]
                style = {"color": COLOURS[number], "linestyle": STYLES[number]}
                chips, label = [r["chips"] for r in line], f"{form}, {ndim}D"
                axes.plot(chips, [r["points_per_hour"] for r in line], marker=MARKERS[number], **style, label=label)
                limit = [r["limit_per_hour"] for r in line]
                axes.plot(chips, limit, marker="_", markersize=12, linestyle="", color=style["color"])
            axes.set(xscale="log", yscale="log", title=f"{model}, {kind}")
            axes.set_xticks(sorted({r["chips"] for r in records}))
            axes.xaxis.set_major_formatter(ScalarFormatter())
            axes.minorticks_off()
            axes.grid(alpha=0.3)
        all_axes[i, 0].set_ylabel("points per hour")
    for axes in all_axes[-1]:
        axes.set_xlabel("chips")
    handles = {
        text: line for axes in all_axes.flat for line, text in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    drawn.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=8)
    return drawn


def report(
    scaling: Scaling,
    scaled: Sequence[dict[str, Any]],
    tried: Sequence[dict[str, Any]],
    efficient: Sequence[dict[str, Any]],
) -> str:
    command = "python benchmarks/benchmark_scaling.py"
    lines = [
        "# Scaling",
        "",
        f"Points per hour of landscapes with {scaling.prompts} prompts and {scaling.max_new_tokens} new tokens, of "
        f"which every row makes all, in bfloat16; made by `{command}`. These are forecasts: the programs of a run, "
        "compiled for one layer and for two by the TPU compiler, every further layer taken for another of what the "
        "second adds, and by the roofline of what they compute, move and send. Nothing was measured on a TPU.",
        "",
        "![points per hour against chips](scaling.png)",
        "",
        "Short bars in the figure are the limit: decode steps alone, which read weights and cache once, or compute, "
        "whichever takes longer.",
        "",
    ]
    lines += [
        "## The smallest slices",
        "",
        "On which one fits, in its better form, among all that have been tried.",
        "",
    ]
    lines += ["| model | landscape | " + " | ".join(scaling.kinds) + " |", "| --- " * (2 + len(scaling.kinds)) + "|"]
    for model, ndim in ((model, ndim) for model in scaling.models for ndim in (1, 2)):
        found = [_smallest(tried, model, kind, ndim) for kind in scaling.kinds]
        lines += [f"| {model} | {ndim}D | " + " | ".join(found) + " |"]
    lines += [""]
    for model in scaling.models:
        lines += [f"## {model}", ""]
        lines += ["| slice | mesh | landscape | form | rows | points/hour | of the limit | decode ms | of its limit |"]
        lines += ["| --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
        lines += [_line(each, scaled) for each in scaled if each["model"] == model]
        lines += [""]
    lines += [
        "## Along `points`",
        "",
        f"{scaling.models[0]}, {scaling.prompts} prompts for each {GROUP} chips, split as they are on {GROUP}: what "
        "each chip moves and sends in a decode step, and answers per hour and chip, as a share of those on "
        f"{GROUP} chips.",
        "",
        "| slice | form | rows | moved GB | sent MB | collectives | efficiency |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for each in efficient:
        first = next(r for r in efficient if all(r[key] == each[key] for key in ("kind", "form")))
        speeds = [r["prompts"] * (r["points_per_hour"] or 0) / r["chips"] for r in (each, first)]
        share = f"{100 * speeds[0] / speeds[1]:.0f} %" if speeds[1] else ""
        lines += [
            f"| {_slice(each)} | {each['form']} | {each['rows']} | {each['step_gb']} | {each['step_sent_mb']} | "
            f"{each['step_collectives']} | {share} |"
        ]
    return "\n".join([*lines, ""])


def _line(each: dict[str, Any], records: Sequence[dict[str, Any]]) -> str:
    same = [r for r in records if all(r[key] == each[key] for key in ("model", "kind", "chips", "grid"))]
    best = max(r["points_per_hour"] or 0 for r in same)
    start = f"| {_slice(each)} | {each['mesh']} | {len(each['grid'])}D | {each['form']} | {each['rows']} |"
    if not each["fits"]:
        return f"{start} lacks {each['missing_gb']} GB a chip | | | |"
    speed, mark = each["points_per_hour"], "**" if each["points_per_hour"] == best else ""
    share = 100 * speed / each["limit_per_hour"]
    decode = f"{each['step_ms']:.2f} | {100 * each['decode_share']:.0f} %"
    return f"{start} {mark}{speed:.0f}{mark} | {share:.0f} % | {decode} |"


def _smallest(records: Sequence[dict[str, Any]], model: str, kind: str, ndim: int) -> str:
    same = [r for r in records if (r["model"], r["kind"], len(r["grid"])) == (model, kind, ndim)]
    fitting = (r for r in same if r["fits"])
    first = min(fitting, key=lambda r: (r["chips"], -r["points_per_hour"]), default=None)
    if first is None:
        return "none"
    smaller = (r for r in same if r["chips"] < first["chips"])
    below = max(smaller, key=lambda r: (r["chips"], -r["missing_gb"]), default=None)
    lacking = "" if below is None else f" ({_slice(below)} lacks {below['missing_gb']} GB a chip)"
    return f"{_slice(first)}, {first['form']}, {first['rows']} rows{lacking}"


def _slice(record: dict[str, Any]) -> str:
    return f"{record['kind']}:{SLICES[record['kind']][record['chips']]} ({record['chips']})"


def measure(scaling: Scaling) -> None:
    """The same prompts for each device, on one device, two, four, and so on."""
    devices = len(jax.devices())
    prompts = load_prompts("harmful", min(scaling.prompts, 40))
    (axis,) = symmetric_axes(1, 2, 0.1)
    points: list[tuple[float, ...]] = [(alpha,) for alpha in axis.values]
    sampling, first = Sampling(min(scaling.max_new_tokens, 64)), None
    for count in (2**i for i in range(devices.bit_length()) if 2**i <= devices):
        model = load_model(scaling.measured_model, mesh_shape=MeshShape(count, 1))
        rows = tokenize(model, prompts * count, "default", sampling.max_new_tokens)
        workload = Workload(rows, sampling, len(points), len(points), 1, num_random=1)
        plan = make_plan(model, workload, EngineOptions(form=scaling.measured_form))  # type: ignore[arg-type]
        engine = Engine(model, workload, plan)
        direction = make_directions([0], model)
        for _ in range(2):  # the first time compiles
            started = time.perf_counter()
            texts = [[c.text for c in point[: len(prompts)]] for point in engine.complete(direction, points)]
            seconds = time.perf_counter() - started
        first = first or texts
        tokens = len(points) * len(rows) * sampling.max_new_tokens
        write_line(
            f"{count} of {devices} x {jax.devices()[0].device_kind}: {len(points) * 3600 / seconds:.0f} points an "
            f"hour of {len(rows)} prompts, up to {tokens / seconds:.0f} tokens a second; the texts of the first "
            f"{len(prompts)} prompts are {'the same' if texts == first else 'others'} as on one device"
        )
    if jax.default_backend() == "cpu":
        write_line("Devices that share one CPU show that the texts are the same, and nothing about speed.")


if __name__ == "__main__":
    run_program(Scaling)
