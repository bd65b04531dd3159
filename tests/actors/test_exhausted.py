"""Which failures are said to be of memory, and what a run that stops for one says."""

from __future__ import annotations

import errno

import numpy as np
import pytest
import torch
from ray.exceptions import ActorDiedError

from raytron.actors.exhausted import Exhaustion, where_exhausted
from raytron.config import RecoveryConfig, load
from raytron.errors import OutOfMemoryError
from raytron.plan.plan import make_plan

FULL = OutOfMemoryError(1, "stage 0, step 3, forward and backward", "torch.OutOfMemoryError: no room", "traceback")


def raised(call) -> BaseException:
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def caused(error: BaseException) -> RuntimeError:
    found = RuntimeError("a backward has failed")
    found.__cause__ = error
    return found


@pytest.mark.parametrize(
    ("error", "where"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "device"),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"), "device"),
        (caused(torch.OutOfMemoryError("")), "device"),
        (raised(lambda: torch.empty(1 << 52)), "host"),
        (raised(lambda: np.empty(1 << 55)), "host"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "host"),
        (MemoryError(), "host"),
        (OSError(errno.ENOSPC, "No space left on device"), None),
        (RuntimeError("shapes can't be multiplied"), None),
        (ActorDiedError(), None),
    ],
)
def test_memory_is_told_from_other_causes(error, where):
    assert where_exhausted(error) == where


def plan(recompute: str = "none"):
    config = load({"mesh": {"dp": 2}, "data": {"dataset": "x"}, "global_batch_size": 8})
    return make_plan(config.replace(**{"memory.recompute": recompute}), None)


def test_a_run_that_is_to_stop_says_what_was_planned_and_what_can_be_done():
    exhaustion = Exhaustion(RecoveryConfig())
    assert exhaustion.relief(FULL, plan()) is None
    told = str(exhaustion.explained(FULL, plan()))
    assert told.startswith("rank 1 (stage 0, step 3, forward and backward): torch.OutOfMemoryError: no room\n")
    assert "the plan had predicted" in told
    assert "set memory.recompute=selective, or recovery.on_out_of_memory=recompute" in told
    assert told.endswith("\ntraceback")


def test_it_is_tried_once():
    exhaustion = Exhaustion(RecoveryConfig(on_out_of_memory="recompute"))
    relief = exhaustion.relief(FULL, plan())
    assert relief is not None
    assert relief.changes == {"memory.recompute": "selective"}
    assert exhaustion.relief(FULL, relief.plan) is None
    assert "memory.recompute=selective was not enough" in str(exhaustion.explained(FULL, relief.plan))


def test_where_nothing_stronger_is_left_it_is_not_tried():
    exhaustion = Exhaustion(RecoveryConfig(on_out_of_memory="recompute"))
    assert exhaustion.relief(FULL, plan("full")) is None
    assert "no stronger memory.recompute needs less" in str(exhaustion.explained(FULL, plan("full")))
