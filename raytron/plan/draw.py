"""Schedules, meshes and memory as text, and schedules as SVG.

A schedule is drawn with a row for each rank and time to the right, as if every forward, input gradient and weight gradient
of a rank took one unit; a full backward takes two. An action is its letter and micro-batch, `=` while it goes on, `.` where
the rank is idle. Letters are small for the odd ones of a rank's model chunks:

    rank 0 │F0F1....B0==F2B1==..B2==
    rank 1 │..F0B0==F1B1==F2B2==....
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from raytron.plan.mesh import Coords, MeshShape
from raytron.plan.schedule import Action, Op, Schedule
from raytron.plan.simulate import Cost, simulate

COLUMNS = 100  # of a page
UNITS = {Op.F: 1, Op.B: 2, Op.I: 1, Op.W: 1}
COLOURS = {Op.F: "#4e79a7", Op.B: "#e8a33d", Op.I: "#76b7b2", Op.W: "#c6a5cf"}
NAMES = {Op.F: "forward", Op.B: "backward", Op.I: "input gradient", Op.W: "weight gradient"}


def schedule_text(schedule: Schedule, columns: int = COLUMNS, rows: int = 16) -> str:
    """The schedule in at most `columns` columns and `rows` rows of ranks; what is left out is said below."""
    chunk = _chunks(schedule)
    width = 1 + len(str(schedule.microbatches - 1))
    spots = _spots(schedule)
    length = max(at + UNITS[action.op] for row in spots for at, action in row)
    margin = len(f"rank {schedule.num_ranks - 1} ") + 1
    fits = (columns - margin) // width
    lines = []
    for rank in _chosen(schedule.num_ranks, rows):
        if rank is None:
            lines.append(" " * (margin - 2) + "…")
            continue
        cells = ["." * width] * length
        for at, action in spots[rank]:
            cells[at] = _label(action, chunk).ljust(width, "=")
            cells[at + 1 : at + UNITS[action.op]] = ["=" * width] * (UNITS[action.op] - 1)
        lines.append(f"rank {rank}".ljust(margin - 1) + "│" + "".join(cells[:fits]))
    lines.append(" " * margin + _legend(schedule))
    left_out = [f"the first {fits} of {length} units of time"] if length > fits else []
    if schedule.num_ranks > rows:
        left_out.append(f"{rows - 1} of {schedule.num_ranks} ranks")
    if left_out:
        lines.append(" " * margin + "shown: " + ", ".join(left_out))
    return "\n".join(lines)


def _spots(schedule: Schedule) -> list[list[tuple[int, Action]]]:
    """Where each action starts, in units of time, by rank."""
    line = simulate(schedule, Cost())
    return [
        [(round(at), action) for at, action in zip(start, row, strict=True)]
        for start, row in zip(line.start, schedule.rows, strict=True)
    ]


def _chosen(count: int, limit: int) -> list[int | None]:
    """The ranks to draw: all, or the first ones and the last, None for those between."""
    if count <= limit:
        return list(range(count))
    return [*range(limit - 2), None, count - 1]


def _chunks(schedule: Schedule) -> list[int]:
    """Which of its rank's model chunks each stage is."""
    return [schedule.stages_of(rank).index(stage) for stage, rank in enumerate(schedule.rank_of)]


def _label(action: Action, chunk: Sequence[int]) -> str:
    letter = action.op.value if chunk[action.stage] % 2 == 0 else action.op.value.lower()
    return f"{letter}{action.microbatch}"


def _legend(schedule: Schedule) -> str:
    used = {action.op for row in schedule.rows for action in row}
    text = "   ".join(f"{op.value} {NAMES[op]}" for op in Op if op in used) + "   . idle"
    return text + ("   small letters: every other model chunk" if max(_chunks(schedule)) else "")


def schedule_svg(schedule: Schedule, unit: int = 26, height: int = 26) -> str:
    """The schedule as a self-contained SVG drawing; `unit` and `height` are pixels of one forward and of one rank."""
    spots, chunk, margin = _spots(schedule), _chunks(schedule), 64
    length = max(at + UNITS[action.op] for row in spots for at, action in row)
    wide, high = margin + length * unit + 8, (schedule.num_ranks + 1) * (height + 4) + 8
    shapes = []
    for rank, row in enumerate(spots):
        y = rank * (height + 4) + 4
        shapes.append(f'<text x="4" y="{y + height * 0.66:.1f}">rank {rank}</text>')
        for at, action in row:
            box = f'x="{margin + at * unit}" y="{y}" width="{UNITS[action.op] * unit - 1}" height="{height}"'
            shade = 1.0 if chunk[action.stage] % 2 == 0 else 0.6
            middle = margin + (at + UNITS[action.op] / 2) * unit
            shapes.append(
                f'<g><title>{action}</title><rect {box} rx="2" fill="{COLOURS[action.op]}" fill-opacity="{shade}"/>'
                f'<text x="{middle:.1f}" y="{y + height * 0.66:.1f}" text-anchor="middle">{_label(action, chunk)}</text></g>'
            )
    legend = escape(f"{schedule.name}: {_legend(schedule)}")
    shapes.append(f'<text x="4" y="{high - height * 0.4:.1f}">{legend}</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{wide}" height="{high}" font-family="monospace" font-size="11">'
    return "\n".join([head, *shapes, "</svg>"])


def mesh_text(mesh: MeshShape, rows: int = 16) -> str:
    """A line for each pipeline rank and replica with its tensor parallel ranks, at most `rows` lines."""
    pairs = [(pp, dp) for pp in range(mesh.pp) for dp in range(mesh.dp)]
    lines = []
    for index in _chosen(len(pairs), rows):
        if index is None:
            lines.append("…")
            continue
        pp, dp = pairs[index]
        ranks = [mesh.rank(Coords(pp, dp, cp, tp)) for cp in range(mesh.cp) for tp in range(mesh.tp)]
        text = " ".join(map(str, ranks)) if len(ranks) <= 8 else f"{ranks[0]} … {ranks[-1]}"
        lines.append(f"pp {pp}  dp {dp}  ranks {text}")
    return "\n".join([f"{mesh}: {plural(mesh.world, 'rank')}", *(f"  {line}" for line in lines)])


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, all but the first to the right."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = []
    for row in [head, *rows]:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def size(count: float) -> str:
    """Bytes in the largest binary unit of which there is one: `1.50 GiB`."""
    for unit, power in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count >= 1 << power:
            return f"{count / (1 << power):.2f} {unit}"
    return f"{count:.0f} B"


def amount(count: float, unit: str) -> str:
    """A large number of some unit with its prefix: `449.22 GFLOP`."""
    for prefix, power in (("E", 18), ("P", 15), ("T", 12), ("G", 9), ("M", 6), ("k", 3)):
        if count >= 10**power:
            return f"{count / 10**power:.2f} {prefix}{unit}"
    return f"{count:.0f} {unit}"


def counted(count: float) -> str:
    """A large number in words: `8.03 billion`."""
    for word, power in (("trillion", 12), ("billion", 9), ("million", 6)):
        if count >= 10**power:
            return f"{count / 10**power:.2f} {word}"
    return f"{count:,.0f}"


def plural(count: int, noun: str) -> str:
    """`1 node`, `2 nodes`."""
    return f"{count} {noun}" + ("" if count == 1 else "es" if noun.endswith("ch") else "s")
