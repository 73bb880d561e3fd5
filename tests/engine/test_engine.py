"""The engine against the plain way to decode: whole texts through the decoder, token by token, one prompt at a time."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import spelled
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxscape as js
from jaxscape.directions.point import at_point, materialise
from jaxscape.directions.random import random_direction
from jaxscape.engine.batching import Workload, common_prefix, tokenize
from jaxscape.engine.decode import compact, decode_chunk, insert
from jaxscape.engine.engine import Engine
from jaxscape.engine.layout import pack
from jaxscape.engine.options import EngineOptions
from jaxscape.engine.planner import make_plan
from jaxscape.engine.sampling import Sampling
from jaxscape.engine.scheduler import Abandon, Completion, Scheduler
from jaxscape.models.cache import Context
from jaxscape.models.checkpoint import fingerprint
from jaxscape.models.decoder import forward

NEW = 12
GREEDY = Sampling(NEW)
POOL = [
    *("Hi", "Why?", "Write a poem about geese", "Tell me more", "Who wrote the first poem about a goose, and when?"),
    *("Explain what a key is and how a lock works, please", "a " * 20, "Is it so", "No", "List three birds"),
]
COORDS = (-0.5, -0.2, 0.0, 0.1, 0.4)
FORMS = ("materialised", "factorised", "streamed")
Plain = Callable[[str, float], list[int]]


@pytest.fixture(scope="module")
def model(tiny: js.Model) -> js.Model:
    """With two more tokens that end a text, which random models like to say: rows end at very different lengths."""
    return spelled(js.Model(**{**vars(tiny), "eos_token_ids": (2, 14, 77)}))


@pytest.fixture(scope="module")
def direction(tiny: js.Model) -> Any:
    return js.random_direction(tiny, 0)


@pytest.fixture(scope="module")
def plain(model: js.Model, direction: Any) -> Plain:
    """The greedy tokens of a prompt at a point, computed without a cache, a batch or a prefix."""
    moved = lru_cache(lambda c: materialise(model.params, [direction], jnp.array([c])))

    @cache
    def tokens(prompt: str, c: float) -> list[int]:
        (row,) = tokenize(model, [prompt], "default", NEW)
        point = js.Model(**{**vars(model), "params": moved(c)})
        length = len(row)
        while len(row) < length + NEW:
            padded = np.zeros((1, 160), np.int32)
            padded[0, : len(row)] = row
            token = int(point(padded)[0, len(row) - 1].argmax())
            if token in model.eos_token_ids:
                break
            row.append(token)
        return row[length:]

    return tokens


def run(
    model: js.Model,
    direction: Any,
    prompts: Sequence[str],
    coords: Sequence[float],
    *,
    ahead: int = 0,
    stop_when: Callable[[str], bool] | None = None,
    abandon: Abandon | None = None,
    sampling: Sampling = GREEDY,
    **options: Any,
) -> list[list[Completion]]:
    rows = tokenize(model, prompts, "default", sampling.max_new_tokens)
    workload = Workload(rows, sampling, num_points=len(coords), points_per_line=len(coords), ndim=1)
    plan = replace(make_plan(model, workload, EngineOptions(**options)), chunks_in_flight=ahead)
    engine = Engine(model, workload, plan, stop_when, abandon)
    return list(engine.complete([direction], [(c,) for c in coords]))


RUN_OPTIONS = st.fixed_dictionaries(
    {
        "form": st.sampled_from(FORMS),
        "slots": st.integers(1, 14),
        "chunk": st.integers(1, 5),
        "ahead": st.integers(0, 2),
    }
)


@settings(max_examples=10)
@given(
    prompts=st.lists(st.sampled_from(POOL), min_size=1, max_size=9),
    coords=st.lists(st.sampled_from(COORDS), min_size=1, max_size=4),
    options=RUN_OPTIONS,
    keyword=st.sampled_from([None, 0, 1, 2]),
)
def test_the_engine_generates_what_the_plain_path_generates(
    model: js.Model,
    direction: Any,
    plain: Plain,
    prompts: list[str],
    coords: list[float],
    options: dict[str, Any],
    keyword: int | None,
) -> None:
    """Whatever the form, the slots, the order and the chunks. The keyword is two tokens that stand side by side in one
    of the texts, so that chunks cut it in two; a row ends at its second token, and nowhere else."""
    expected = [[plain(prompt, c) for prompt in prompts] for c in coords]
    stop_when, word = None, ""
    if keyword is not None:
        text = max((row for point in expected for row in point), key=len)[keyword : keyword + 2]
        word = " ".join(map(str, text)) if len(text) == 2 else "none"
        stop_when = lambda text: f" {word} " in f" {text} "  # noqa: E731
    found = run(model, direction, prompts, coords, stop_when=stop_when, **options)
    assert len(found) == len(coords)
    for point, rows in zip(found, expected, strict=True):
        for completion, row in zip(point, rows, strict=True):
            cut = next(
                (n for n in range(1, len(row) + 1) if stop_when and stop_when(" ".join(map(str, row[:n])))), None
            )
            assert completion.text == " ".join(map(str, row[:cut]))
            assert completion.cut == (cut is not None and cut < NEW)
            assert completion.finite
            assert completion.length == (cut or min(len(row) + 1, NEW))


@settings(max_examples=10)
@given(
    prompts=st.lists(st.sampled_from(POOL), min_size=1, max_size=9),
    coords=st.lists(st.sampled_from(COORDS), min_size=1, max_size=4),
    options=RUN_OPTIONS,
    sizes=st.sets(st.integers(1, NEW), min_size=1, max_size=3).map(sorted),
    stops=st.booleans(),
)
def test_answers_are_abandoned_by_their_first_tokens_alone(
    model: js.Model,
    direction: Any,
    plain: Plain,
    prompts: list[str],
    coords: list[float],
    options: dict[str, Any],
    sizes: list[int],
    stops: bool,
) -> None:
    """Each answer that is long enough and undecided is asked about once at each size, with the number of its prompt."""
    asked: list[tuple[int, int, str]] = []

    def is_lost(size: int, numbers: Sequence[int], texts: Sequence[str]) -> list[bool]:
        asked.extend((size, number, text) for number, text in zip(numbers, texts, strict=True))
        return [(sum(map(int, text.split())) + number) % 2 == 0 for number, text in zip(numbers, texts, strict=True)]

    def decided(row: Sequence[int]) -> bool:
        return stops and any(token % 5 == 0 for token in row)

    found = run(
        model,
        direction,
        prompts,
        coords,
        stop_when=lambda text: decided(list(map(int, text.split()))),
        abandon=Abandon(sizes, is_lost),
        **options,
    )
    expected_asked = []
    for c, point in zip(coords, found, strict=True):
        for number, (prompt, completion) in enumerate(zip(prompts, point, strict=True)):
            row = plain(prompt, c)
            end = next((n for n in range(1, len(row) + 1) if decided(row[:n])), None)
            lost = None  # the number of tokens at which the answer is abandoned
            for size in sizes:
                if lost is None and len(row) >= size < NEW and not decided(row[:size]):
                    expected_asked.append((size, number, " ".join(map(str, row[:size]))))
                    lost = size if (sum(row[:size]) + number) % 2 == 0 else None
            if lost is not None:
                assert completion == Completion(" ".join(map(str, row[:lost])), lost, cut=True, abandoned=True)
            else:
                assert completion.text == " ".join(map(str, row[:end]))
                assert not completion.abandoned
    assert sorted(asked) == sorted(expected_asked)


@pytest.mark.parametrize("form", FORMS)
def test_draws_do_not_depend_on_form_slots_or_chunks(model: js.Model, direction: Any, form: str) -> None:
    sampling = Sampling(NEW, temperature=1.0, seed=5)
    expected = run(model, direction, POOL[:5], COORDS[:3], sampling=sampling, form="materialised", slots=5)
    assert run(model, direction, POOL[:5], COORDS[:3], sampling=sampling, form=form, slots=3, chunk=2) == expected
    other = run(model, direction, POOL[:5], COORDS[:3], sampling=replace(sampling, seed=6), form=form, slots=5)
    assert other != expected


def test_two_dimensions_in_every_form(model: js.Model, direction: Any) -> None:
    second = js.random_direction(model, 1, orthogonal_to=direction)
    points = [(x, y) for x in (-0.3, 0.2) for y in (0.0, 0.25)]
    rows, sampling = tokenize(model, POOL[:3], "default", NEW), Sampling(NEW)
    results = []
    for form in FORMS:
        workload = Workload(rows, sampling, len(points), 2, 2)
        plan = make_plan(model, workload, EngineOptions(form=form, slots=6))
        results.append(list(Engine(model, workload, plan).complete([direction, second], points)))
    assert results[0] == results[1] == results[2]
    assert len({completion.text for point in results[0] for completion in point}) > 4


@pytest.mark.parametrize("storage", ["seed", "bfloat16", "int8"])
def test_directions_in_every_storage_are_the_same_in_every_form(model: js.Model, storage: str) -> None:
    direction = random_direction(model, 0, storage=storage)
    expected = run(model, direction, POOL[:4], COORDS, form="materialised")
    for form in FORMS[1:]:
        assert run(model, direction, POOL[:4], COORDS, form=form) == expected


def test_nothing_is_compiled_from_point_to_point_and_one_decode_program_for_each_batch(model: js.Model) -> None:
    """Also while the slots are refilled, and when the last rows move to smaller batches."""
    programs = insert, decode_chunk, compact
    for form, slots in (("materialised", 16), ("factorised", 16), ("materialised", 40)):
        rows, sampling = tokenize(model, POOL * (slots // len(POOL)), "default", NEW), Sampling(NEW)
        workload = Workload(rows, sampling, 5, 5, 1)
        plan = make_plan(model, workload, EngineOptions(form=form, slots=slots))
        assert plan.layout.compact_slots
        # Rows end at all lengths, so that the last ones are sure to move.
        engine = Engine(model, workload, plan, stop_when=lambda text: sum(map(int, text.split())) % 4 == 0)
        before = decode_chunk._cache_size()
        for seed in range(5):  # until each batch has been needed
            list(engine.complete([js.random_direction(model, seed)], [(c,) for c in COORDS]))
        assert decode_chunk._cache_size() <= before + 1 + len(plan.layout.compact_slots)
        compiled = [program._cache_size() for program in programs]
        list(engine.complete([js.random_direction(model, 5)], [(c,) for c in COORDS[:3]]))
        assert [program._cache_size() for program in programs] == compiled


def test_a_point_does_not_depend_on_the_points_before_it(
    model: js.Model, direction: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, in the materialised form: its rows begin at the same place of their rings, which orders sums."""
    counted = Counted(monkeypatch, "decode_chunk")
    run(model, direction, POOL[:4], COORDS, form="materialised", chunk=NEW)
    assert counted.clocks.count(0) == len(COORDS)


class Counted:
    """Counts the calls of a jitted program, and the rows and clocks that they are given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        import jaxscape.engine.engine as engine

        self.program, self.rows = getattr(engine, name), []
        self.clocks: list[int] = []
        monkeypatch.setattr(engine, name, self)

    def __call__(self, weights: Any, slots: Any, *arguments: Any, **options: Any) -> Any:
        self.rows.append(slots.cache.positions.shape[0])
        self.clocks.append(int(slots.clock))
        return self.program(weights, slots, *arguments, **options)


@pytest.mark.cpu
def test_rows_that_are_decided_cost_no_more_steps(
    model: js.Model, direction: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decode programs that run, for eight rows of which one alone goes on after the first tokens."""
    counted = Counted(monkeypatch, "decode_chunk")
    endless = js.Model(**{**vars(model), "eos_token_ids": (299,)})
    full = run(endless, direction, POOL[:8], [0.4], form="materialised", chunk=1)[0]
    assert counted.rows == [8] * (NEW - 1)
    longest = full[3].text
    assert len(longest.split()) > 5
    counted.rows.clear()
    first = [completion.text.split()[0] for completion in full]
    run(
        endless,
        direction,
        POOL[:8],
        [0.4],
        form="materialised",
        chunk=1,
        stop_when=lambda text: not longest.startswith(text),
    )
    differing = sum(token != first[3] for token in first)
    assert differing >= 6, "the case is made for texts that begin differently"
    steps = len(longest.split()) - 1 + (len(longest.split()) < NEW)  # the first token is the prefill's
    assert counted.rows == [8] + [2] * (steps - 1), "one full step, and then two slots"


def test_the_prefix_is_computed_once_a_point_and_shared(model: js.Model) -> None:
    rows = tokenize(model, POOL, "default", NEW)
    prefix = common_prefix(rows)
    assert prefix > 10, "the chat template and its system prompt"
    assert all(row[:prefix] == rows[0][:prefix] and len(row) > prefix for row in rows)
    workload = Workload(rows, GREEDY)
    _, groups = pack(workload, 4)
    for g, r in np.ndindex(groups.prompt_ids.shape):
        if length := groups.own_lengths[g, r]:
            prompt = rows[groups.prompt_ids[g, r]]
            index = groups.first_token[g, r] + np.arange(length)
            assert groups.tokens[g].ravel()[index].tolist() == prompt[prefix:]
            assert groups.positions[g].ravel()[index].tolist() == list(range(prefix, prefix + length))
            assert groups.prompt_lengths[g, r] == len(prompt)
    assert sorted(groups.prompt_ids[groups.own_lengths > 0]) == list(range(len(rows)))
    tokens = sum(len(row) - prefix for row in rows)
    _, one = pack(workload, len(rows))
    assert (one.positions >= 0).sum() == tokens
    assert one.tokens.size < 1.3 * tokens, "hardly any padding"
    assert workload.ring_slots >= max(map(len, rows)) - prefix + NEW


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=40), min_size=1, max_size=12),
    st.integers(1, 12),
    st.integers(0, 3),
)
def test_packed_rows_are_all_there(rows: list[list[int]], size: int, unused: int) -> None:
    workload = Workload(rows, GREEDY)
    prefix, groups = pack(workload, size, size + unused)
    assert prefix.tolist() == rows[0][: common_prefix(rows)]
    assert groups.own_lengths.shape == (-(-len(rows) // size), size + unused)
    found: Iterator[list[int]] = (
        groups.tokens[g].ravel()[groups.first_token[g, r] :][: groups.own_lengths[g, r]].tolist()
        for g, r in np.ndindex(groups.prompt_ids.shape)
        if groups.own_lengths[g, r]
    )
    assert list(found) == [row[len(prefix) :] for row in rows]


def test_points_and_directions_may_be_vmapped(tiny: js.Model) -> None:
    """Nested: over two directions, and over three coordinates along each, the weights unbatched."""
    directions = [js.random_direction(tiny, seed) for seed in (0, 1)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *directions)
    coords = jnp.array([-0.2, 0.0, 0.3])
    tokens = jnp.asarray(np.random.default_rng(0).integers(3, 300, (2, 9)))
    positions = jnp.broadcast_to(jnp.arange(9), (2, 9))

    def logits(direction: Any, c: Any) -> Any:
        return forward(tiny.config, at_point(tiny.params, [direction], c[None]), tokens, positions, Context())[0]

    program = jax.jit(jax.vmap(jax.vmap(logits, (None, 0)), (0, None)))
    found = program(stacked, coords)
    for i, direction in enumerate(directions):
        for j, c in enumerate(coords):
            point = materialise(tiny.params, [direction], c[None])
            expected = forward(tiny.config, point, tokens, positions, Context())[0]
            assert np.abs(found[i, j] - expected).max() < 1e-4 * np.abs(expected).max()
    # No copy of the weights for each point: no value in the program is a weight with an axis of points.
    points = jnp.linspace(-0.5, 0.5, 41)
    shapes = {leaf.shape for leaf in jax.tree.leaves(tiny.params)}

    def copies(function: Any) -> bool:
        text = jax.jit(jax.vmap(function)).lower(points).as_text()
        return any("tensor<" + "x".join(map(str, (41, *shape))) + "xf32>" in text for shape in shapes if len(shape) > 1)

    def summed(c: Any) -> Any:
        return forward(tiny.config, materialise(tiny.params, [directions[0]], c[None]), tokens, positions, Context())[0]

    assert not copies(lambda c: logits(directions[0], c))
    assert copies(summed), "the test sees them where they are"


@pytest.mark.parametrize(("prompts", "line", "slots"), [(2, 20, 40), (10, 5, 64), (9, 7, 33)])
def test_many_places_that_are_refilled_together(
    model: js.Model, direction: Any, prompts: int, line: int, slots: int
) -> None:
    """Several groups in one program, of several points and of one point, the last fill not full."""
    coords = list(np.linspace(-0.5, 0.5, line))
    rows = tokenize(model, POOL[:prompts], "default", NEW)
    workload = Workload(rows, GREEDY, line, line, 1)
    plan = make_plan(model, workload, EngineOptions(form="factorised", slots=slots))
    assert plan.layout.groups_per_insert > 1
    expected = run(model, direction, POOL[:prompts], coords, form="materialised")
    for ahead in (0, 1):
        found = run(model, direction, POOL[:prompts], coords, form="factorised", slots=slots, chunk=3, ahead=ahead)
        assert found == expected


@pytest.mark.parametrize(("prompts", "line", "slots"), [(2, 20, 40), (10, 5, 64), (10, 5, 16), (9, 7, 33)])
def test_each_points_prefix_is_computed_once(model: js.Model, prompts: int, line: int, slots: int) -> None:
    rows = tokenize(model, POOL[:prompts], "default", NEW)
    workload = Workload(rows, GREEDY, line, line, 1)
    plan = make_plan(model, workload, EngineOptions(form="factorised", slots=slots))
    _, groups = pack(workload, plan.layout.prompts_per_group)
    points, inserted, computed = [(float(i),) for i in range(line)], 0, []
    scheduler = Scheduler(plan.layout, groups, points)
    while inserted < line * prompts:
        for insertion in scheduler.insertions():
            source = insertion.prefix_source
            fresh = sorted(set((-1 - source[source < 0]).tolist()))
            assert fresh == list(range(len(fresh)))
            computed += insertion.new_coords[fresh, 0].tolist()
            for source, (point,) in zip(insertion.prefix_source, insertion.coords, strict=True):
                assert source >= 0 or insertion.new_coords[-1 - source, 0] == point
        jobs = set(scheduler.jobs[scheduler.is_alive].tolist())
        inserted += len(jobs)
        scheduler.free(jobs)
    assert computed == [float(i) for i in range(line)]


@pytest.mark.parametrize(("form", "slots"), [("materialised", 3), ("factorised", 24)])
def test_blocks_of_prompts_give_the_answers_of_all(model: js.Model, direction: Any, form: Any, slots: Any) -> None:
    rows, points = tokenize(model, POOL[:9], "default", NEW), [(c,) for c in COORDS]
    workload = Workload(rows, GREEDY, len(points), len(points), 1, block=4)
    engine = Engine(model, workload, make_plan(model, workload, EngineOptions(form=form, slots=slots)))
    expected = run(model, direction, POOL[:9], COORDS, form="materialised")
    starts = range(0, 9, engine.block)
    assert 4 <= engine.block < 9
    for block, start in reversed(list(enumerate(starts))):
        found = list(engine.complete([direction], points, block))
        assert found == [answers[start : start + engine.block] for answers in expected]


def test_rows_at_points_of_their_own(tiny: js.Model) -> None:
    direction = js.random_direction(tiny, 0)
    tokens = jnp.asarray(np.random.default_rng(1).integers(3, 300, (3, 9)))
    positions = jnp.broadcast_to(jnp.arange(9), (3, 9))
    coords = jnp.array([[-0.2], [0.0], [0.3]])
    found = forward(tiny.config, at_point(tiny.params, [direction], coords), tokens, positions)[0]
    for row, c in enumerate(coords):
        point = materialise(tiny.params, [direction], c)
        expected = forward(tiny.config, point, tokens, positions)[0][row]
        assert np.abs(found[row] - expected).max() < 1e-4 * np.abs(expected).max()


def test_weights_in_host_memory_are_streamed_and_give_the_same(model: js.Model, tiny_dir: Path, direction: Any) -> None:
    loaded = js.load_model(tiny_dir, "float32", on_host=True)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(loaded.params))
    assert fingerprint(loaded.params) == fingerprint(model.params)
    host = js.Model(**{**vars(model), "params": loaded.params})
    found = run(host, direction, POOL[:3], COORDS)
    assert found == run(model, direction, POOL[:3], COORDS, form="materialised")
    with pytest.raises(js.UserError, match="The weights are in host memory, but --form factorised needs them on the"):
        run(host, direction, POOL[:3], COORDS, form="factorised")
    assert js.generate(host, POOL[:2], max_new_tokens=5) == js.generate(model, POOL[:2], max_new_tokens=5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slots": 0}, "option slots must be at least 1"),
        ({"chunk": -1}, "option chunk must be at least 1"),
        ({"direction_storage": "seed"}, "The direction storage 'seed' is for random directions only"),
    ],
)
def test_options_that_cannot_be_are_user_errors(model: js.Model, direction: Any, options: Any, message: str) -> None:
    with pytest.raises(js.UserError, match=message):
        run(model, direction, POOL[:1], [0.0], **options)
