"""A loss curve as inline SVG and numbers as an HTML table, for notebooks; no plotting library, no JavaScript."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

WIDTH, HEIGHT, MARGIN = 520, 180, 40  # pixels
MOST_POINTS = 400


def loss_curve(records: Sequence[dict[str, Any]], floor: float | None = None) -> str:
    """The losses of some steps as an SVG picture; `floor`: a dashed line to compare with, in nats."""
    points = [(int(record["step"]), float(record["loss"])) for record in records if record.get("loss") is not None]
    if len(points) < 2:
        return ""
    points = points[:: math.ceil(len(points) / MOST_POINTS)]
    losses = [loss for _, loss in points] + ([floor] if floor is not None else [])
    low, high = min(losses), max(losses)
    first, last = points[0][0], points[-1][0]

    def across(step: float) -> float:
        return MARGIN + (WIDTH - 2 * MARGIN) * (step - first) / max(1, last - first)

    def down(loss: float) -> float:
        return HEIGHT - 24 - (HEIGHT - 40) * (loss - low) / ((high - low) or 1.0)

    line = " ".join(f"{across(step):.1f},{down(loss):.1f}" for step, loss in points)
    parts = [
        f'<svg width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" xmlns="http://www.w3.org/2000/svg" '
        'font-family="sans-serif" font-size="11" role="img" aria-label="loss by step">',
        f'<polyline points="{line}" fill="none" stroke="#2a6fb0" stroke-width="1.5"/>',
        f'<text x="2" y="{down(high) + 4:.0f}" fill="#777">{high:.3g}</text>',
        f'<text x="2" y="{down(low) + 4:.0f}" fill="#777">{low:.3g}</text>',
        f'<text x="{MARGIN}" y="{HEIGHT - 6}" fill="#777">step {first}</text>',
        f'<text x="{WIDTH - MARGIN}" y="{HEIGHT - 6}" text-anchor="end" fill="#777">{last}</text>',
    ]
    if floor is not None:
        y = down(floor)
        parts.append(f'<path d="M{MARGIN} {y:.1f}H{WIDTH - MARGIN}" stroke="#b06a2a" stroke-dasharray="4 3"/>')
        parts.append(
            f'<text x="{WIDTH - MARGIN}" y="{y - 4:.0f}" text-anchor="end" fill="#b06a2a">unigram entropy</text>'
        )
    return "".join(parts) + "</svg>"


def page(title: str, rows: Sequence[tuple[str, Any]], picture: str = "") -> str:
    """A heading, a table of names and values, and a picture, as HTML."""
    cells = "".join(
        f'<tr><td style="text-align:left">{html.escape(name)}</td>'
        f'<td style="text-align:left">{html.escape(str(value))}</td></tr>'
        for name, value in rows
        if value is not None
    )
    return f"<div><b>{html.escape(title)}</b><table>{cells}</table>{picture}</div>"
