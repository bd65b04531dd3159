"""Changes the mesh of a run while it trains: python examples/05_change_the_mesh.py runs/remeshed

The workers stay; the state moves from memory to memory, and the order of samples, the batch and the learning rate go on as
if nothing had been. The same from a shell: raytron remesh runs/remeshed mesh.tp=1 mesh.pp=1 mesh.dp=4
"""

import sys
import time
from pathlib import Path

import raytron
from raytron.observe.timeline import draw

SMALL = ["data.max_mb=2", "data.tokenizer.train_mb=1", "sequence_length=64"]


def main() -> None:
    run_dir, *overrides = sys.argv[1:] or ["runs/remeshed"]
    quickstart = Path(__file__).parent / "quickstart.yaml"
    choices = ["name=remeshed", f"run_dir={run_dir}", "steps=16", "checkpoint.every=null", *SMALL, *overrides]
    with raytron.launch(raytron.load(quickstart, choices)) as run:
        while run.status()["step"] < 5:
            time.sleep(0.05)
        page = run.remesh(**{"mesh.tp": 1, "mesh.pp": 1, "mesh.dp": 4})
        print("\n".join(page.splitlines()[:6]), flush=True)
        result = run.wait()
        print(draw(run.events()))
    print(result)


if __name__ == "__main__":
    main()
