"""Runs that faults happen to, and the undisturbed runs that they are compared with."""

from __future__ import annotations

from typing import Any

import pytest
import ray
from fault_runs import SMALL, Told, configured, told

from raytron.actors.controller import Seams
from raytron.actors.run import Run, launch, tokenize
from raytron.config import load
from raytron.testing.faults import Faults

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
    """Launches runs with faults, `begin("kill rank 1 in the forward of step 3", steps=9)`, and ends them with the test."""
    runs: list[Run] = []

    def launched(*faults: str, **changes: Any) -> Run:
        number = len(runs)
        name = f"{tmp_path.name.replace('_', '-')}-{number}"
        config = configured(corpus_dataset, tmp_path / f"run-{number}", name, **changes)
        runs.append(launch(config, seams=Seams(open_trainer=Faults(faults, tmp_path / f"faults-{number}"))))
        return runs[-1]

    yield launched
    for run in runs:
        run.close()


@pytest.fixture(scope="session")
def undisturbed(corpus_dataset, tmp_path_factory):
    """The story of a run without faults, by what differs from the small one: `undisturbed(steps=9)`."""
    known: dict[str, Told] = {}

    def run_once(**changes: Any) -> Told:
        key = repr(sorted(changes.items()))
        if key not in known:
            folder = tmp_path_factory.mktemp("undisturbed")
            run = launch(configured(corpus_dataset, folder / "run", folder.name, **changes))
            known[key] = told(run, run.wait(timeout_s=120))
        return known[key]

    return run_once


@pytest.fixture(scope="session", autouse=True)
def nothing_left(local_ray):
    """After the last test of this folder no actor of a run is left."""
    yield
    left = [actor["name"] for actor in ray.util.list_named_actors(True) if actor["namespace"] == "raytron"]
    assert not left
