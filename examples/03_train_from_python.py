"""Trains from Python, as in a notebook: a configuration in, a result out. Give a run directory, and overrides, if you like.

    python examples/03_train_from_python.py runs/from_python steps=40

In a notebook the last line of a cell, `result`, draws the loss curve; `result.to_pandas()` is the table of all steps.
"""

import sys
from pathlib import Path

import raytron

SMALL = ["data.max_mb=2", "data.tokenizer.train_mb=1", "global_batch_size=8", "sequence_length=64"]


def main() -> None:
    run_dir, *overrides = sys.argv[1:] or ["runs/from_python"]
    quickstart = Path(__file__).parent / "quickstart.yaml"
    config = raytron.load(quickstart, ["name=from_python", f"run_dir={run_dir}", "steps=30", *SMALL, *overrides])
    result = raytron.train(config)
    print(result.metrics)
    print(f"loss {result.final_loss:.3f}; counting tokens alone gives {result.unigram_entropy:.3f}")


if __name__ == "__main__":
    main()
