"""Kills a worker in the middle of a run. The run goes on from its newest checkpoint, and ends where it would have ended.

python examples/05_kill_a_worker.py runs/killed
"""

import os
import signal
import sys
import time
from pathlib import Path

import raytron

KILL_AT = 7  # a step after the first checkpoint

SMALL = ["data.max_mb=2", "data.tokenizer.train_mb=1", "global_batch_size=8", "sequence_length=64"]


def main() -> None:
    run_dir, *overrides = sys.argv[1:] or ["runs/killed"]
    quickstart = Path(__file__).parent / "quickstart.yaml"
    choices = ["name=killed", f"run_dir={run_dir}", "steps=12", "checkpoint.every=5", *SMALL, *overrides]
    with raytron.launch(raytron.load(quickstart, choices)) as run:
        while run.status()["step"] < KILL_AT:
            time.sleep(0.1)
        workers = next(event for event in run.events() if event["event"] == "workers")
        victim = workers["pids"]["1"]
        print(f"killing rank 1, process {victim}", flush=True)
        os.kill(victim, signal.SIGKILL)
        result = run.wait()
        for event in run.events():
            if event["event"] in ("workers", "lost", "restart", "redo", "checkpoint"):
                print(event["message"])
    print(result)


if __name__ == "__main__":
    main()
