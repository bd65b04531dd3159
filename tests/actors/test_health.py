"""What is told, and what is done, about ranks that are slow or wrong."""

import pytest

from raytron.actors.health import Health
from raytron.config import GuardConfig, from_mapping
from raytron.errors import ClusterError
from raytron.observe.busy import Busy
from raytron.observe.replicas import compare
from raytron.plan.plan import make_plan

PLAN = make_plan(
    from_mapping({"mesh": {"dp": 3}, "global_batch_size": 6, "data": {"dataset": "random"}, "steps": 100}), None
)
HOSTS = {0: "a", 1: "b", 2: "c"}


@pytest.fixture
def told():
    return []


@pytest.fixture
def make(told):
    def health(**config):
        made = Health(GuardConfig(**config), lambda kind, message, **facts: told.append((kind, message)))
        made.begin(PLAN, 0, HOSTS)
        return made

    return health


def check(step, *fingerprints, trails=((1,), (2,), (3,))):
    held = dict(enumerate(fingerprints))
    return {"replicas": compare(step, {"all": held}, dict(enumerate(trails))).record(trails=True)}


def run_slowly(health):
    for step in range(1, 20):
        for rank in range(3):
            health.busy(rank, [Busy(step, 2.0 if rank == 1 else 1.0, 2.0)])


def test_a_slow_rank_is_told_of_with_its_host_and_evicted_only_if_asked(make, told):
    health = make()
    run_slowly(health)
    assert [kind for kind, _ in told] == ["straggler"]
    assert "rank 1 is busy" in told[0][1]
    assert told[0][1].endswith("on b")
    assert health.take() is None
    evicting = make(evict_stragglers=True)
    run_slowly(evicting)
    assert evicting.take().ranks == (1,)
    assert evicting.take() is None


def test_the_majority_names_who_is_wrong_and_the_run_goes_back_to_what_all_agreed_on(make):
    health = make()
    health.record(check(10, 7, 7, 7))
    health.record(check(20, 7, 9, 7))
    sick = health.take()
    assert (sick.ranks, sick.back_to) == ((1,), 10)
    assert not health.retrace


def test_without_a_majority_the_steps_are_run_again_and_tell(make):
    health = make()
    health.record(check(10, 7, 9, 8))
    sick = health.take()
    assert (sick.ranks, sick.back_to) == ((), 0)
    assert health.retrace
    health.begin(PLAN, 0, HOSTS)
    health.record(check(10, 7, 7, 7, trails=((1,), (5,), (3,))))
    sick = health.take()
    assert (sick.ranks, sick.back_to) == ((1,), None)


def test_a_difference_that_comes_back_stops_the_run(make):
    health = make()
    health.record(check(10, 7, 9, 8))
    health.begin(PLAN, 0, HOSTS)
    with pytest.raises(ClusterError, match="twice"):
        health.record(check(10, 7, 9, 8))


def test_records_of_steps_keep_nothing_of_it(make):
    record = {"step": 10, **check(10, 7, 7, 7)}
    make().record(record)
    assert record == {"step": 10}
