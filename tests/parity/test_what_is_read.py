"""A rank reads from a checkpoint what it holds and no more; and others read it: the twin, a Hugging Face model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import batch_of, tiny
from test_checkpoint_meshes import save, trainer_of
from test_expert_checkpoints import MODEL
from test_twin import hugging_face

from raytron.checkpoint import store
from raytron.checkpoint.catalog import open_generation
from raytron.checkpoint.checkpointer import load
from raytron.checkpoint.local_storage import Descriptor
from raytron.checkpoint.whole import read_whole
from raytron.config import RunConfig
from raytron.model.hf import to_hugging_face
from raytron.plan.mesh import MeshShape
from raytron.testing.twin import Twin

TARGETS: dict[str, dict[str, Any]] = {
    "tp2 dp2, zero 3": {"mesh.tp": 2, "mesh.dp": 2, "data_parallel.zero": 3},
    "pp2 uneven, interleaved": {"mesh.pp": 2, "pipeline.schedule": "interleaved", "pipeline.layout": "Et|t|t|tL"},
    "cp2 tp2": {"mesh.cp": 2, "mesh.tp": 2},
    "ep2 etp2": {"mesh.dp": 2, "mesh.tp": 2, "mesh.ep": 2, "mesh.etp": 2},
}


def read_bytes(rank: int, config: RunConfig, path: str) -> tuple[int, int, int]:
    """Of a load: bytes of tensors that this rank read, bytes of its slices, bytes that it digested for all."""
    counts = {"read": 0, "digested": 0}
    trainer = trainer_of(rank, config)
    generation = open_generation(path)
    state = trainer.state()
    assert generation.records
    read, check = Descriptor.read_into, store.check_file

    def counted(self: Descriptor, view: memoryview, start: int) -> None:
        counts["read"] += len(view)
        read(self, view, start)

    def checked(file: Path, size: int, digest: str | None = None) -> None:
        before = counts["read"]
        check(file, size, digest)
        counts["digested"] += counts["read"] - before
        counts["read"] = before

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Descriptor, "read_into", counted)
        patch.setattr(Descriptor, "gap", 0)
        patch.setattr(store, "check_file", checked)
        patch.setattr("raytron.checkpoint.checkpointer.open_generation", lambda _path: generation)
        load(generation, state, trainer.mesh.control)
    return counts["read"], sum(part.tensor.nbytes for part in state.values()), counts["digested"]


@pytest.mark.parametrize("target", TARGETS)
def test_a_rank_reads_its_own_bytes_alone(world, tmp_path, target):
    model = MODEL if "mesh.ep" in TARGETS[target] else "llama"
    path = world.run(2, save, tiny(model, **{"mesh.tp": 2}), tmp_path, 1)[0][1]
    config = tiny(model, **TARGETS[target])
    found = world.run(MeshShape.of(config.mesh).world, read_bytes, config, path)
    for read, held, _ in found:
        assert read == held
    files = open_generation(path).records.files.values()
    assert sum(digested for _, _, digested in found) == sum(file.size for file in files)
    assert max(digested for _, _, digested in found) <= max(file.size for file in files)


@pytest.mark.parametrize("model", ["llama", "gpt2", "qwen3"])
def test_what_a_mesh_saved_is_the_twins_and_hugging_faces(world, tmp_path, model):
    config = tiny(model, **{"mesh.tp": 2, "mesh.pp": 2, "pipeline.split": [3, 1] if model != "qwen3" else None})
    _, path, loss = world.run(4, save, config, tmp_path, 2)[0]
    weights = read_whole(path)
    twin = Twin(config)
    assert weights.keys() == twin.weights.keys()
    with torch.no_grad():
        for name, weight in twin.weights.items():
            weight.copy_(weights[name])
    batch = batch_of(config, 2)
    assert twin.loss(batch).item() == pytest.approx(loss, rel=1e-5)
    if model == "qwen3" and config.model.qkv_bias:
        return  # of these biases Hugging Face's Qwen3 knows nothing
    theirs = hugging_face(config).eval()
    report = theirs.load_state_dict(to_hugging_face(weights, config.model), strict=False)
    assert not report.unexpected_keys
    tokens = torch.from_numpy(batch.tokens)
    with torch.no_grad():
        assert (twin.logits(tokens) - theirs(tokens).logits).abs().max() < 1e-5
