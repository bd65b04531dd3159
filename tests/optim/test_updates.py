"""One rank's updates are torch's own, or the paper's formula."""

from __future__ import annotations

import pytest
import torch

from raytron.config import DataParallelConfig, OptimizerConfig, PrecisionConfig, from_mapping
from raytron.optim.adamw import AdamW
from raytron.optim.muon import batch_dims, orthogonal
from raytron.optim.sharded import ShardedOptimizer
from raytron.parallel.buckets import GradientBuckets
from raytron.parallel.layout import Layout
from raytron.parallel.mesh import Mesh
from raytron.parallel.parameter import Param
from raytron.plan.mesh import MeshShape

NAMES = {
    "embed.weight": (7, 4),
    "layers.0.attention.q.weight": (2, 3, 4),
    "layers.0.attention.norm.weight": (4,),
    "layers.0.mlp.up.weight": (2, 5, 4),
    "layers.0.mlp.down.weight": (4, 5),
}
LR, STEPS = 0.01, 4


def made(**changes):
    """The optimizer of one rank over some parameters, the parameters, and their initial values."""
    config = from_mapping({}).replace(**changes)
    torch.manual_seed(0)
    params = [Param(torch.randn(shape), name, Layout(shape), len(shape) > 1) for name, shape in NAMES.items()]
    mesh = Mesh(MeshShape(), 0)
    buckets = GradientBuckets(params, mesh, DataParallelConfig())
    values = {param.full_name: param.detach().clone() for param in params}
    return ShardedOptimizer(buckets, mesh, config), {param.full_name: param for param in params}, values


def gradients(step):
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=generator) for name, shape in NAMES.items()}


def run(optimizer, params):
    for step in range(STEPS):
        for name, gradient in gradients(step).items():
            params[name].main_grad.copy_(gradient)
        optimizer.step(LR, 1.0)


def torch_run(kind, values, decays, **options):
    """torch's optimizer on the same values, each with its own weight decay."""
    groups = [{"params": [values[name].requires_grad_()], "weight_decay": decay} for name, decay in decays.items()]
    optimizer = kind(groups, lr=LR, **options)
    for step in range(STEPS):
        for name, gradient in gradients(step).items():
            values[name].grad = gradient.clone()
        optimizer.step()


DECAYS = {name: 0.0 if len(shape) == 1 else 0.1 for name, shape in NAMES.items()}


def close(a, b, tolerance=1e-6):
    assert (a - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize("moments", ["fp32", "written out"])
def test_adamw_is_torchs(moments, monkeypatch):
    if moments == "written out":
        monkeypatch.setattr(ShardedOptimizer, "_adamw", lambda self, shares: [written_out(self, shares)])
    optimizer, params, values = made()
    run(optimizer, params)
    torch_run(torch.optim.AdamW, values, DECAYS, betas=(0.9, 0.95), eps=1e-8)
    for name, value in values.items():
        close(params[name], value)


def written_out(self, shares):
    return AdamW(shares, self.config.optimizer, self.config.precision, self.rounding)


@pytest.mark.parametrize("nesterov", [True, False])
def test_sgd_is_torchs(nesterov):
    changes = {"optimizer.momentum": 0.9, "optimizer.nesterov": nesterov, "optimizer.weight_decay": 0.0}
    optimizer, params, values = made(**{"optimizer.name": "sgd"}, **changes)
    run(optimizer, params)
    torch_run(torch.optim.SGD, values, dict.fromkeys(NAMES, 0.0), momentum=0.9, nesterov=nesterov)
    for name, value in values.items():
        close(params[name], value)


def test_lion_is_the_papers():
    optimizer, params, values = made(**{"optimizer.name": "lion"})
    run(optimizer, params)
    m = {name: torch.zeros_like(value) for name, value in values.items()}
    for step in range(STEPS):
        for name, g in gradients(step).items():
            w = values[name]
            w -= LR * (torch.sign(0.9 * m[name] + 0.1 * g) + DECAYS[name] * w)
            m[name] = 0.95 * m[name] + 0.05 * g
    for name, value in values.items():
        close(params[name], value)


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_torchs(nesterov):
    """torch's works in bf16 and on matrices; packed ones are matrices of their own."""
    options = {"optimizer.newton_schulz": "bf16", "optimizer.nesterov": nesterov}
    optimizer, params, values = made(**{"optimizer.name": "muon", **options})
    run(optimizer, params)
    parts = {"down": ("layers.0.mlp.down.weight", slice(None)), "q": ("layers.0.attention.q.weight", slice(None)),
             "gate": ("layers.0.mlp.up.weight", 0), "up": ("layers.0.mlp.up.weight", 1)}  # fmt: skip
    whole = {key: values[name][part].reshape(-1, values[name].shape[-1]).clone() for key, (name, part) in parts.items()}
    theirs = torch.optim.Muon(
        [value.requires_grad_() for value in whole.values()],
        lr=LR, weight_decay=0.1, momentum=0.95, nesterov=nesterov, adjust_lr_fn="match_rms_adamw",
    )  # fmt: skip
    for step in range(STEPS):
        given = gradients(step)
        for key, (name, part) in parts.items():
            whole[key].grad = given[name][part].reshape(whole[key].shape)
        theirs.step()
    for key, (name, part) in parts.items():
        close(params[name][part].reshape(whole[key].shape), whole[key], 1e-3)
    torch_run(torch.optim.AdamW, values, DECAYS, betas=(0.9, 0.95), eps=1e-8)
    for name in ("embed.weight", "layers.0.attention.norm.weight"):
        close(params[name], values[name])


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 6, 20), (2, 20, 6)])
def test_newton_schulz_makes_singular_values_near_one(shape):
    made = orthogonal(torch.randn(shape, generator=torch.Generator().manual_seed(1)), 5, torch.float32)
    singular = torch.linalg.svdvals(made)
    assert made.shape == shape
    assert 0.3 < singular.min() < singular.max() < 1.3


def test_what_muon_takes_for_a_matrix():
    assert batch_dims("layers.0.attention.q.weight", (4, 8, 32)) == ()
    assert batch_dims("layers.0.attention.kv.weight", (2, 2, 8, 32)) == (1,)
    assert batch_dims("layers.0.mlp.up.weight", (2, 48, 32)) == (0,)
    assert batch_dims("layers.0.mlp.experts.up.weight", (8, 2, 48, 32)) == (0, 1)
    assert batch_dims("layers.0.mlp.down.weight", (32, 48)) == ()
    others = {"embed.weight": (67, 32), "head.weight": (67, 32), "layers.0.mlp.norm.weight": (32,),
              "layers.0.attention.q.bias": (4, 8), "layers.0.mlp.shared.gate.weight": (1, 32)}  # fmt: skip
    assert {batch_dims(name, shape) for name, shape in others.items()} == {None}


def test_groups_change_rate_and_decay_and_freeze():
    groups = [{"match": "embed.*", "freeze": True}, {"match": "*.norm.weight", "lr": 0.5, "weight_decay": 0.2}]
    optimizer, params, values = made(**{"optimizer.groups": groups})
    before = {name: value.clone() for name, value in values.items()}
    run(optimizer, params)
    assert torch.equal(params["embed.weight"], before["embed.weight"])
    assert "embed.weight" not in optimizer.squared_norms()[0]
    name = "layers.0.attention.norm.weight"
    theirs = torch.optim.AdamW([values[name].requires_grad_()], lr=LR / 2, weight_decay=0.2, betas=(0.9, 0.95))
    for step in range(STEPS):
        values[name].grad = gradients(step)[name]
        theirs.step()
    close(params[name], values[name])


def test_defaults_train_with_torchs_fused_kernel():
    optimizer, *_ = made()
    assert [type(each).__name__ for each in optimizer.optimizers] == ["FusedAdamW"]
    assert OptimizerConfig().name == "adamw"
    assert PrecisionConfig().moments == "fp32"
