"""Forecast how scans scale over TPU chips, or measure how they scale over the devices of this machine.

Run it from the repository's root:

    python benchmarks/benchmark_scaling.py              # forecast; needs the TPU compiler (libtpu), but no TPU
    python benchmarks/benchmark_scaling.py --measure    # measure; a minute or two for each number of devices

The forecast is of a landscape's points per hour on slices of up to 64 chips, in both forms, in 1D and 2D. A table and a
figure are written to docs/scaling.md. Forecasts that are already in docs/scaling.jsonl are not made again, so that
writing both anew takes seconds; each new forecast takes one to several minutes.

With `--measure`, weak scaling is measured: each of 1, 2, 4, … devices answers the same prompts, and the texts are
checked to be the same.
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

import jaxscape as js
from jaxscape.cli.main import run_program
from jaxscape.cli.options import DEFAULT_MODEL
from jaxscape.engine.batching import Workload, tokenize
from jaxscape.engine.engine import Engine
from jaxscape.engine.planner import make_plan
from jaxscape.engine.sampling import Sampling
from jaxscape.forecast.chips import CHIPS, open_slice, shape_on
from jaxscape.forecast.forecast import Forecast, forecast, make_workload
from jaxscape.forecast.known_models import shape_config
from jaxscape.landscapes.axes import symmetric_axes
from jaxscape.models.decoder import parameter_shapes
from jaxscape.report.figures import COLOURS, MARKERS, STYLES
from jaxscape.runtime.files import write_whole
from jaxscape.runtime.sharding import mesh_shape_of
from jaxscape.runtime.streams import write_line

SHAPES_2D = {1: "1x1", 2: "1x2", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8"}
SHAPES_3D = {1: "1x1x1", 2: "2x1x1", 4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4"}
SLICE_SHAPES = {"v5e": SHAPES_2D, "v5p": SHAPES_3D, "v6e": SHAPES_2D}
"""For each kind of chip, a slice's shape by its number of chips."""

GROUP = 4  # weak scaling starts from this many chips
FORMS = ("materialised", "factorised")
# Numbers of tokens of the standard prompts in Llama-2's chat format: in the longest one, and at the start of all.
PROMPT_TOKENS, SHARED_TOKENS = 56, 26

Question = dict[str, Any]
"""A forecast to make. Its keys are `model`, `kind` (of chip), `chips` (their number), `grid` (points along each axis),
`prompts` (their number) and `max_new_tokens`; for weak scaling also `groups_of` (number of chips that share the
weights), `form` and `slots`."""

Record = dict[str, Any]
"""A line of scaling.jsonl: a question, and the forecast of one form that answers it."""


@dataclass(frozen=True)
class Scaling:
    """Forecast how scans scale over TPU chips, or measure how they scale over the devices of this machine."""

    measure: bool = False
    """Measure on the devices of this machine, instead of forecasting for TPUs."""
    models: tuple[str, ...] = ("llama-2-7b", "llama-2-13b", "llama-3-70b")
    """Models to forecast, by the names that `jaxscape plan` knows."""
    kinds: tuple[str, ...] = tuple(SLICE_SHAPES)
    """Kinds of TPU chips to forecast for."""
    chips: tuple[int, ...] = (4, 16, 64)
    """Numbers of chips in a slice. Slices that cannot even hold the weights are left out. Give smaller numbers to find
    the smallest slices."""
    points: int = 21
    """Number of points along each axis of the landscape."""
    prompts: int = 80
    """Number of prompts."""
    max_new_tokens: int = 512
    """Number of tokens generated for each prompt."""
    out: Path = Path("docs")
    """Directory of scaling.md, scaling.png and scaling.jsonl. Forecasts in scaling.jsonl are not made again."""
    measured_model: str = DEFAULT_MODEL
    """The model to measure with."""
    measured_form: str = "materialised"
    """The form of the weights to measure with."""

    def run(self) -> None:
        if self.measure:
            measure(self)
            return
        unknown = [
            f"{kind} with {n} chips" for kind in self.kinds for n in self.chips if n not in SLICE_SHAPES.get(kind, {})
        ]
        if unknown:
            raise js.UserError(f"There are no slices for {', '.join(unknown)}: choose among {SLICE_SHAPES}.")
        records = RecordFile(self.out / "scaling.jsonl")
        jax.config.update("jax_platforms", "cpu")  # the compiler needs no device
        scans = [record for question in self._scans() for record in records.answer(question)]
        if not scans:
            raise js.UserError("None of these slices can hold the weights: ask for more --chips.")
        weak = [record for question in self._weak_scaling(scans) for record in records.answer(question)]
        # The smallest slice is looked for among all forecasts of such landscapes in the file.
        all_scans = [
            record
            for model in self.models
            for kind in self.kinds
            for chips in SHAPES_2D
            for ndim in (1, 2)
            for record in records.read(self._question(model, kind, chips, ndim))
        ]
        content = io.BytesIO()
        draw(scans).savefig(content, format="png", dpi=120, metadata={"Software": None})
        self.out.mkdir(parents=True, exist_ok=True)
        write_whole(self.out / "scaling.png", content.getvalue())
        write_whole(self.out / "scaling.md", report(self, scans, all_scans, weak))
        write_line(f"{self.out / 'scaling.md'}\n{self.out / 'scaling.png'}")

    def _scans(self) -> Iterator[Question]:
        """The forecasts to make of the same landscapes on slices of different kinds and sizes."""
        for model in self.models:
            weight_bytes = 2 * sum(leaf.size for leaf in jax.tree.leaves(parameter_shapes(shape_config(model))))
            for kind in self.kinds:
                for chips in (n for n in self.chips if weight_bytes < n * CHIPS[kind].memory):
                    for ndim in (1, 2):
                        yield self._question(model, kind, chips, ndim)

    def _weak_scaling(self, scans: Sequence[Record]) -> Iterator[Question]:
        """The forecasts to make for weak scaling.

        They are the first model's 1D scans that fit on `GROUP` chips, with chips, prompts and slots multiplied by the
        same factor.
        """
        for scan in scans:
            if (scan["model"], scan["chips"], len(scan["grid"])) != (self.models[0], GROUP, 1) or not scan["fits"]:
                continue
            for factor in (chips // GROUP for chips in self.chips if chips % GROUP == 0):
                question = self._question(scan["model"], scan["kind"], GROUP * factor, 1)
                question |= {"prompts": self.prompts * factor, "groups_of": GROUP}
                yield question | {"form": scan["form"], "slots": scan["rows"] * factor}

    def _question(self, model: str, kind: str, chips: int, ndim: int) -> Question:
        question = {"model": model, "kind": kind, "chips": chips, "grid": [self.points] * ndim}
        return question | {"prompts": self.prompts, "max_new_tokens": self.max_new_tokens}


@dataclass(frozen=True)
class RecordFile:
    """A JSONL file of records."""

    path: Path

    def read(self, question: Question) -> list[Record]:
        """The records in the file that answer a question."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        keys = {*question, "groups_of"}
        return [record for record in map(json.loads, lines) if all(record.get(k) == question.get(k) for k in keys)]

    def answer(self, question: Question) -> list[Record]:
        """The records that answer a question; if the file has none, they are made and added to it."""
        records = self.read(question)
        if not records:
            records = [question | to_record(result) for result in make_forecasts(question)]
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)
            write_line(f"{question}: {', '.join(str(record['points_per_hour']) for record in records)}")
        return records


def make_forecasts(question: Question) -> list[Forecast]:
    """The forecasts of both forms, or of the one that the question names."""
    config, shapes = shape_config(question["model"]), SLICE_SHAPES[question["kind"]]
    tpu_slice = open_slice(f"{question['kind']}:{shapes[question['chips']]}")
    grid = tuple(question["grid"])
    workload = make_workload(question["prompts"], PROMPT_TOKENS, SHARED_TOKENS, question["max_new_tokens"], grid)
    if "groups_of" not in question:
        return forecast(config, workload, tpu_slice, quick=True)
    # Each group of chips shards the weights as it would by itself.
    group = open_slice(f"{question['kind']}:{shapes[question['groups_of']]}")
    model = mesh_shape_of(shape_on(config, group, None, "bfloat16").mesh).model
    mesh_shape = js.MeshShape(question["chips"] // model, model)
    options = js.EngineOptions(form=question["form"], slots=question["slots"])
    return forecast(config, workload, tpu_slice, mesh_shape=mesh_shape, options=options, quick=True)


def to_record(result: Forecast) -> Record:
    """What a record keeps of a forecast. The keys `step_…` describe one decode step on one chip."""
    decode = result.programs["decode"]
    return {
        "form": result.form,
        "mesh": result.mesh,
        "fits": result.fits,
        "missing_gb": round(result.missing / 1e9, 2),
        "rows": result.plan.layout.batch,
        "points_per_hour": round(3600 / result.point_seconds, 1) if result.fits else None,
        "limit_per_hour": round(3600 / result.point_limit, 1) if result.fits else None,
        "decode_share": round(result.decode_share, 3),
        "step_ms": round(1e3 * decode.seconds, 3) if result.fits else None,
        "step_gb": round(decode.hbm_bytes / 1e9, 3),
        "step_sent_mb": round(decode.sent_bytes / 1e6, 2),
        "step_collectives": decode.collectives,
    }


def draw(scans: Sequence[Record]) -> Figure:
    """A figure of points per hour against chips, for each model and kind of chip; short bars are the limits."""
    models, kinds = (list(dict.fromkeys(scan[key] for scan in scans)) for key in ("model", "kind"))
    figure = Figure(figsize=(3.6 * len(kinds), 3 * len(models)), layout="constrained")
    all_axes = figure.subplots(len(models), len(kinds), sharex=True, sharey="row", squeeze=False)
    for i, model in enumerate(models):
        for j, kind in enumerate(kinds):
            axes = all_axes[i, j]
            fitting = [scan for scan in scans if (scan["model"], scan["kind"]) == (model, kind) and scan["fits"]]
            for number, (ndim, form) in enumerate((ndim, form) for ndim in (1, 2) for form in FORMS):
                line = [scan for scan in fitting if scan["form"] == form and len(scan["grid"]) == ndim]
                style = {"color": COLOURS[number], "linestyle": STYLES[number], "label": f"{form}, {ndim}D"}
                chips = [scan["chips"] for scan in line]
                axes.plot(chips, [scan["points_per_hour"] for scan in line], marker=MARKERS[number], **style)
                limits = [scan["limit_per_hour"] for scan in line]
                axes.plot(chips, limits, marker="_", markersize=12, linestyle="", color=COLOURS[number])
            axes.set(xscale="log", yscale="log", title=f"{model}, {kind}")
            axes.set_xticks(sorted({scan["chips"] for scan in scans}))
            axes.xaxis.set_major_formatter(ScalarFormatter())
            axes.minorticks_off()
            axes.grid(alpha=0.3)
        all_axes[i, 0].set_ylabel("points per hour")
    for axes in all_axes[-1]:
        axes.set_xlabel("chips")
    handles = {
        text: line for axes in all_axes.flat for line, text in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=8)
    return figure


def report(scaling: Scaling, scans: Sequence[Record], all_scans: Sequence[Record], weak: Sequence[Record]) -> str:
    """The text of scaling.md."""
    lines = [
        "# Scaling",
        "",
        "Forecasts of the number of points per hour at which landscapes are measured on TPU slices. "
        f"`python benchmarks/benchmark_scaling.py` made them; nothing was measured on a TPU. A landscape has "
        f"{scaling.points} points along each axis and {scaling.prompts} prompts, and each answer has "
        f"{scaling.max_new_tokens} new tokens. Weights are in bfloat16.",
        "",
        "The TPU compiler compiles each program of a run for one layer and for two, and FLOPs, HBM traffic and "
        "inter-chip traffic are extrapolated linearly to all layers. The roofline model turns them into seconds.",
        "",
        "![points per hour against chips](scaling.png)",
        "",
        "A decode step takes at least as long as reading the weights and the cache once, or as computing, whichever is "
        "longer. A point takes at least as long as its decode steps at that limit: the short bars in the figure. In "
        "the tables, the columns `of limit` give the share of the speed at the limit that a point and a decode step "
        "reach, and the faster form of each landscape is bold.",
        "",
        *_smallest_slices(scaling, all_scans),
    ]
    for model in scaling.models:
        lines += [
            f"## {model}",
            "",
            "| slice (chips) | mesh | landscape | form | rows | points/hour | of limit | decode ms | of limit |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
            *(_scan_row(scan, scans) for scan in scans if scan["model"] == model),
            "",
        ]
    return "\n".join([*lines, *_weak_scaling_section(scaling, weak), ""])


def _smallest_slices(scaling: Scaling, all_scans: Sequence[Record]) -> list[str]:
    lines = [
        "## The smallest slices",
        "",
        "The smallest slice that a landscape fits on, among all that were tried, and the faster form there. In "
        "brackets: the memory that the next smaller slice lacks.",
        "",
        "| model | landscape | " + " | ".join(scaling.kinds) + " |",
        "| --- " * (2 + len(scaling.kinds)) + "|",
    ]
    for model, ndim in ((model, ndim) for model in scaling.models for ndim in (1, 2)):
        cells = [_smallest_slice(all_scans, model, kind, ndim) for kind in scaling.kinds]
        lines.append(f"| {model} | {ndim}D | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _smallest_slice(all_scans: Sequence[Record], model: str, kind: str, ndim: int) -> str:
    scans = [s for s in all_scans if (s["model"], s["kind"], len(s["grid"])) == (model, kind, ndim)]
    fitting = (scan for scan in scans if scan["fits"])
    smallest = min(fitting, key=lambda scan: (scan["chips"], -scan["points_per_hour"]), default=None)
    if smallest is None:
        return "none"
    smaller = (scan for scan in scans if scan["chips"] < smallest["chips"])
    next_smaller = max(smaller, key=lambda scan: (scan["chips"], -scan["missing_gb"]), default=None)
    lacks = ""
    if next_smaller is not None:
        lacks = f" ({_slice_name(next_smaller)} lacks {next_smaller['missing_gb']} GB a chip)"
    return f"{_slice_name(smallest)}, {smallest['form']}, {smallest['rows']} rows{lacks}"


def _scan_row(scan: Record, scans: Sequence[Record]) -> str:
    forms = [s for s in scans if all(s[key] == scan[key] for key in ("model", "kind", "chips", "grid"))]
    best = max(s["points_per_hour"] or 0 for s in forms)
    start = f"| {_slice_name(scan)} | {scan['mesh']} | {len(scan['grid'])}D | {scan['form']} | {scan['rows']} |"
    if not scan["fits"]:
        return f"{start} lacks {scan['missing_gb']} GB a chip | | | |"
    speed, bold = scan["points_per_hour"], "**" if scan["points_per_hour"] == best else ""
    share = 100 * speed / scan["limit_per_hour"]
    decode = f"{scan['step_ms']:.2f} | {100 * scan['decode_share']:.0f} %"
    return f"{start} {bold}{speed:.0f}{bold} | {share:.0f} % | {decode} |"


def _weak_scaling_section(scaling: Scaling, weak: Sequence[Record]) -> list[str]:
    """The section on weak scaling along the mesh axis `points`: as many prompts for each chip on every slice."""
    rows, efficiencies = [], dict[tuple[str, str], list[tuple[int, str]]]()
    for record in weak:
        first = next(r for r in weak if all(r[key] == record[key] for key in ("kind", "form")))
        speed, first_speed = (r["prompts"] * (r["points_per_hour"] or 0) / r["chips"] for r in (record, first))
        efficiency = f"{100 * speed / first_speed:.0f} %" if first_speed else ""
        rows.append(
            f"| {_slice_name(record)} | {record['form']} | {record['rows']} | {record['step_gb']} | "
            f"{record['step_sent_mb']} | {record['step_collectives']} | {efficiency} |"
        )
        efficiencies.setdefault((record["kind"], record["form"]), []).append((record["chips"], efficiency))
    sentences = []
    for (kind, form), values in efficiencies.items():
        (first_chips, _), (chips, efficiency) = min(values), max(values)
        if efficiency and chips > first_chips:
            sentences.append(
                f"- Weak scaling from {first_chips} to {chips} {kind} chips is {efficiency} efficient ({form} form)."
            )
    return [
        "## Weak scaling",
        "",
        f"{scaling.models[0]}, 1D, with {scaling.prompts} prompts for every {GROUP} chips. Each group of {GROUP} chips "
        f"shards the weights as {GROUP} chips do by themselves, and the rows of a batch are sharded over the groups. "
        f"Efficiency is the number of answers per hour and chip, relative to {GROUP} chips.",
        "",
        *([*sentences, ""] if sentences else []),
        "The traffic is that of a decode step on each chip.",
        "",
        "| slice (chips) | form | rows | HBM GB | sent MB | collectives | efficiency |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *rows,
    ]


def _slice_name(record: Record) -> str:
    return f"{record['kind']}:{SLICE_SHAPES[record['kind']][record['chips']]} ({record['chips']})"


def measure(scaling: Scaling) -> None:
    """Measure weak scaling over the devices of this machine: each of 1, 2, 4, … devices answers the same prompts."""
    num_devices = len(jax.devices())
    prompts = js.load_prompts("harmful", min(scaling.prompts, 40))
    (axis,) = symmetric_axes(1, 2, 0.1)
    points: list[tuple[float, ...]] = [(alpha,) for alpha in axis.values]
    sampling, first_texts = Sampling(min(scaling.max_new_tokens, 64)), None
    for count in (2**i for i in range(num_devices.bit_length()) if 2**i <= num_devices):
        model = js.load_model(scaling.measured_model, mesh_shape=js.MeshShape(count, 1))
        prompt_tokens = tokenize(model, prompts * count, "default", sampling.max_new_tokens)
        workload = Workload(prompt_tokens, sampling, len(points), len(points), 1, num_random=1)
        options = js.EngineOptions(form=scaling.measured_form)  # type: ignore[arg-type]
        engine = Engine(model, workload, make_plan(model, workload, options))
        directions = js.make_directions([0], model)
        for _ in range(2):  # the first time compiles
            started = time.perf_counter()
            texts = [
                [c.text for c in completions[: len(prompts)]] for completions in engine.complete(directions, points)
            ]
            seconds = time.perf_counter() - started
        first_texts = first_texts or texts
        max_tokens = len(points) * len(prompt_tokens) * sampling.max_new_tokens
        write_line(
            f"{count} of {num_devices} x {jax.devices()[0].device_kind}: {len(points) * 3600 / seconds:.0f} points an "
            f"hour with {len(prompt_tokens)} prompts, up to {max_tokens / seconds:.0f} tokens a second; the first "
            f"{len(prompts)} texts of a point {'equal' if texts == first_texts else 'differ from'} those of one device"
        )
    if jax.default_backend() == "cpu":
        write_line("These devices share one CPU, so only the texts mean something, not the speeds.")


if __name__ == "__main__":
    run_program(Scaling)
