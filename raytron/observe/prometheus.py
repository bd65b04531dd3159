"""Figures in Prometheus' text format: https://prometheus.io/docs/instrumenting/exposition_formats/

{"loss": 4.2, "grad_norm/layers.3": 0.5}   raytron_loss{run="quickstart"} 4.2
                                           raytron_grad_norm{run="quickstart",of="layers.3"} 0.5
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "raytron_"
ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


def exposition(figures: Mapping[str, Any], run: str) -> str:
    """Every number among some figures as a gauge; what is no number is passed over. A key's part after a slash is the label
    `of`."""
    families: dict[str, dict[str, float]] = {}
    for key, value in figures.items():
        if isinstance(value, int | float):
            family, _, part = key.partition("/")
            families.setdefault(PREFIX + re.sub(r"[^a-zA-Z0-9_]", "_", family), {})[part] = float(value)
    lines = []
    for family, values in families.items():
        lines.append(f"# TYPE {family} gauge")
        for part, value in values.items():
            labels = {"run": run, **({"of": part} if part else {})}
            text = ",".join(f'{name}="{label.translate(ESCAPES)}"' for name, label in labels.items())
            lines.append(f"{family}{{{text}}} {_number(value)}")
    return "".join(f"{line}\n" for line in lines)


def _number(value: float) -> str:
    return {"inf": "+Inf", "-inf": "-Inf", "nan": "NaN"}.get(repr(value), repr(value))
