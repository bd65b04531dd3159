"""Kills workers in the middle of a run, and watches it go on: python examples/07_kill_a_worker.py runs/killed

Every step's state is kept in this machine's memory, so nothing is lost but the step that was under way; a spare worker that
waits takes the dead one's place. The run ends with the loss that it would have had anyway, to the bit.
"""

import os
import signal
import sys
import time
from pathlib import Path

import raytron
from raytron.observe.timeline import draw

SMALL = ["data.max_mb=2", "data.tokenizer.train_mb=1", "global_batch_size=8", "sequence_length=64"]
KILLS = {5: "1", 9: "0"}  # after so many steps: the rank that dies


def main() -> None:
    run_dir, *overrides = sys.argv[1:] or ["runs/killed"]
    quickstart = Path(__file__).parent / "quickstart.yaml"
    choices = ["name=killed", f"run_dir={run_dir}", "steps=16", "checkpoint.every=null", "recovery.spares=1", *SMALL]
    with raytron.launch(raytron.load(quickstart, [*choices, *overrides])) as run:
        for step, rank in KILLS.items():
            while run.status()["step"] < step:
                time.sleep(0.05)
            workers = [event for event in run.events() if event["event"] == "workers"][-1]
            print(f"step {run.status()['step']}: killing rank {rank}, process {workers['pids'][rank]}", flush=True)
            os.kill(workers["pids"][rank], signal.SIGKILL)
        result = run.wait()
        for event in run.events():
            if event["event"] in ("workers", "lost", "restart", "redo", "checkpoint"):
                print(event["message"])
        print(draw(run.events()))
    print(result)


if __name__ == "__main__":
    main()
