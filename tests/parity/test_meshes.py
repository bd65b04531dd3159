"""Every mesh, schedule, ZeRO level and kind of model gives what one device gives.

The options are covered pairwise: each pair of values of two options stands together in at least one case.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from harness import bare, check_equal, run_mesh, run_twin
from models import tiny

OPTIONS: dict[str, tuple[Any, ...]] = {
    "mesh.tp": (1, 2),
    "mesh.pp": (1, 2),
    "mesh.dp": (1, 2),
    "mesh.sequence_parallel": (True, False),
    "pipeline.schedule": ("gpipe", "1f1b", "interleaved", "zb-h1"),
    "data_parallel.zero": (0, 1, 2),
    "model": ("llama", "gpt2", "qwen3", "dropped"),
    "model.tied_embeddings": (True, False),
    "micro_batch_size": (1, 2),
}


def legal(case: dict[str, Any]) -> bool:
    """Interleaving needs a pipeline; every combination of the three mesh sizes is in the cases beside."""
    return case["pipeline.schedule"] != "interleaved" or case["mesh.pp"] == 2


def pairwise() -> list[dict[str, Any]]:
    """Greedy: again and again the legal combination with the most pairs that no case has yet."""
    names = list(OPTIONS)
    every = [dict(zip(names, values, strict=True)) for values in itertools.product(*OPTIONS.values())]
    every = [case for case in every if legal(case)]

    def pairs(case: dict[str, Any]) -> set[Any]:
        return set(itertools.combinations(case.items(), 2))

    waiting = set().union(*map(pairs, every))
    cases = []
    while waiting:
        case = max(every[:: max(1, len(every) // 400)] + every[len(cases) :: 97], key=lambda c: len(pairs(c) & waiting))
        if not pairs(case) & waiting:
            case = max(every, key=lambda c: len(pairs(c) & waiting))
        waiting -= pairs(case)
        cases.append(case)
    return cases


def config_of(case: dict[str, Any]):
    changes = dict(case)
    model = changes.pop("model")
    if changes["pipeline.schedule"] == "interleaved":
        changes["pipeline.virtual_stages"] = 2
    return tiny(model, **changes)


def name_of(case: dict[str, Any]) -> str:
    sp = "sp" if case["mesh.sequence_parallel"] else "nosp"
    tied = "tied" if case["model.tied_embeddings"] else "untied"
    sizes = f"tp{case['mesh.tp']}pp{case['mesh.pp']}dp{case['mesh.dp']}"
    options = f"{case['pipeline.schedule']}-zero{case['data_parallel.zero']}-{case['model']}"
    return f"{sizes}-{sp}-{options}-{tied}-mb{case['micro_batch_size']}"


@pytest.mark.parametrize("case", pairwise(), ids=name_of)
def test_pairwise(world, case):
    check_equal(world, config_of(case))


SIZES = list(itertools.product((1, 2), repeat=3))


@pytest.mark.parametrize(
    ("sizes", "sequence_parallel"),
    [(sizes, True) for sizes in SIZES]
    + [pytest.param(sizes, False, marks=[pytest.mark.slow] * (sizes[0] == 1)) for sizes in SIZES],  # tp 1 cuts nothing
    ids=lambda value: "tp{}pp{}dp{}".format(*value) if isinstance(value, tuple) else "sp" if value else "nosp",
)
def test_every_mesh(world, sizes, sequence_parallel):
    tp, pp, dp = sizes
    mesh = {"mesh.tp": tp, "mesh.pp": pp, "mesh.dp": dp, "mesh.sequence_parallel": sequence_parallel}
    check_equal(world, tiny("llama", **mesh))


OTHERS = {
    "repeated KV heads": tiny("llama", **{"mesh.tp": 4}),
    "repeated KV heads with biases": tiny("qwen3", **{"mesh.tp": 4, "mesh.dp": 2, "data_parallel.zero": 2}),
    "repeated KV heads, a stage without layers": tiny("llama", **{"mesh.tp": 4, "mesh.pp": 2, "pipeline.split": [0, 4]}),
    "one KV head": tiny("llama", **{"mesh.tp": 2, "model.kv_heads": 1, "mesh.sequence_parallel": False}),
    "dp that divides no dimension": tiny("gpt2", **{"mesh.dp": 3, "global_batch_size": 6, "micro_batch_size": 1}),
    "uneven stages": tiny("llama", **{"mesh.pp": 3, "pipeline.split": [1, 2, 1], "pipeline.schedule": "zb-h1"}),
    "deep pipeline, tied": tiny("gpt2", **{"mesh.pp": 4, "pipeline.schedule": "1f1b"}),
    "interleaved over two chunks": tiny(
        "gpt2",
        **{"mesh.pp": 2, "mesh.tp": 2, "pipeline.schedule": "interleaved", "pipeline.virtual_stages": 2,
           "mesh.dp": 2, "data_parallel.zero": 2, "micro_batch_size": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("config", list(OTHERS.values()), ids=list(OTHERS))
def test_others(world, config):
    check_equal(world, config)


def test_the_same_mesh_twice_is_equal_to_the_bit(world):
    config = tiny("dropped", **{"mesh.tp": 2, "mesh.pp": 2, "mesh.dp": 2, "data_parallel.zero": 2})
    first, second = run_mesh(world, config, 5), run_mesh(world, config, 5)
    assert first.losses == second.losses
    assert all((first.weights[name] == second.weights[name]).all() for name in first.weights)


@pytest.mark.parametrize("mesh", [{}, {"mesh.tp": 2, "mesh.pp": 2}, {"mesh.dp": 2, "data_parallel.zero": 2}], ids=str)
def test_bf16_stays_near_fp32(world, mesh):
    """bf16 has 8 bits: losses within a hundredth, fp32 masters that move by less than bf16 could resolve."""
    config = tiny("llama", **{"precision.dtype": "bf16"}, **mesh)
    mine, truth = run_mesh(world, config, 10), run_twin(bare(config), 10)
    assert max(abs(a - b) for a, b in zip(mine.losses, truth.losses, strict=True)) < 0.02
    assert mine.weights["norm.weight"].dtype.itemsize == 4
    for name, gradient in truth.gradients.items():
        assert (mine.gradients[name] - gradient).norm() <= 0.1 * gradient.norm(), name
