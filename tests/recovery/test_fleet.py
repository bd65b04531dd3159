"""Nodes that leave: with a notice nothing is lost, without one at most a step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from raytron.testing.apart import possible

pytestmark = pytest.mark.recovery
HERE = Path(__file__).parent


def fleet(dataset, folder, what):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    command = [sys.executable, str(HERE / "fleet.py"), str(dataset), str(folder), what]
    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return json.loads((folder / "answer.json").read_text())


@pytest.mark.parametrize(("what", "restarts"), [("drain", 0), ("kill", 1)])
def test_a_node_that_leaves(corpus_dataset, undisturbed, tmp_path, what, restarts):
    answer = fleet(corpus_dataset, tmp_path, what)
    story = {event["event"]: event for event in answer["events"]}
    assert answer["losses"] == undisturbed(**{"mesh.dp": 2, "steps": 32}).result.losses
    assert answer["restarts"] == restarts
    assert answer["controller"] != answer["victim"]
    assert answer["victim"] not in story["workers"]["nodes"].values()
    assert story["workers"]["source"] == "memory"
    assert ("notice" in story) == (what == "drain")
    if what == "kill":
        assert story["lost"]["cause"] == "the node is gone", "its connections tell before Ray does"
        assert story["node"]["node"] == answer["victim"]
    assert "redo" not in story or story["redo"]["last"] == story["redo"]["first"]


@pytest.mark.slow
@pytest.mark.parametrize(("what", "seen_s"), [("unplug", 6), ("behead", 30)])
def test_a_node_without_power(corpus_dataset, undisturbed, tmp_path, what, seen_s):
    """It breaks no connection, and Ray learns of it late: the survivor neither waits for it nor is held for lost, too; not
    even where the controller dies with it."""
    if not possible():
        pytest.skip("no network namespaces can be made here")
    answer = fleet(corpus_dataset, tmp_path, what)
    before, after = [event for event in answer["events"] if event["event"] == "workers"]
    lost = next(event for event in answer["events"] if event["event"] == "lost")
    assert answer["losses"] == undisturbed(**{"mesh.dp": 2, "steps": 32}).result.losses
    assert answer["victim"] not in after["nodes"].values()
    assert after["source"] == "memory"
    assert answer["controller"] != answer["victim"], "it lives where it was launched"
    (survivor,) = {"0", "1"} - set(map(str, lost["ranks"]))
    assert before["nodes"][str(lost["ranks"][0])] == answer["victim"]
    assert before["pids"][survivor] == after["pids"][survivor]
    assert lost["time"] - answer["told_at"] < seen_s
