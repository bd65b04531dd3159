"""What goes with what: a table of every pair of choices, made by asking the rules, never by hand.

A choice is a few keys of the configuration. Two choices are laid over one small model together, and the rules say whether
that is legal; the table prints their answer, and the reasons below it. `docs/compatibility.md` is this module's output
(`python -m raytron.plan.compatibility`), and the parity tests train every pair that the table allows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from raytron.config import RunConfig, from_mapping
from raytron.errors import Problem
from raytron.rules import problems

BASE: Mapping[str, Any] = {
    "global_batch_size": 16, "micro_batch_size": 1, "sequence_length": 16, "steps": 20,
    "model": {"layers": 4, "hidden": 32, "heads": 4, "kv_heads": 4, "ffn": 48, "vocab": 67},
    "data": {"dataset": "none"},
}  # fmt: skip


class Choice(NamedTuple):
    """A name for people, and the keys that make it."""

    name: str
    changes: Mapping[str, Any]


def _schedule(name: str) -> Choice:
    return Choice(f"schedule {name}", {"pipeline.schedule": name, "mesh.pp": 2})


_EXPERTS = {"model.experts.count": 4}
CHOICES: tuple[Choice, ...] = (
    Choice("tensor parallel", {"mesh.tp": 2}),
    Choice("without sequence parallel", {"mesh.tp": 2, "mesh.sequence_parallel": False}),
    Choice("data parallel", {"mesh.dp": 2}),
    Choice("context parallel, ring", {"mesh.cp": 2}),
    Choice("context parallel, all-to-all", {"mesh.cp": 2, "mesh.cp_all_to_all": 2}),
    Choice("context parallel, hybrid", {"mesh.cp": 4, "mesh.cp_all_to_all": 2}),
    _schedule("1f1b"),
    _schedule("gpipe"),
    _schedule("interleaved"),
    _schedule("looped-bfs"),
    _schedule("interleaved-zb"),
    _schedule("zb-h1"),
    _schedule("zb-h2"),
    _schedule("zb-v"),
    _schedule("v-half"),
    _schedule("v-min"),
    _schedule("dualpipe-v"),
    Choice("experts", _EXPERTS),
    Choice("expert parallel", {**_EXPERTS, "mesh.ep": 2, "mesh.dp": 2}),
    Choice("expert tensor parallel", {**_EXPERTS, "mesh.etp": 2, "mesh.tp": 2}),
    Choice("experts with capacity", {**_EXPERTS, "model.experts.capacity_factor": 1.0}),
    Choice("expert balancing bias", {**_EXPERTS, "model.experts.bias_rate": 1e-3}),
    Choice("ZeRO 0", {"data_parallel.zero": 0, "mesh.dp": 2}),
    Choice("ZeRO 1", {"data_parallel.zero": 1, "mesh.dp": 2}),
    Choice("ZeRO 2", {"data_parallel.zero": 2, "mesh.dp": 2}),
    Choice("ZeRO 3", {"data_parallel.zero": 3, "mesh.dp": 2}),
    Choice("ZeRO 3, reduced once", {"data_parallel.zero": 3, "data_parallel.reduce": "last_microbatch", "mesh.dp": 2}),
    Choice("hybrid sharding", {"mesh.replicate": 2, "mesh.dp": 4}),
    Choice("optimizer offload", {"data_parallel.offload": True}),
    Choice("bf16 reduction", {"data_parallel.reduce_dtype": "bf16", "mesh.dp": 2}),
    Choice("bf16", {"precision.dtype": "bf16"}),
    Choice("fp16", {"precision.dtype": "fp16"}),
    Choice("bf16 moments", {"precision.moments": "bf16"}),
    Choice("stochastic rounding", {"precision.stochastic_rounding": True, "precision.moments": "bf16"}),
    Choice("recompute selective", {"memory.recompute": "selective"}),
    Choice("recompute full", {"memory.recompute": "full"}),
    Choice("activation offload", {"memory.offload_activations": True}),
    Choice("chunked loss", {"memory.loss_chunks": 4}),
    Choice("muon", {"optimizer.name": "muon"}),
    Choice("lion", {"optimizer.name": "lion"}),
    Choice("sgd", {"optimizer.name": "sgd"}),
    Choice("canonical determinism", {"determinism": "canonical", "cluster.threads_per_worker": 1}),
    Choice("tied embeddings", {"model.tied_embeddings": True}),
    Choice("sliding window", {"model.window": 5}),
    Choice("documents apart", {"data.document_mask": True}),
    Choice("dropout", {"model.dropout": 0.1}),
    Choice("attention dropout", {"model.attention_dropout": 0.1}),
)


class Answer(NamedTuple):
    """Of one pair: legal, or the problems, or neither where both set one key to different values."""

    legal: bool
    alternatives: bool
    problems: tuple[Problem, ...]


def together(choices: Sequence[Choice], base: Mapping[str, Any] = BASE) -> RunConfig | None:
    """The base with all choices laid over it, mesh axes as large as any of them asks; None where two exclude each other."""
    changes: dict[str, Any] = {}
    for choice in choices:
        for key, value in choice.changes.items():
            old = changes.get(key, value)
            if old != value and not (
                key.startswith("mesh.") and isinstance(value, int) and not isinstance(value, bool)
            ):
                return None
            changes[key] = max(old, value) if key.startswith("mesh.") else value
    return from_mapping(base).replace(**changes)


def answer(first: Choice, second: Choice) -> Answer:
    """What the rules say to two choices together."""
    config = together((first, second))
    if config is None:
        return Answer(False, True, ())
    found = tuple(problems(config))
    return Answer(not found, False, found)


def markdown(choices: Sequence[Choice] = CHOICES) -> str:
    """The table and its reasons, as a page."""
    reasons: dict[tuple[str, str], int] = {}
    rows = []
    for at, row in enumerate(choices):
        cells = []
        for column in choices[: at + 1]:
            cells.append(_cell(answer(row, column), reasons))
        rows.append(f"| {at + 1} {row.name} | " + " | ".join([*cells, *[""] * (len(choices) - at - 1)]) + " |")
    head = "| | " + " | ".join(str(number + 1) for number in range(len(choices))) + " |"
    notes = [f"{number}. `{where}`: {what}" for (where, what), number in reasons.items()]
    keys = [f"| {c.name} | {', '.join(f'`{k}: {_yaml(v)}`' for k, v in c.changes.items())} |" for c in choices]
    return "\n".join(
        [
            "# What goes with what", "",
            "Made from the rules of the code by `python -m raytron.plan.compatibility`; a test holds it up to date, and the",
            "parity tests train every pair that is marked ✓. A number: refused, with the reason below. ·: one or the other.",
            "", head, "|---" * (len(choices) + 1) + "|", *rows, "",
            "## Why not", "", *(notes or ["Everything above goes together."]), "",
            "## The choices", "", "| choice | keys |", "|---|---|", *keys, "",
        ]
    )  # fmt: skip


def _cell(found: Answer, reasons: dict[tuple[str, str], int]) -> str:
    if found.legal:
        return "✓"
    if found.alternatives:
        return "·"
    first = found.problems[0]
    return str(reasons.setdefault((first.where, first.what), len(reasons) + 1))


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    print(markdown(), end="")
