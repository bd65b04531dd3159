"""Many random faults in one run, and whether it ended as an undisturbed one: python benchmarks/soak.py --faults 50"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from context import context, write

from raytron.testing.soak import soak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    before = round(os.getloadavg()[0], 2)
    with tempfile.TemporaryDirectory() as folder:
        told = soak(arguments.faults, arguments.seed, Path(folder), say=lambda text: print(text, flush=True))
    write("soak", {"context": context(load_average_before=before), "outcome": told})
    sys.exit(bool(told["differs"] or told["missed"]))


if __name__ == "__main__":
    main()
