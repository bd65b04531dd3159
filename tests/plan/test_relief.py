"""What is tried next where memory did not do: the next stronger treatment that is legal and needs less."""

from __future__ import annotations

from typing import Any

import pytest

from raytron.config import RunConfig, load
from raytron.plan.plan import Plan, make_plan
from raytron.plan.relief import explained, needed, relieve, stronger

PARTS = ("attention", "norm", "activation", "dropout")


def config(**changes: Any) -> RunConfig:
    made = load(
        {
            "model": {"layers": 4, "hidden": 256, "heads": 4, "vocab": 512},
            "sequence_length": 256,
            "micro_batch_size": 4,
            "data": {"dataset": "x"},
        }
    )
    return made.replace(**{"global_batch_size": 8, **changes})


def plan(**changes: Any) -> Plan:
    return make_plan(config(**changes), None)


def test_one_step_up_at_a_time_and_then_to_the_host():
    names = [list(each.values()) for each in stronger(config())]
    assert names == [["selective"], ["full", PARTS], ["full", PARTS, True]]
    assert list(stronger(config(**{"memory.recompute": "full"}))) == [{"memory.offload_activations": True}]
    assert not list(stronger(config(**{"memory.recompute": "full", "memory.offload_activations": True})))


@pytest.mark.parametrize(("before", "after"), [("none", "selective"), ("selective", "full")])
def test_the_next_one_needs_less(before, after):
    made = plan(**{"memory.recompute": before})
    relief = relieve(made, 0, host=False)
    assert relief is not None
    assert relief.plan.config.memory.recompute == after
    assert str(relief) == f"memory.recompute={after}"
    assert needed(relief.plan, 0, host=False) < needed(made, 0, host=False)
    assert relief.plan.config == made.config.replace(**relief.changes), "nothing else has changed"


def test_what_would_be_refused_is_passed_over():
    """Parts are for selective recomputation alone: with others than usual, full takes the usual ones."""
    made = plan(**{"memory.recompute": "selective", "memory.recompute_parts": ("norm",)})
    relief = relieve(made, 0, host=False)
    assert relief is not None
    assert relief.plan.config.memory.recompute == "full"
    assert relief.plan.config.memory.recompute_parts == PARTS


def test_a_cpu_is_not_helped_by_its_host_and_a_device_is():
    full = {"memory.recompute": "full"}
    assert relieve(plan(**full), 0, host=True) is None
    made = plan(**full, **{"cluster.device": "cuda"})
    relief = relieve(made, 0, host=False)
    assert relief is not None
    assert str(relief) == "memory.offload_activations=true"


def test_a_full_host_is_not_helped_by_what_a_device_recomputes():
    assert relieve(plan(**{"cluster.device": "cuda"}), 0, host=True) is None
    made = plan(**{"cluster.device": "cuda", "memory.offload_activations": True, "memory.offload_min_mb": 0})
    relief = relieve(made, 0, host=True)
    assert relief is not None
    assert needed(relief.plan, 0, host=True) < needed(made, 0, host=True)


def test_what_was_predicted_is_that_of_the_ranks_own_stage():
    made = plan(**{"mesh.pp": 2, "mesh.dp": 2})
    said = [explained(made, rank) for rank in range(4)]
    assert len({text.partition("rank")[0] for text in said}) == 2, "of two stages"
    for rank, text in enumerate(said):
        assert f"for rank {rank} (weights " in text
