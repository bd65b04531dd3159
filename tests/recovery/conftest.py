"""Runs that faults happen to, and the undisturbed runs that they are compared with."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import ray
from fault_runs import SMALL, Told, configured, ledger_of, told
from ray.util.placement_group import placement_group_table

from raytron.actors.controller import Seams
from raytron.actors.run import Run, launch, tokenize
from raytron.config import load
from raytron.testing.faults import Faults
from raytron.testing.ledger import Ledger
from raytron.training.open import open_trainer

TEXT = "the quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs\n"


@pytest.fixture(scope="session")
def corpus_dataset(local_ray, tmp_path_factory):
    """A small data set."""
    folder = tmp_path_factory.mktemp("recovery-corpus")
    for number in range(24):
        (folder / f"{number}.txt").write_text(f"document {number}\n" + TEXT * (number % 5 + 3), encoding="utf-8")
    data = {"sources": [str(folder)], "validation_fraction": 0.2, "tokenizer": {"vocab": 300}}
    made = load({**SMALL, "run_dir": str(tmp_path_factory.mktemp("recovery-data")), "data": data})
    return tokenize(made, lambda fraction, message: None)


@pytest.fixture
def begin(corpus_dataset, tmp_path):
    """Launches runs with faults, `begin("kill rank 1 in the forward of step 3", steps=9)`, and ends them with the test.
    Then nothing may be left of them: no actor, no memory."""
    runs: list[Run] = []

    def launched(*faults: str, **changes: Any) -> Run:
        number, name = len(runs), tmp_path.name.replace("_", "-")
        run_dir = Path(changes.pop("run_dir", tmp_path / f"run-{number}"))
        config = configured(corpus_dataset, run_dir, f"{name}-{run_dir.name}", **changes)
        faulty = Faults(faults, tmp_path / f"faults-{number}")
        runs.append(launch(config, seams=Seams(open_trainer=Ledger(faulty, ledger_of(run_dir)))))
        return runs[-1]

    yield launched
    for run in runs:
        run.close()
        nothing_left_of(run.name)


@pytest.fixture(scope="session")
def undisturbed(corpus_dataset, tmp_path_factory):
    """The story of a run without faults, by what differs from the small one: `undisturbed(steps=9)`."""
    known: dict[str, Told] = {}

    def run_once(**changes: Any) -> Told:
        key = repr(sorted(changes.items()))
        if key not in known:
            folder = tmp_path_factory.mktemp("undisturbed")
            config = configured(corpus_dataset, folder / "run", folder.name, **changes)
            run = launch(config, seams=Seams(open_trainer=Ledger(open_trainer, ledger_of(folder / "run"))))
            known[key] = told(run, run.wait(timeout_s=120))
        return known[key]

    return run_once


def nothing_left_of(name: str, timeout_s: float = 15.0) -> None:
    """Actors, placement groups and folders in memory go within seconds."""
    deadline = time.monotonic() + timeout_s
    while True:
        actors = [actor["name"] for actor in ray.util.list_named_actors(True) if name in actor["name"]]
        groups = [group["name"] for group in placement_group_table().values() if group["state"] != "REMOVED"]
        actors += [group for group in groups if name in group]
        folders = list(Path("/dev/shm").glob(f"raytron-{name}-*"))
        if not actors and not folders:
            return
        assert time.monotonic() < deadline, (actors, folders)
        time.sleep(0.1)
