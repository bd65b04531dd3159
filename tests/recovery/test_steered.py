"""A run that is paused, resumed and given another learning rate while it is at work, whatever else happens to it."""

from __future__ import annotations

import json
import os
import signal
import time
import urllib.request

import numpy as np
import pytest
from fault_runs import assert_same_end, told
from test_lost_controller import SLOW, built, kill_controller, reach

from raytron.actors.cluster import token

pytestmark = pytest.mark.recovery
STILL_S = 2.5
HEARTBEAT_S = 1.0


def heard(run, kind, times=1, timeout_s=60.0):
    """The newest event of a kind, once there are so many."""
    deadline = time.monotonic() + timeout_s
    while len(found := [event for event in run.events() if event["event"] == kind]) < times:
        assert time.monotonic() < deadline, (kind, run.status(), run.events()[-3:])
        time.sleep(0.02)
    return found[-1]


def asked(address, path):
    """What the status endpoint says, and its lines."""
    question = urllib.request.Request(address + path, headers={"Authorization": f"Bearer {token()}"})
    with urllib.request.urlopen(question, timeout=10) as answer:
        return answer.read().decode()


def test_a_paused_run_stands_still_loses_what_it_loses_and_goes_on_to_the_bit(begin, undisturbed):
    """While it is paused: a checkpoint, a worker that dies, a controller that dies, and another learning rate."""
    keys = {"mesh.dp": 2, "steps": 12, "recovery.heartbeat_s": HEARTBEAT_S}
    run = begin(SLOW, **keys, **{"observe.port": 0})
    reach(run, 2)
    run.pause()
    step = heard(run, "paused")["step"]
    told_at = asked(run.status()["endpoint"], "/status")
    assert json.loads(told_at)["phase"] == "paused"
    time.sleep(STILL_S)
    assert run.status()["step"] == step
    assert not [event for event in run.events() if event["event"] == "lost"]

    run.checkpoint()
    while heard(run, "checkpoint")["step"] != step:
        time.sleep(0.05)

    pids = heard(run, "workers")["pids"]
    os.kill(pids["1"], signal.SIGKILL)
    assert heard(run, "paused", 2)["step"] == step
    assert heard(run, "lost")["ranks"] == [1]

    kill_controller(run)
    assert heard(run, "paused", 3)["step"] == step
    address = heard(run, "endpoint", 2)["address"]
    facts = json.loads(asked(address, "/status"))
    assert (facts["phase"], facts["step"], facts["epoch"]) == ("paused", step, 3)
    assert [each["ranks"] for each in facts["lost"]] == [[1], []]
    assert f'raytron_steps{{run="{run.name}"}} 12.0' in asked(address, "/metrics")
    assert json.loads(asked(address, "/events?after=1").splitlines()[0]) == run.events()[1]

    run.set_lr(2e-3, final=1e-3)
    assert heard(run, "lr")["step"] == step
    assert run.status()["phase"] == "paused"
    run.resume()
    story = told(run, run.wait(timeout_s=120))
    change = {"start_step": step, "peak": 2e-3, "final": 1e-3}
    assert_same_end(story, undisturbed(**{"mesh.dp": 2, "steps": 12, "lr.changes": [change]}))
    assert heard(run, "resumed")["step"] == step
    assert not story.all("redo")


def test_a_rate_holds_from_one_step_on_wherever_the_run_goes_back_to(begin, undisturbed, tmp_path):
    """Its controller dies at once; a loss takes the run back before the change; later it goes on in another launch."""
    keys = {"mesh.dp": 2, "recovery.memory_every": None}
    run = begin(SLOW, **keys, steps=12)
    reach(run, 5)
    run.set_lr(2e-3, final=1e-3)
    kill_controller(run)
    event = heard(run, "lr")
    step = event["step"]
    assert step >= heard(run, "asked")["step"] >= 5
    assert event["changes"] == {"peak": [3e-4, 2e-3], "final": [3e-5, 1e-3]}
    reach(run, step + 1)
    os.kill(heard(run, "workers")["pids"]["1"], signal.SIGKILL)
    result = run.wait(timeout_s=120)
    first, _, again = [each["step"] for each in run.events() if each["event"] == "workers"]
    assert first < again < step or again % 4 == 0
    more = begin(steps=14, run_dir=result.run_dir, **keys)
    ended = told(more, more.wait(timeout_s=120))
    change = {"start_step": step, "peak": 2e-3, "final": 1e-3}
    same = undisturbed(**{"mesh.dp": 2, "steps": 14, "lr.changes": [change], "lr.decay_steps": 12})
    assert ended.result.losses == same.result.losses
    assert ended.result.metrics.column("lr") == same.result.metrics.column("lr")
    assert all(np.array_equal(values, same.weights[name]) for name, values in ended.weights.items())


@pytest.mark.slow
def test_a_controller_that_dies_before_auto_has_chosen_measures_again(begin):
    keys = {"mesh.pp": 2, "model.layers": 4, "pipeline.schedule": "auto", "determinism": "mesh", "steps": 200}
    run = begin(SLOW, **keys)
    built(run, 1)
    kill_controller(run)
    heard(run, "lost")
    said = heard(run, "schedule")
    kinds = [event["event"] for event in run.events()]
    assert kinds.index("lost") < kinds.index("schedule")
    first, again = [event for event in run.events() if event["event"] == "workers"][:2]
    assert f"measured in steps {again['step'] + 2} to {again['step'] + 4}" in said["message"]
    assert first["pids"] == again["pids"]
    run.stop()
    assert run.wait(timeout_s=120).status == "stopped"
