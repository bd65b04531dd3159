"""Every mesh, every micro-batch and every point of return read the same samples, each exactly once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from making import make_dataset

from raytron.config import RunConfig, divisors, load
from raytron.data.batch import Batch, TokenStream, part_of
from raytron.data.blend import BlendOrder, Stage, whole_weights
from raytron.data.run_data import open_run_data

LENGTH = 4
GLOBAL = 24
REMESHES = 10_000


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> TokenStream:
    """Three sources of 70, 30 and 12 samples, two stages."""
    folder = tmp_path_factory.mktemp("blend")
    for number, size in enumerate((70, 30, 12), start=1):
        document = [100 * number + at % 90 for at in range(size * LENGTH + 1)]
        make_dataset(folder / str(number), [[document[:50], document[50:]] if size > 20 else [document]])
    config: RunConfig = load(
        {
            "data": {
                "blend": [{"dataset": str(folder / str(n)), "weight": w} for n, w in ((1, 0.5), (2, 0.375), (3, 0.125))],
                "blend_block": 32,
                "stages": [{"start_sample": 101, "weights": [0.25, 0.25, 0.5]}],
                "document_mask": True,
            },
            "sequence_length": LENGTH, "seed": 4,
        }
    )  # fmt: skip
    return open_run_data(config, "unused").train()


def shares(stream: TokenStream, first: int, micro_batch: int, dp: int) -> list[Batch]:
    """What each data-parallel rank reads of a step, as the trainer asks for it; ranks that differ in other axes read as
    their data-parallel peers."""
    bounds = [part_of(first, GLOBAL, rank, dp, micro_batch) for rank in range(dp)]
    return [stream.batch(start, stop - start) for start, stop in bounds]


@settings(max_examples=150, deadline=None)
@given(first=st.integers(0, 400), micro_batch=st.sampled_from(divisors(GLOBAL)), dp=st.integers(1, GLOBAL))
def test_the_global_batch_is_the_same_on_every_mesh(stream: TokenStream, first: int, micro_batch: int, dp: int) -> None:
    whole = stream.batch(first, GLOBAL)
    pieces = shares(stream, first, micro_batch, dp)
    for name in whole._fields:
        assert np.array_equal(np.concatenate([getattr(piece, name) for piece in pieces]), getattr(whole, name))


@settings(max_examples=60, deadline=None)
@given(points=st.lists(st.integers(0, 500), min_size=1, max_size=6))
def test_a_resume_at_any_point_reads_what_would_have_been_read(stream: TokenStream, points: list[int]) -> None:
    whole = stream.batch(0, 500 + GLOBAL)
    for point in points:
        again = stream.batch(point, GLOBAL)
        assert np.array_equal(again.tokens, whole.tokens[point : point + GLOBAL])


def test_ten_thousand_meshes_read_each_sample_exactly_once() -> None:
    """A mesh for each step: dp that does not divide the batch, other micro-batches, steps that are lost and done again."""
    order = BlendOrder(
        (7001, 1009, 97),
        (Stage(0, whole_weights([0.6, 0.3, 0.1])), Stage(50_001, whole_weights([0.2, 0.3, 0.5]))),
        11,
        64,
    )
    random = np.random.default_rng(0)
    consumed, found, uneven, lost = 0, [], 0, 0
    for _ in range(REMESHES):
        micro_batch = int(random.choice([1, 2, 3, 4, 6]))
        dp = int(random.integers(1, GLOBAL // micro_batch + 1))
        bounds = [part_of(consumed, GLOBAL, rank, dp, micro_batch) for rank in range(dp)]
        rank = int(random.integers(dp))
        step = order.locate(np.arange(bounds[0][0], bounds[-1][1]))
        if random.random() < 0.2:  # what one rank finds is a part of what all find
            some = order.locate(np.arange(*bounds[rank]))
            here = slice(bounds[rank][0] - consumed, bounds[rank][1] - consumed)
            assert all(np.array_equal(part[here], mine) for part, mine in zip(step, some, strict=True))
        assert [edge for bound in bounds for edge in bound][1:-1:2] == [start for start, _ in bounds[1:]]
        uneven += GLOBAL // micro_batch % dp > 0
        if random.random() < 0.1:
            lost += 1
            continue
        consumed += GLOBAL
        found.append(np.stack(step))
    assert min(uneven, lost) > 500
    places = np.concatenate(found, axis=1)
    assert np.array_equal(places, np.stack(order.locate(np.arange(consumed))))
    assert len(np.unique(places, axis=1).T) == consumed
    for source, size in enumerate(order.sizes):
        mine = places[:, places[0] == source]
        assert np.array_equal(np.sort(mine[1] * size + mine[2])[: size * (mine.shape[1] // size)],
                              np.arange(size * (mine.shape[1] // size)))  # fmt: skip
