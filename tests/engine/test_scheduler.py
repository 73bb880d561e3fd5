"""The scheduler against a batch of labels instead of arrays: which job each row holds, and which prefix each point."""

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import Int

from jaxscape.engine.batching import Workload
from jaxscape.engine.decode import Insertion
from jaxscape.engine.layout import BatchLayout, Groups, pack
from jaxscape.engine.sampling import Sampling
from jaxscape.engine.scheduler import Scheduler


def layout_of(
    shards: int, points: int, blocks: int, rows_per_group: int, prompts_per_group: int, groups: int, num_prompts: int
) -> BatchLayout:
    """A layout whose shards have `points` points each, of `blocks` blocks of rows, and insert `groups` groups each."""
    rows_per_point = blocks * rows_per_group
    size = 1 if points == 1 else rows_per_point
    return BatchLayout(
        points_in_flight=shards * points,
        rows_per_point=rows_per_point,
        rows_per_group=rows_per_group,
        prompts_per_group=prompts_per_group,
        groups_per_insert=shards * groups,
        compact_slots=tuple(shards * size * (points * rows_per_point // size * count // 4) for count in (3, 2, 1)),
        num_groups=-(-num_prompts // prompts_per_group),
        prefix_slots=0,
        ring_slots=1,
        num_factored=1,
        shards=shards,
    )


class Batch:
    """What `insert` and `compact` do to a batch: the job of each row, and the point whose prefix each point has.

    Each shard reads its own part of an insertion, and of the batch, and nothing else.
    """

    def __init__(self, layout: BatchLayout, groups: Groups, num_prompts: int) -> None:
        self.layout, self.groups, self.num_prompts = layout, groups, num_prompts
        self.jobs = np.full((layout.shards, layout.batch // layout.shards), -1)
        self.prefixes = np.full((layout.shards, layout.points_in_flight // layout.shards), -1)

    def insert(self, insertion: Insertion) -> None:
        for shard in range(self.layout.shards):
            groups, coords, new, prefix_source, row_source, point_source = (
                np.split(np.asarray(x), self.layout.shards)[shard] for x in insertion
            )
            cached = [*self.prefixes[shard], *new[::-1, 0]]  # so that -1 - k is new point k
            points = coords[:, 0].astype(int)
            assert [cached[source] for source in prefix_source] == points.tolist()
            ids = self.groups.prompt_ids[groups]
            jobs = np.where(self.groups.own_lengths[groups] > 0, points[:, None] * self.num_prompts + ids, -1)
            assert (self.jobs[shard][row_source >= 0] < 0).all(), "only free rows are taken"
            self.jobs[shard] = np.where(row_source >= 0, jobs.reshape(-1)[row_source], self.jobs[shard])
            self.prefixes[shard] = np.where(point_source >= 0, points[point_source], self.prefixes[shard])

    def compact(self, rows: Int[np.ndarray, " fewer"], points: Int[np.ndarray, " fewer_points"]) -> None:
        shards = self.layout.shards
        self.jobs = np.take_along_axis(self.jobs, rows.reshape(shards, -1), axis=1)
        self.prefixes = np.take_along_axis(self.prefixes, points.reshape(shards, -1), axis=1)

    def check(self, scheduler: Scheduler) -> None:
        """The rows hold the jobs that the scheduler says, next to the prefix of their point."""
        jobs = scheduler.jobs.reshape(self.jobs.shape)
        self.jobs = np.where(jobs < 0, -1, self.jobs)  # the scheduler has freed these rows, or no longer counts them
        np.testing.assert_array_equal(jobs, self.jobs)
        own_prefix = np.repeat(self.prefixes, jobs.shape[1] // self.prefixes.shape[1], axis=1)
        np.testing.assert_array_equal(own_prefix[jobs >= 0], jobs[jobs >= 0] // self.num_prompts)


@settings(max_examples=200)
@given(
    shards=st.sampled_from([1, 2, 4, 8]),
    points=st.integers(1, 6),
    blocks=st.integers(1, 3),
    rows_per_group=st.integers(1, 3),
    groups=st.integers(1, 4),
    num_prompts=st.integers(1, 20),
    num_points=st.integers(1, 12),
    is_uneven=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_every_job_is_answered_once_in_the_shard_that_prefills_it(
    shards: int,
    points: int,
    blocks: int,
    rows_per_group: int,
    groups: int,
    num_prompts: int,
    num_points: int,
    is_uneven: bool,
    seed: int,
) -> None:
    """Whatever the layout, and whichever answers end first: any, or those of the first shards."""
    random = np.random.default_rng(seed)
    if points == 1:
        num_points = 1  # all rows of all shards are at one point
    else:
        blocks = 1  # a point's rows are one block
    groups = min(groups, points * blocks)
    prompts_per_group = int(random.integers(1, rows_per_group + 1))
    layout = layout_of(shards, points, blocks, rows_per_group, prompts_per_group, groups, num_prompts)
    workload = Workload([[i] for i in range(num_prompts)], Sampling(1))
    _, packed = pack(workload, prompts_per_group, rows_per_group)
    scheduler = Scheduler(layout, packed, [(float(i),) for i in range(num_points)])
    batch, answered = Batch(layout, packed, num_prompts), Counter[int]()
    remaining = num_points * layout.num_groups  # groups that wait
    while sum(answered.values()) < num_points * num_prompts:
        for insertion in scheduler.insertions():
            batch.insert(insertion)
            sources = insertion.row_source[insertion.row_source >= 0]
            remaining -= len(sources) // rows_per_group
            batch.check(scheduler)
        if remaining:
            is_free = (scheduler.jobs.reshape(-1, rows_per_group) < 0).all(-1)
            assert is_free.sum() < min(layout.groups_per_insert, remaining), "no rows stay free without need"
        if (smaller := scheduler.compacted()) is not None:
            assert remaining == 0
            before = batch.jobs.size
            batch.compact(*smaller)
            assert batch.jobs.size in layout.compact_slots
            assert batch.jobs.size < before
            batch.check(scheduler)
        alive = np.unique(scheduler.jobs[scheduler.is_alive]).tolist()
        assert len(alive) == scheduler.is_alive.sum() > 0, "no job has two rows, and the batch is not empty"
        order = scheduler.jobs[scheduler.is_alive].tolist() if is_uneven else random.permutation(alive).tolist()
        finished = set(order[: int(random.integers(1, len(alive) + 1))])
        answered.update(finished)
        scheduler.free(finished)
        batch.check(scheduler)
    assert set(answered.values()) == {1}


def test_a_shard_with_free_rows_does_not_wait_for_another() -> None:
    """One shard of four never finishes; the other three answer everything else."""
    layout = layout_of(4, 4, 1, 2, 2, 2, num_prompts=2)
    _, packed = pack(Workload([[0], [1]], Sampling(1)), 2)
    scheduler = Scheduler(layout, packed, [(float(i),) for i in range(60)])
    batch, answered = Batch(layout, packed, 2), set[int]()
    for _ in range(20):
        for insertion in scheduler.insertions():
            batch.insert(insertion)
            batch.check(scheduler)
        finished = set(scheduler.jobs[8:][scheduler.is_alive[8:]].tolist())
        answered |= finished
        scheduler.free(finished)
        batch.check(scheduler)
    assert len(answered) == 2 * 60 - 8
