"""The process that launched a detached run dies: the run does not notice. Nor do its workers, when its controller dies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.recovery
HERE = Path(__file__).parent


def test_a_detached_run_goes_on_without_the_process_that_launched_it(corpus_dataset, undisturbed, tmp_path):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    command = [sys.executable, str(HERE / "outlived.py"), str(corpus_dataset), str(tmp_path)]
    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    answer = json.loads((tmp_path / "answer.json").read_text())
    expected = undisturbed(**{"mesh.dp": 2, "steps": 16})
    assert answer["losses"] == expected.result.losses
    assert answer["weights"] == {name: values.tobytes().hex() for name, values in expected.weights.items()}
    assert answer["samples"] == {str(number): 1 for number in range(4 * 16)}
    begun = [event for event in answer["events"] if event["event"] == "workers"]
    assert [event["source"] for event in begun] == [None, "memory"]
    assert begun[0]["pids"] == begun[1]["pids"]
    assert [event["why"] for event in answer["events"] if event["event"] == "lost"] == [
        "the controller died and was started again"
    ]
    assert "redo" not in {event["event"] for event in answer["events"]}
