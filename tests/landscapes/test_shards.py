"""Scans in shards: how points are divided, and that merged shards are the run that one machine would have written."""

import itertools
import json
import math
import os
import shutil
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import NamedJudge, append_answers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jaxscape as js
from jaxscape.cli.main import main
from jaxscape.landscapes import labels, store
from jaxscape.landscapes.axes import Axis
from jaxscape.landscapes.runs import find_runs
from jaxscape.landscapes.shards import Shard, boundaries, expected_costs
from jaxscape.landscapes.store import open_run
from jaxscape.runtime.files import append_json_lines

PROMPTS = ["Write a poem about geese", "Hi", "Explain what a key is"]
QUICK: dict[str, Any] = {"prompts": PROMPTS[:2], "max_new_tokens": 4, "progress": False}
FACTORISED = js.EngineOptions(form="factorised")
LINE = [((i - 10) / 20,) for i in range(21)]
TOKENS = [64.0, 64, 64, 64, 64, 62, 60.1, 27.6, 3.8, 3.5, 4.3, 4.7, 5.8, 51.5, 63.2, 61.8, 62, 60.5, 64, 62.8, 64]
"""The mean number of tokens of an answer at the points of the default scan of smollm2-135m-safe."""


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@given(costs=st.lists(st.integers(1, 600), min_size=1, max_size=60), data=st.data())
def test_parts_have_about_the_same_cost(costs: list[int], data: st.DataObject) -> None:
    """Every part has a point, and a part's cost differs from an equal share by no more than a point at each end."""
    count = data.draw(st.integers(1, len(costs)))
    ends = boundaries(costs, count)
    assert ends[0] == 0
    assert ends[-1] == len(costs)
    assert all(start < stop for start, stop in itertools.pairwise(ends))
    if max(costs) * count <= sum(costs):  # no part is as small as a point
        for start, stop in itertools.pairwise(ends):
            assert abs(sum(costs[start:stop]) - sum(costs) / count) <= max(costs)


@pytest.mark.parametrize(("count", "by_cost", "by_number"), [(2, 1.02, 1.03), (4, 1.05, 1.53), (8, 1.05, 1.56)])
def test_the_parts_of_the_default_scan_generate_about_as_many_tokens(
    count: int, by_cost: float, by_number: float
) -> None:
    """The largest part's tokens over those of an equal share, and the same of parts with as many points."""

    def imbalance(ends: Sequence[int]) -> float:
        parts = [sum(TOKENS[start:stop]) for start, stop in itertools.pairwise(ends)]
        return max(parts) / (sum(TOKENS) / count)

    assert imbalance(boundaries(expected_costs(LINE, 64), count)) < by_cost
    assert round(imbalance([len(LINE) * i // count for i in range(count + 1)]), 2) == by_number


@given(
    coords=st.integers(1, 3).flatmap(
        lambda size: st.lists(st.tuples(*[st.floats(-2, 2)] * size), min_size=1, max_size=20)
    )
)
def test_a_point_costs_more_the_farther_it_is_from_the_model(coords: list[tuple[float, ...]]) -> None:
    costs = expected_costs(coords, 64)
    assert all(16 <= cost <= 16 + 64 for cost in costs)
    assert expected_costs([tuple(4 * c for c in point) for point in coords], 64) == costs
    largest = [max(map(abs, along)) or 1 for along in zip(*coords, strict=True)]
    distances = [math.dist([0] * len(point), np.array(point) / largest) for point in coords]
    assert sorted(costs) == [cost for _, cost in sorted(zip(distances, costs, strict=True))]


@dataclass(frozen=True)
class Written:
    """A scan whose outcomes a test gives.

    Attributes:
        values: those of each axis; none if the points are listed.
        coords: the points, if they are listed.
        refused: bool[points, prompts].
        labels: whether an evaluator's labels are kept.
    """

    values: tuple[tuple[float, ...], ...]
    coords: tuple[tuple[float, ...], ...]
    refused: np.ndarray
    num_sets: int
    labels: bool

    @property
    def axes(self) -> tuple[Axis, ...]:
        return tuple(Axis(name, values) for name, values in zip("ab", self.values, strict=False))

    @property
    def grid(self) -> Sequence[tuple[float, ...]]:
        return self.coords or list(itertools.product(*self.values))

    def write(self, directory: Path, shard: str | None = None, done: int | None = None, **changes: Any) -> Path:
        """Write the scan, or one part of it, up to a point, into a directory."""
        judge = NamedJudge("xstest")
        config = {
            "weights": "ẅ",
            "directions": [[[i, k] for k in range(len(self.grid[0]))] for i in range(self.num_sets)],
            "axes": [axis.described() for axis in self.axes],
            **({"points": [list(point) for point in self.coords]} if self.coords else {}),
            "form": "materialised",
        } | changes
        part = Shard(1, 1, 0, len(self.refused))
        if shard is not None:
            part = Shard.of(shard, self.grid, self.num_sets, 64, ["xstest"] if self.labels else [])
            config["shard"] = part.described()
        prompts = PROMPTS[: self.refused.shape[1]]
        with open_run(directory, config, self.axes, self.num_sets, prompts, prompts, coords=self.coords) as run:
            for verdicts in self.refused[part.start : part.stop][run.num_done : done].tolist():
                labels = ["refused" if verdict else None for verdict in verdicts]
                said = [(judge, labels)] if self.labels else []
                append_answers(run, ["no" if verdict else "yes…" for verdict in verdicts], verdicts, said)
        return directory

    def shards(self, directory: Path, count: int) -> list[Path]:
        return [self.write(directory / f"{i}", f"{i}/{count}") for i in range(1, count + 1)]


@st.composite
def written(draw: st.DrawFn) -> Written:
    values = st.lists(st.floats(-1, 1), min_size=1, max_size=4, unique=True)
    ndim, num_sets = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    axes = tuple(tuple(sorted(draw(values))) for _ in range(ndim))
    coords: tuple[tuple[float, ...], ...] = ()
    if draw(st.booleans()):
        axes, size = (), draw(st.integers(1, 3))
        coords = tuple(draw(st.lists(st.tuples(*[st.floats(-1, 1)] * size), min_size=1, max_size=6, unique=True)))
    num_points = num_sets * (len(coords) or math.prod(map(len, axes)))
    num_prompts = draw(st.integers(1, 3))
    verdicts = draw(st.lists(st.booleans(), min_size=num_points * num_prompts, max_size=num_points * num_prompts))
    refused = np.array(verdicts).reshape(num_points, num_prompts)
    return Written(axes, coords, refused, num_sets, draw(st.booleans()))


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(scan=written(), data=st.data())
def test_merged_shards_have_the_bytes_of_one_run(
    tmp_path_factory: pytest.TempPathFactory, scan: Written, data: st.DataObject
) -> None:
    """In any number of parts, given in any order, and interrupted or not."""
    place = tmp_path_factory.mktemp("scan")
    count = data.draw(st.integers(1, min(5, len(scan.refused))))
    for number in range(1, count + 1):
        if data.draw(st.booleans()):
            scan.write(place / f"{number}", f"{number}/{count}", done=data.draw(st.integers(0, 2)))
    shards = scan.shards(place, count)
    land = js.merge(data.draw(st.permutations(shards)), place / "merged")
    assert contents(place / "merged") == contents(scan.write(place / "whole"))
    assert land.to_json() == js.Landscape.load(place / "whole").to_json()
    assert {path.name for path in place.iterdir()} == {"merged", "whole", *(path.name for path in shards)}


SCAN = Written(((-0.5, 0.0, 0.5),), (), np.eye(6, 2) > 0, 2, labels=True)


def test_shards_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    a, b, c = SCAN.shards(tmp_path, 3)
    other, half, whole = tmp_path / "other", tmp_path / "half", SCAN.write(tmp_path / "whole")
    SCAN.write(other, "2/3", weights="others")
    SCAN.write(half, "1/2")
    SCAN.write(tmp_path / "form", "2/3", form="factorised")
    SCAN.write(tmp_path / "short", "2/3", done=1)
    Written(SCAN.values, (), SCAN.refused, 2, labels=False).write(tmp_path / "unjudged", "2/3")
    copy = shutil.copytree(b, tmp_path / "copy")
    (tmp_path / "none").mkdir()
    late = shutil.copytree(b, tmp_path / "late")
    (late / "labels-xstest.jsonl").unlink()
    damaged = shutil.copytree(b, tmp_path / "damaged")
    (damaged / "generations.jsonl").write_text("{}\n" * 4)
    for directories, message in {
        (): "There is no shard to merge",
        (a, c): "Of 3 shards, these are missing: 2; give the directories of all",
        (c,): "Of 3 shards, these are missing: 1, 2",
        (a, b, c, copy): f"{b} and {copy} are both shard 2 of 3: give each shard once",
        (a, a, b, c): f"{a} and {a} are both shard 1 of 3",
        (a, other, c): rf"{other} is a shard of another scan than {a} \(different: weights\)",
        (a, tmp_path / "form", c): r"\(different: form\); give all shards the same --form",
        (a, tmp_path / "unjudged", c): r"\(different: evaluators whose labels are kept\)",
        (half, b, c): f"{b} is shard 2 of 3, but {half} is shard 1 of 2: give the shards of one split",
        (a, tmp_path / "short", c): r"short, shard 2 of 3, is not finished \(1 of 2 points\): run its command again",
        (a, late, c): r"late, shard 2 of 3, is not finished \(xstest has not judged all answers\)",
        (a, whole): f"{whole} holds a whole scan and no shard of one",
        (a, tmp_path / "none"): "has no config.json",
        (a, damaged, c): "damaged cannot be read",
    }.items():
        with pytest.raises(js.UserError, match=message):
            js.merge(list(directories), tmp_path / "out")
        assert not (tmp_path / "out").exists()
    with pytest.raises(js.UserError, match=r"another holds another run than the one of these shards .*weights"):
        js.merge([a, b, c], SCAN.write(tmp_path / "another", weights="another"))
    with pytest.raises(js.UserError, match="unfinished holds the run of these shards, but it is not finished"):
        js.merge([a, b, c], SCAN.write(tmp_path / "unfinished", done=2))
    with pytest.raises(js.UserError, match="is no run's directory and has files in it"):
        js.merge([a, b, c], tmp_path)
    assert not list(tmp_path.glob(".*"))


def test_a_merged_run_is_not_written_again(tmp_path: Path) -> None:
    shards, out = SCAN.shards(tmp_path, 2), tmp_path / "runs" / "merged"
    js.merge(shards, out)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert js.merge(shards, out).to_json() == js.Landscape.load(out).to_json()
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_labels_and_thresholds_that_only_some_shards_have_are_named(tmp_path: Path) -> None:
    unlabelled = Written(SCAN.values, (), SCAN.refused, 2, labels=False)
    a, b = unlabelled.shards(tmp_path, 2)
    js.score(a, "wei", progress=False)
    with pytest.raises(js.UserError, match=f"{b} has no labels of wei, .*: run jaxscape score {b} --evaluator wei"):
        js.merge([a, b], tmp_path / "out")
    js.score(b, "wei", progress=False)
    labels, other = a / "labels-wei.jsonl", '"evaluator": "wei", "checksum": "other"'
    current = labels.read_text()
    labels.write_text(current.replace('"evaluator": "wei"', other))
    with pytest.raises(js.UserError, match=f"{b} has labels from another version of wei than {a}: delete labels-wei"):
        js.merge([a, b], tmp_path / "out")
    labels.write_text(current.replace('"evaluator": "wei"', other, 1))
    with pytest.raises(js.UserError, match=r"labels-wei.jsonl is damaged .*its lines are from two versions"):
        js.merge([a, b], tmp_path / "out")
    labels.write_text(current)
    thresholds = {"coherence": {"weights": "w", "own": 1.0, "surprise": 2.0, "distinct": 0.5}}
    for directory, value in ((a, 2.0), (b, 3.0)):
        thresholds["coherence"]["surprise"] = value
        (directory / "coherence.json").write_text(json.dumps(thresholds))
    with pytest.raises(js.UserError, match=f"{b}/coherence.json has other thresholds than {a}/coherence.json"):
        js.merge([a, b], tmp_path / "out")
    cut = Written(SCAN.values, (), SCAN.refused, 2, labels=False)
    c, d = (cut.write(tmp_path / f"cut-{i}", f"{i}/2", abandon_incoherent=True) for i in (1, 2))
    for directory, place in ((a, c), (b, d)):
        (place / "coherence.json").write_bytes((directory / "coherence.json").read_bytes())
    with pytest.raises(
        js.UserError, match=rf"delete {d}/generations.jsonl and {d}/labels-\*.jsonl, and run .*generates"
    ):
        js.merge([c, d], tmp_path / "cut")
    (b / "coherence.json").write_bytes((a / "coherence.json").read_bytes())
    js.merge([a, b], tmp_path / "out")
    js.score(unlabelled.write(tmp_path / "whole"), "wei", progress=False)
    assert contents(tmp_path / "out").keys() - contents(tmp_path / "whole").keys() == {"coherence.json"}
    assert contents(tmp_path / "out").items() >= contents(tmp_path / "whole").items()


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "1/2/3", "a/b", "1/0", "-1/2", "", " 1/2"])
def test_what_is_no_shard_is_an_error(text: str) -> None:
    with pytest.raises(js.UserError, match="Cannot parse the shard"):
        Shard.of(text, LINE, 1, 64)


def test_there_are_no_more_shards_than_points(tiny: js.Model) -> None:
    with pytest.raises(js.UserError, match="There are 3 points: split them into at most 3 shards, not 4"):
        js.scan(tiny, [0], steps=2, shard="1/4", **QUICK)


def test_what_cannot_be_split_is_refused(tiny: js.Model, tmp_path: Path) -> None:
    for options, message in {
        "adaptive": "so it cannot be split into shards: leave out adaptive or shard",
        "extend": "A shard cannot extend a run: merge the shards first",
    }.items():
        with pytest.raises(js.UserError, match=message):
            js.scan(tiny, [0], steps=2, shard="1/2", out=tmp_path / "run", **QUICK | {options: True})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("directions", "options"),
    [
        ([0, 1], {"steps": 2, "evaluator": ["keywords", "xstest"]}),
        ([(0, 1)], {"steps": 2, "shares": False, "temperature": 1.0}),
        (["low-rank:1:0", "low-rank:1:1"], {"steps": 2, "options": FACTORISED, "shares": False}),
    ],
)
def test_shards_of_a_model_are_the_whole_scan(
    tiny: js.Model, tmp_path: Path, directions: Any, options: dict[str, Any]
) -> None:
    """The low-rank directions of both sets share a batch, which the second shard begins in the middle of."""

    def scan(name: str, shard: str | None = None) -> js.Landscape:
        return js.scan(tiny, directions, out=tmp_path / name, shard=shard, **QUICK | options)

    whole, parts = scan("whole"), [scan(f"{i}", f"{i}/3") for i in (1, 2, 3)]
    evaluated = [~np.isnan(part.asr) for part in parts]
    np.testing.assert_array_equal(np.sum(evaluated, 0), 1)
    for part, points in zip(parts, evaluated, strict=True):
        assert not part.complete
        np.testing.assert_array_equal(part.asr[points], whole.asr[points])
    js.merge([tmp_path / name for name in "231"], tmp_path / "merged")
    assert contents(tmp_path / "merged") == contents(tmp_path / "whole")
    assert scan("merged").to_json() == whole.to_json()  # finds it finished


def test_the_commands_split_and_merge(tiny_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A merged run has the figure too; it is scored, extended, reported and exported like any other. A shard is shown,
    and says what it is where it cannot be used."""

    def run(verb: str, *arguments: object) -> str:
        main([verb, *map(str, arguments)])
        return capfd.readouterr().out

    sizes = ["--num-prompts", 2, "--max-new-tokens", 4, "--form", "materialised"]
    scan = ["--model", tiny_dir, *sizes, "--steps", 2]
    a, b, merged, whole = (tmp_path / name for name in ("a", "b", "merged", "whole"))
    assert "\nshard 1 of 2: 2 of 3 points\n" in run("scan", *scan, "--shard", "1/2", "--out", a, "--dry-run")
    assert not a.exists()
    assert "Shard 1/2 is finished" in run("scan", *scan, "--shard", "1/2", "--out", a)
    run("scan", *scan, "--shard", "2/2", "--out", b)
    expected = run("scan", *scan, "--out", whole)
    assert run("merge", b, a, "--out", merged) == expected.replace(str(whole), str(merged))
    assert contents(merged) == contents(whole)
    states = {path.directory.name: (path.state, path.progress, path.result) for path in find_runs(tmp_path)}
    assert states["a"] == ("finished", "2 of 2 points", "shard 1 of 2")
    for path in (a, merged):
        run("report", path)
        run("plot", path)
        run("score", path, "--evaluator", "xstest")
        (path / "report.html").unlink()
    run("score", whole, "--evaluator", "xstest")
    larger = ["--model", tiny_dir, *sizes, "--steps", 4, "--extend", "--out"]
    for path in (merged, whole):
        run("scan", *larger, path)
    assert contents(merged) == contents(whole)
    run("export", merged, "--to", "csv")
    for arguments, message in {
        ("export", a): "holds a shard of a scan: merge all shards first",
        ("scan", *larger, a): "cannot be extended: it is a shard of a scan, and the merged run can be",
        ("scan", *scan, "--out", a): "(different: shard)",
        ("scan", *scan, "--shard", "1/3", "--out", a): "(different: shard)",
        ("scan", *scan, "--shard", "1/2", "--adaptive", "--out", tmp_path / "c"): "cannot be split into shards",
        ("scan", *scan, "--shard", "2", "--out", tmp_path / "c"): "Cannot parse the shard '2'",
    }.items():
        with pytest.raises(SystemExit):
            run(*map(str, arguments))
        assert message in capfd.readouterr().err


@pytest.mark.parametrize("moment", [1, 3, 4])
def test_sigterm_ends_a_command_after_the_point_in_hand(
    tiny_dir: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    moment: int,
) -> None:
    """While it decodes, while an evaluator with a model judges, and again and again."""
    sizes = ["--num-prompts", "2", "--max-new-tokens", "4", "--form", "materialised"]
    command = ["scan", "--model", str(tiny_dir), *sizes, "--steps", "2", "--out"]
    written = []

    def append(file: Any, records: Any) -> None:
        append_json_lines(file, records)
        written.append(1)
        if len(written) == moment:
            os.kill(os.getpid(), signal.SIGTERM)

    for module in (store, labels):
        monkeypatch.setattr(module, "append_json_lines", append)
    with pytest.raises(SystemExit) as stop:
        main([*command, str(tmp_path / "run")])
    assert stop.value.code == 75
    assert capfd.readouterr().err.endswith(
        "jaxscape: ended by SIGTERM, with what is finished on disk; the same command, without --overwrite, resumes the "
        "run.\n"
    )
    assert len(written) == moment
    assert (tmp_path / "run" / "generations.jsonl").read_bytes().count(b"\n") == 2 * min(moment, 3)
    main([*command, str(tmp_path / "run")])
    main([*command, str(tmp_path / "whole")])
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")
