"""Every example runs to its end, as a user would run it: on a machine alone, or on a cluster, which is the tests'."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray

SMALL = ["run", "data.max_mb=0.5", "data.tokenizer.train_mb=0.5", "data.tokenizer.vocab=512", "model.vocab=512"]
SMALL += ["model.hidden=48", "model.ffn=128"]
TWO = ["mesh.tp=1", "steps=12"]  # workers instead of four, where they have to import torch
ALONE = ("01", "02", "03", "06")
LONG = ("04", "05")  # what they show is tested elsewhere, too
EXAMPLES = {path.stem: path for path in sorted((Path(__file__).parents[1] / "examples").glob("*.py"))}


def named(alone: bool) -> list[object]:
    """The examples that need no cluster, or those that are given one."""
    names = [name for name in EXAMPLES if name.startswith(ALONE) == alone]
    return [pytest.param(name, marks=[pytest.mark.slow] * name.startswith(LONG), id=name) for name in names]


def test_there_are_eight():
    assert [name[:2] for name in EXAMPLES] == ["01", "02", "03", "04", "05", "06", "07", "08"]


@pytest.mark.parametrize("name", named(alone=True))
def test_runs_on_a_machine_alone(name, tmp_path):
    alone = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    run(name, tmp_path, alone, [*SMALL, *TWO] if name.startswith("03") else [])


@pytest.mark.parametrize("name", named(alone=False))
def test_runs_on_a_cluster(name, local_ray, tmp_path):
    run(name, tmp_path, {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}, SMALL)


def run(name: str, folder: Path, environment: dict[str, str], arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES[name]), *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.strip()
