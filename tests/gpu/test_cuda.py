"""One device: the step on a GPU equals the twin's on the CPU, and bf16 stays near it. Run with `pytest -m gpu`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from raytron.config import from_mapping
from raytron.data.batch import Batch
from raytron.kernels.attention import add_attention, add_gradients, causal_attention, reference, seen_by
from raytron.kernels.tiles import Span, tiles
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
LENGTH = 129


def batch(seed: int = 0) -> Batch:
    rows = np.random.default_rng(seed).integers(0, 512, (4, 65))
    return Batch(np.arange(4), rows[:, :-1].copy(), rows[:, 1:].copy(), np.ones((4, 64), dtype=np.float32))


def losses(dtype: str, **changes: str | float | bool) -> list[float]:
    config = CONFIG.replace(**{"precision.dtype": dtype}, **changes)
    engine = Engine(make_plan(config, None), Mesh(MeshShape(), 0, torch.device("cuda")))
    return [engine.step(batch(step), 1e-3).loss for step in range(5)]


def truth(**changes: str | float | bool) -> list[float]:
    config = CONFIG.replace(**{"lr.decay": "constant", "lr.peak": 1e-3}, **changes)
    return Twin(config).train(batch(step) for step in range(5))


def test_fp32_steps_equal_the_twin() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    assert losses("fp32") == pytest.approx(truth(), rel=1e-4)


def test_bf16_steps_stay_near() -> None:
    assert losses("bf16") == pytest.approx(truth(), rel=1e-2)


def test_fp16_steps_stay_near() -> None:
    assert losses("fp16") == pytest.approx(truth(), rel=2e-3)


@pytest.mark.parametrize("name", ["muon", "lion", "sgd"])
def test_every_optimizer_equals_the_twin(name: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    optimizer = {"optimizer.name": name}
    assert losses("fp32", **optimizer) == pytest.approx(truth(**optimizer), rel=1e-4)


def test_rounded_by_chance_they_stay_near() -> None:
    few = {"precision.moments": "bf16", "precision.stochastic_rounding": True, "optimizer.newton_schulz": "bf16"}
    assert losses("bf16", **few, **{"optimizer.name": "muon"}) == pytest.approx(
        truth(**{"optimizer.name": "muon"}), rel=2e-2
    )


def heads(dtype: torch.dtype) -> list[torch.Tensor]:
    """Queries, keys, values and the output's gradient, heads and key-value heads interleaved in memory as in the model."""
    generator = torch.Generator("cuda").manual_seed(0)
    sizes = [(LENGTH, 2, count, 64) for count in (8, 2, 2, 8)]
    made = [torch.randn(size, generator=generator, device="cuda", dtype=dtype) for size in sizes]
    return [x.permute(1, 2, 0, 3).requires_grad_() for x in made]


def near(mine: Sequence[torch.Tensor], truth: Sequence[torch.Tensor]) -> None:
    for a, b in zip(mine, truth, strict=True):
        assert (a.float() - b).norm() < 1e-2 * b.norm()


def test_attention_equals_the_formula() -> None:
    q, k, v, dout = heads(torch.bfloat16)
    fast = causal_attention(q, k, v)
    wide = [x.detach().float().requires_grad_() for x in (q, k, v)]
    plain = reference(*wide, seen_by(LENGTH).cuda())
    near([fast, *torch.autograd.grad(fast, (q, k, v), dout)], [plain, *torch.autograd.grad(plain, wide, dout.float())])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["flash", "formula"])
@pytest.mark.parametrize("window", [None, 1, 17, 1000])
@pytest.mark.parametrize("starts", [None, ((0, 30, 31, 100), (0,))], ids=["one", "documents"])
def test_tiles_equal_the_formula(
    dtype: torch.dtype, window: int | None, starts: Sequence[Sequence[int]] | None
) -> None:
    """Two blocks of keys merged by their log-sum-exp, forward and backward, as on a ring."""
    q, k, v, dout = (x.detach() for x in heads(dtype))
    at, documents = torch.arange(LENGTH), None
    if starts is not None:
        documents = torch.stack([torch.bucketize(at, torch.tensor(row), right=True) for row in starts])
    wide = [x.float().requires_grad_() for x in (q, k, v)]
    truth = reference(*wide, seen_by(LENGTH, window, documents).cuda())
    out = torch.zeros(q.shape, device="cuda")
    lse = torch.full(q.shape[:3], -torch.inf, device="cuda")
    gradients = [torch.zeros(x.shape, device="cuda") for x in (q, k, v)]
    blocks = [(slice(*ends), tiles([Span(0, 0, LENGTH)], [Span(ends[0], 0, ends[1] - ends[0])], 2, window, starts))
              for ends in ((70, LENGTH), (0, 70))]  # fmt: skip
    for block, found in blocks:
        add_attention(out, lse, q, k[:, :, block], v[:, :, block], found)
    for block, found in blocks:
        parts = (gradients[0], gradients[1][:, :, block], gradients[2][:, :, block])
        add_gradients(parts, dout, q, k[:, :, block], v[:, :, block], out.to(dtype), lse, found)
    near([out], [truth])
    for mine, plain in zip(gradients, torch.autograd.grad(truth, wide, dout.float()), strict=True):
        assert (mine - plain).norm() <= 1e-2 * plain.norm() + 1e-2
