"""Seconds from the command to the end of the first step, with its parts: python benchmarks/startup.py

Runs `raytron train` several times on a data set that is prepared once before, each time in a fresh run directory, and reads
the parts off the run's own event log. Beside it, in the same rounds, stand its two unavoidable costs as peers: an empty
`ray.init`, and `import torch` in one process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from context import context, write

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart.yaml"
INIT = "import ray; ray.init(address='local', include_dashboard=False, log_to_driver=False); ray.shutdown()"


def timed(*command: str) -> float:
    start = time.time()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.time() - start


def one_run(dataset: Path, folder: Path) -> dict[str, float]:
    """The parts of one start, in seconds."""
    start = time.time()
    options = [f"run_dir={folder}", f"data.dataset={dataset}", "steps=1", "lr.warmup_steps=0"]
    options += ["evaluate.batches=0", "evaluate.prompt=null"]
    subprocess.run(
        [sys.executable, "-m", "raytron.cli", "train", str(QUICKSTART), *options], check=True, capture_output=True
    )
    total = time.time() - start
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    at = {event["event"]: event["time"] for event in events}
    first = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["step_time_s"]
    return {
        "check, start Ray, open data": at["plan"] - start,
        "place and build 4 workers": at["workers"] - at["plan"],
        "first step": first,
        "command to first step": at["workers"] - start + first,
        "checkpoint, leave, exit": start + total - at["workers"] - first,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    runs, inits, imports = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "prepared"
        options = [f"run_dir={data}", "data.max_mb=2", "data.tokenizer.train_mb=1"]
        timed(sys.executable, "-m", "raytron.cli", "tokenize", str(QUICKSTART), *options)
        for number in range(rounds):
            runs.append(one_run(data / "data", Path(folder) / f"run-{number}"))
            inits.append(timed(sys.executable, "-c", INIT))
            imports.append(timed(sys.executable, "-c", "import torch"))
    parts = {part: round(statistics.median(run[part] for run in runs), 2) for part in runs[0]}
    write(
        "startup",
        {
            "context": context(rounds=rounds),
            "median_s": parts,
            "peers_median_s": {
                "an empty ray.init and shutdown": round(statistics.median(inits), 2),
                "import torch": round(statistics.median(imports), 2),
            },
            "command_to_first_step_over_ray_init": round(
                statistics.median(run["command to first step"] / init for run, init in zip(runs, inits, strict=True)), 2
            ),
        },
    )


if __name__ == "__main__":
    main()
