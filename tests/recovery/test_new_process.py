"""All processes of a run are killed at once, its Ray too: a new process goes on from the run directory."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from fault_runs import assert_same_end, configured, ledger_of, told

from raytron.config import to_mapping
from raytron.observe.records import read_records

pytestmark = pytest.mark.recovery
TWO = {"mesh.dp": 2, "steps": 12}
WAIT_S = 240
SCRIPT = """
import sys
from raytron.actors.controller import Seams
from raytron.actors.run import launch
from raytron.testing.faults import Faults
from raytron.testing.ledger import Ledger

config, account, ledger = sys.argv[1:]
slow = Faults(["slow rank 0 in every forward"], account)
launch(config, seams=Seams(open_trainer=Ledger(slow, ledger))).wait()
"""


def test_a_new_process_goes_on_where_everything_was_killed(begin, undisturbed, corpus_dataset, tmp_path):
    run_dir = tmp_path / "run"
    config = configured(corpus_dataset, run_dir, f"{tmp_path.name.replace('_', '-')}-run", **TWO)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_mapping(config)), encoding="utf-8")
    clean = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, tmp_path / "config.yaml", tmp_path / "account", ledger_of(run_dir)],
        env=clean,
        start_new_session=True,
    )
    reach(process, run_dir, 6)
    kill_session(process)
    process.wait()
    assert list(Path("/dev/shm").glob(f"raytron-{config.name}-*")), "the dead left their memory"
    run = begin(**TWO, run_dir=str(run_dir))
    story = told(run, run.wait(timeout_s=WAIT_S))
    assert_same_end(story, undisturbed(**TWO))
    first, second = story.all("workers")
    assert first["source"] is None
    assert second["source"] == "disk"
    assert second["step"] >= 4


def reach(process, run_dir, step):
    deadline = time.monotonic() + WAIT_S
    while len(read_records(run_dir / "metrics.jsonl")) < step:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)


def kill_session(process):
    """SIGKILL to all processes that were started in the session of one, Ray's among them."""
    while found := [int(entry.name) for entry in Path("/proc").iterdir() if in_session(entry, process.pid)]:
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.poll()
        time.sleep(0.05)


def in_session(entry, session):
    with contextlib.suppress(OSError, IndexError):
        if entry.name.isdigit():
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            return fields[3] == str(session) and fields[0] != "Z"
    return False
