"""Every example runs to its end, as a user would run it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SMALL = ["run", "data.max_mb=1", "data.tokenizer.train_mb=1"]  # a run directory and overrides, for those that train
LONG = ("04", "05")  # what they show is tested elsewhere, too
EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


def test_there_are_eight():
    assert [path.name[:2] for path in EXAMPLES] == ["01", "02", "03", "04", "05", "06", "07", "08"]


@pytest.mark.parametrize(
    "example",
    [pytest.param(path, marks=[pytest.mark.slow] if path.name.startswith(LONG) else []) for path in EXAMPLES],
    ids=lambda path: path.stem,
)
def test_runs(example, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, str(example), *(SMALL if example.name >= "03" else [])],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.strip()
