"""A batch that grows: which sizes when, and a schedule for each."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytron.config import RunConfig
from raytron.errors import ConfigError
from raytron.plan.plan import make_plan

RAMP = {"global_batch_size": 16, "batch_ramp.start": 4, "batch_ramp.increment": 4, "batch_ramp.samples": 96}


def test_each_size_lasts_equally_many_sequences():
    config = RunConfig().replace(**RAMP)
    assert config.batch_sizes == (4, 8, 12, 16)
    consumed, sizes = 0, []
    while consumed < 200:
        sizes.append(config.batch_size_at(consumed))
        consumed += sizes[-1]
    assert sizes[:15] == [4] * 8 + [8] * 4 + [12] * 3
    assert set(sizes[15:]) == {16}


@settings(deadline=None)
@given(st.integers(1, 20), st.integers(1, 6), st.integers(0, 6), st.integers(1, 500), st.integers(0, 600))
def test_sizes_rise_to_the_full_one(start, increment, rises, samples, consumed):
    full = start + increment * rises
    changes = {"global_batch_size": full, "batch_ramp.start": start, "batch_ramp.increment": increment}
    config = RunConfig().replace(**changes, **{"batch_ramp.samples": samples})
    assert config.batch_size_at(consumed) in config.batch_sizes
    assert config.batch_size_at(consumed) <= config.batch_size_at(consumed + 1) <= full
    assert config.batch_size_at(samples) == full


def test_without_a_ramp_the_batch_is_full():
    assert RunConfig().batch_sizes == (16,)
    assert RunConfig().batch_size_at(0) == 16


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "interleaved"])
def test_every_size_has_a_schedule_of_one_placement(schedule):
    changes = {"mesh.pp": 2, "pipeline.schedule": schedule, **RAMP}
    plan = make_plan(RunConfig().replace(**changes), None)
    for size in plan.config.batch_sizes:
        smaller = plan.schedule_for(size)
        assert (smaller.microbatches, smaller.rank_of) == (size, plan.schedule.rank_of)
    assert plan.schedule_for(4) is plan.schedule_for(4)
    assert "from 4 over the first 96 sequences" in str(plan)


def test_a_size_that_the_schedule_does_not_take_is_refused():
    """DualPipeV needs 2 · pp micro-batches."""
    changes = {
        **RAMP,
        "mesh.pp": 2,
        "pipeline.schedule": "dualpipe-v",
        "batch_ramp.start": 2,
        "batch_ramp.increment": 2,
    }
    with pytest.raises(ConfigError) as caught:
        make_plan(RunConfig().replace(**changes), None)
    (problem,) = caught.value.problems
    assert problem.where == "batch_ramp.start"
    assert "there are 2" in problem.what
