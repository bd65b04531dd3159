"""Launches a run, watches it while it trains, asks for a checkpoint, and stops it before its end.

    python examples/04_watch_a_run.py runs/watched

From another process on the same machine, `raytron status runs/watched` and `raytron stop runs/watched` do the same.
"""

import sys
import time
from pathlib import Path

import raytron

SMALL = ["data.max_mb=2", "data.tokenizer.train_mb=1", "global_batch_size=8", "sequence_length=64"]


def main() -> None:
    run_dir, *overrides = sys.argv[1:] or ["runs/watched"]
    quickstart = Path(__file__).parent / "quickstart.yaml"
    config = raytron.load(quickstart, ["name=watched", f"run_dir={run_dir}", "steps=1000", *SMALL, *overrides])
    with raytron.launch(config) as run:
        while (status := run.status())["step"] < 5:
            print(f"{status['phase']}: step {status['step']}, loss {status['loss']}", flush=True)
            time.sleep(2)
        run.checkpoint()
        print(
            "first and last losses so far:",
            [round(record["loss"], 3) for record in run.metrics()][:: status["step"] - 1],
        )
        run.stop()
        result = run.wait()
    print(result)


if __name__ == "__main__":
    main()
