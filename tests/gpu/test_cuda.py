"""One device: the step on a GPU equals the twin's on the CPU, and bf16 stays near it. Run with `pytest -m gpu`."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from raytron.config import from_mapping
from raytron.data.batch import Batch
from raytron.kernels.attention import causal_attention, reference
from raytron.parallel.mesh import Mesh
from raytron.plan.mesh import MeshShape
from raytron.plan.plan import make_plan
from raytron.testing.twin import Twin
from raytron.training.engine import Engine

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CONFIG = from_mapping(
    {"model": {"layers": 2, "hidden": 128, "heads": 4, "kv_heads": 2, "ffn": 256, "vocab": 512, "dropout": 0.1},
     "sequence_length": 64, "global_batch_size": 4, "micro_batch_size": 2, "data": {"dataset": "random"},
     "lr": {"peak": 1e-3, "final": 1e-4}}
)  # fmt: skip


def batch(seed: int = 0) -> Batch:
    rows = np.random.default_rng(seed).integers(0, 512, (4, 65))
    return Batch(np.arange(4), rows[:, :-1].copy(), rows[:, 1:].copy(), np.ones((4, 64), dtype=np.float32))


def losses(dtype: str) -> list[float]:
    config = CONFIG.replace(**{"precision.dtype": dtype})
    engine = Engine(make_plan(config, None), Mesh(MeshShape(), 0, torch.device("cuda")))
    return [engine.step(batch(step), 1e-3).loss for step in range(5)]


def truth() -> list[float]:
    return Twin(CONFIG.replace(**{"lr.decay": "constant", "lr.peak": 1e-3})).train(batch(step) for step in range(5))


def test_fp32_steps_equal_the_twin() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    assert losses("fp32") == pytest.approx(truth(), rel=1e-4)


def test_bf16_steps_stay_near() -> None:
    assert losses("bf16") == pytest.approx(truth(), rel=1e-2)


@pytest.mark.parametrize("window", [None, 17])
def test_attention_equals_the_formula(window: int | None) -> None:
    q = torch.randn(2, 8, 129, 64, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(2, 2, 129, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    fast, plain = causal_attention(q, k, v, window).float(), reference(q.float(), k.float(), v.float(), window)
    assert (fast - plain).norm() < 1e-2 * plain.norm()
