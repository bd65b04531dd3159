"""The context that every measured figure stands beside, and how results are written."""

from __future__ import annotations

import json
import os
import platform
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def context(**more: Any) -> dict[str, Any]:
    """The machine, the versions and the load."""
    model = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "?")
    return {
        "when": time.strftime("%Y-%m-%d"),
        "cpu": model,
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **more,
    }


def write(name: str, result: dict[str, Any]) -> None:
    """Prints a result and writes it to benchmarks/results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(result, indent=2)
    (RESULTS / f"{name}.json").write_text(text + "\n")
    print(text)


def cpu_seconds(work: Callable[[], Any], rounds: int = 1) -> float:
    """CPU time of this process, in the best of some rounds."""
    found = []
    for _ in range(rounds):
        begin = time.process_time()
        work()
        found.append(time.process_time() - begin)
    return min(found)


def python_files(most: int) -> Iterator[str]:
    """The interpreter's own library, then its packages, file by file, at most so many bytes."""
    size, paths = 0, sysconfig.get_paths()
    for place in (paths["stdlib"], paths["purelib"]):
        for path in sorted(Path(place).rglob("*.py")):
            if place == paths["stdlib"] and "site-packages" in path.parts:
                continue
            text = path.read_text(encoding="utf-8", errors="ignore")
            size += len(text.encode())
            if size > most:
                return
            yield text


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
