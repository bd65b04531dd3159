"""A checkpoint as text: what `raytron inspect CHECKPOINT` prints."""

from __future__ import annotations

import json
import re
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from raytron.checkpoint import catalog
from raytron.checkpoint.catalog import Generation
from raytron.checkpoint.record import Records, TensorRecord
from raytron.checkpoint.storage import url_of
from raytron.errors import CheckpointError


def describe(path: Path | str, verify: bool = False) -> str:
    """Step, facts, tensors grouped by name, and files of a generation.

    path: a generation, a folder of checkpoints or a run directory (its newest committed generation).
    verify: read every file of all generations meant and check its digest, not only its size.

    Raises CheckpointError where there is none, or one does not verify; it names every damaged file.
    """
    if verify:
        _verify(path)
    generation = catalog.find(path)
    records = catalog.verify(generation, digests=False)
    return "\n".join([*_head(generation, records, verify), "", *_facts(generation.facts), "", *_tensors(records)])


def _verify(path: Path | str) -> None:
    found = catalog.damages(path)
    bad = {folder: text for folder, text in found.items() if text}
    if not bad:
        return
    good = next((folder.name for folder in found if folder not in bad), "none")
    head = f"{len(bad)} of {_count(len(found), 'checkpoint')} damaged; the newest good one: {good}"
    raise CheckpointError("\n  ".join([head, *(line for text in bad.values() for line in text.splitlines())]))


def _head(generation: Generation, records: Records, verified: bool) -> list[str]:
    written = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(generation.time))
    checked = "digests verified" if verified else "sizes verified, digests not read"
    on_disk = sum(file.size for file in records.files.values())
    elements = sum(tensor.elements for tensor in records.tensors.values())
    loss = generation.validation_loss
    return [
        f"checkpoint  {url_of(generation.path)}",
        f"step        {generation.step}, committed {written} by {_count(generation.ranks, 'rank')}",
        f"tensors     {_count(len(records.tensors), 'tensor')}, {elements:,} elements, {size_text(records.bytes)}",
        f"files       {_count(len(records.files), 'file')}, {size_text(on_disk)}, {checked}",
        *([] if loss is None else [f"validation  {loss:.4f} nats"]),
    ]


def _facts(facts: dict[str, Any]) -> list[str]:
    if not facts:
        return ["facts       none"]
    width = max(map(len, facts))
    return ["facts", *(f"  {name:<{width}}  {_short(value)}" for name, value in sorted(facts.items()))]


def _short(value: Any, limit: int = 90) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _tensors(records: Records) -> list[str]:
    """One line for each group of tensors that differ by the numbers in their names alone."""
    groups: dict[tuple[str, str, tuple[int, ...]], list[TensorRecord]] = defaultdict(list)
    for name, tensor in records.tensors.items():
        groups[re.sub(r"(?<![^.])\d+(?![^.])", "*", name), tensor.dtype, tensor.shape].append(tensor)
    rows = [("tensor", "count", "shape", "dtype", "bytes")]
    for (name, dtype, shape), members in sorted(groups.items()):
        total = size_text(sum(member.bytes for member in members))
        rows.append((name, str(len(members)), " × ".join(map(str, shape)) or "scalar", dtype, total))
    name_width, count_width, shape_width, dtype_width, bytes_width = (
        max(map(len, column)) for column in zip(*rows, strict=True)
    )
    return [
        f"  {name:<{name_width}}  {count:>{count_width}}  {shape:<{shape_width}}  {dtype:<{dtype_width}}"
        f"  {total:>{bytes_width}}"
        for name, count, shape, dtype, total in rows
    ]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def size_text(count: int) -> str:
    """Bytes for people: 1,536 → 1.5 KiB."""
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"
