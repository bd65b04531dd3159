"""When a run may go on with other data: where no sample that it has read becomes another one."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytron.config import RunConfig, load
from raytron.data.blend import UNIT, Stage
from raytron.data.recipe import Recipe, stages_of, start_of

DIGESTS = ["a" * 64, "b" * 64, "c" * 64]


def blended(weights: list[float], *stages: dict[str, object], **more: object) -> RunConfig:
    blend = [{"dataset": name, "weight": weight} for name, weight in zip("abc", weights, strict=False)]
    return load({"data": {"blend": blend, "stages": list(stages), **more}, "global_batch_size": 8})


def recipe(*arguments: object, **more: object) -> Recipe:
    config = blended(*arguments, **more)  # type: ignore[arg-type]
    return Recipe.of(config, DIGESTS[: len(config.data.blend)])


def test_stages_begin_where_steps_or_samples_say() -> None:
    config = blended([0.5, 0.5], {"start_step": 10, "weights": [0.25, 0.75]}, {"start_sample": 99, "weights": [1.0, 0]})
    assert [stage.start for stage in stages_of(config)] == [0, 80, 99]
    assert stages_of(config)[1].weights == (UNIT // 4, 3 * UNIT // 4)
    ramped = config.replace(**{"batch_ramp.start": 2, "batch_ramp.increment": 2, "batch_ramp.samples": 30})
    assert start_of(ramped, 0) == ramped.samples_after(10)


@settings(max_examples=60, deadline=None)
@given(
    start=st.integers(1, 9), rise=st.integers(1, 6), each=st.integers(1, 5), samples=st.integers(0, 300),
    steps=st.integers(0, 120),
)  # fmt: skip
def test_samples_after_steps_are_those_of_the_ramp(start: int, rise: int, each: int, samples: int, steps: int) -> None:
    ramp = {"batch_ramp.start": start, "batch_ramp.increment": each, "batch_ramp.samples": samples}
    config = RunConfig().replace(global_batch_size=start + rise * each, **ramp)
    consumed = 0
    for _ in range(steps):
        consumed += config.batch_size_at(consumed)
    assert config.samples_after(steps) == consumed


def test_the_same_data_goes_on() -> None:
    assert recipe([0.5, 0.5]).difference(recipe([0.5, 0.5]), 10**6) is None
    assert recipe([0.5, 0.5]).difference(recipe([0.5, 0.5005]), 0) is None  # nothing was read


@pytest.mark.parametrize("samples", [1, 80])
def test_a_later_stage_a_later_source_and_a_stage_not_reached_yet_may_change(samples: int) -> None:
    before = recipe([0.5, 0.5])
    later = {"start_sample": 80, "weights": [0.2, 0.3, 0.5]}
    assert before.difference(recipe([0.5, 0.5, 0], later), samples) is None
    other = {"start_sample": 80, "weights": [0.3, 0.2, 0.5]}
    assert recipe([0.5, 0.5, 0], later).difference(recipe([0.5, 0.5, 0], other), samples) is None


@pytest.mark.parametrize(
    ("now", "why"),
    [
        (recipe([0.6, 0.4]), "0.5, 0.5 from sample 0 on was a stage, and now it is 0.6, 0.4 from sample 0 on"),
        (recipe([0.5, 0.3, 0.2]), "there were 2 sources and are 3"),
        (recipe([0.5, 0.5], blend_block=512), "data.blend_block was 1024 and is 512"),
        (recipe([0.5, 0.5], {"start_sample": 80, "weights": [0.2, 0.8]}), "there were 1 stages up to sample 81 and are 2"),
        (Recipe.of(blended([0.5, 0.5]), DIGESTS[1:]), "source 0 was aaaaaaaaaaaa… and is bbbbbbbbbbbb…"),
        (Recipe.of(RunConfig(), ["a" * 64]), "there were 2 sources and are 1"),
    ],
)  # fmt: skip
def test_what_changes_a_sample_that_was_read_is_named(now: Recipe, why: str) -> None:
    found = recipe([0.5, 0.5]).difference(now, 81)
    assert found is not None
    assert why in found


def test_a_run_of_one_data_set_goes_on_as_a_blend() -> None:
    before = Recipe.recorded({"data": "a" * 64})
    assert before == Recipe.of(RunConfig(), ["a" * 64])
    assert before is not None
    later = {"start_sample": 500, "weights": [0.5, 0.5]}
    assert before.difference(recipe([1, 0], later), 500) is None
    assert before.difference(recipe([1, 0], later), 501) is not None
    alone = before.order([50], 3).locate(np.arange(500))
    blended = recipe([1, 0], later).order([50, 20], 3).locate(np.arange(500))
    assert all(np.array_equal(one, other) for one, other in zip(alone, blended, strict=True))


def test_what_a_checkpoint_records_is_read_back() -> None:
    made = recipe([0.5, 0.2, 0.3], {"start_sample": 5, "weights": [0.25, 0.25, 0.5]})
    facts = json.loads(json.dumps({"data": made.hash, "data_recipe": made.facts()}))
    assert Recipe.recorded(facts) == made
    assert Recipe.recorded({}) is None
    assert Recipe.recorded({"data": ""}) is None


def test_the_digest_covers_sources_weights_stages_and_block() -> None:
    stage = {"start_sample": 5, "weights": [0.25, 0.75]}
    made = [
        recipe([0.5, 0.5]),
        recipe([0.4, 0.6]),
        recipe([0.5, 0.5], stage),
        recipe([0.5, 0.5], {**stage, "start_sample": 6}),
        recipe([0.5, 0.5], blend_block=64),
        Recipe.of(blended([0.5, 0.5]), DIGESTS[1:]),
        Recipe.of(RunConfig(), DIGESTS[:1]),
    ]
    assert len({each.hash for each in made}) == len(made)
    assert made[-1].hash == DIGESTS[0]


@settings(max_examples=60, deadline=None)
@given(samples=st.integers(0, 400), data=st.data())
def test_recipes_that_do_not_differ_name_the_same_samples(samples: int, data: st.DataObject) -> None:
    """And those that do differ, differ: recipes of random stages, compared with the samples themselves."""

    def drawn() -> Recipe:
        shares = st.sampled_from([(UNIT, 0), (UNIT // 2, UNIT // 2), (UNIT // 4, 3 * UNIT // 4)])
        starts = sorted(data.draw(st.sets(st.sampled_from([100, 200]), max_size=2)))
        return Recipe(tuple(DIGESTS[:2]), tuple(Stage(at, data.draw(shares)) for at in (0, *starts)), 32)

    one, other = drawn(), drawn()
    places = [each.order([30, 40], 1).locate(np.arange(samples)) for each in (one, other)]
    same = all(np.array_equal(*parts) for parts in zip(*places, strict=True))
    if one.difference(other, samples) is None:
        assert same
