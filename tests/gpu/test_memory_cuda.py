"""One device: segments hold the state as it was, although the device goes on at once. Run with `pytest -m gpu`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_cuda import CONFIG, batch

from raytron.checkpoint.sources import choose, survey
from raytron.data.batch import Batch
from raytron.parallel.mesh import Mesh
from raytron.plan.mesh import MeshShape
from raytron.plan.plan import make_plan
from raytron.training.trainer import Trainer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


class Stream:
    sequence_length, samples_per_epoch = 64, 1 << 40

    def batch(self, first: int, count: int, part: int = 0, parts: int = 1) -> Batch:
        return batch(first)


def trainer(**changes: object) -> Trainer:
    return Trainer(make_plan(CONFIG.replace(**changes), None), Mesh(MeshShape(), 0, torch.device("cuda")), Stream())


@pytest.mark.parametrize("offload", [False, True])
def test_memory_gives_back_what_the_device_held(tmp_path: Path, offload: bool) -> None:
    changes = {"precision.dtype": "bf16", "data_parallel.offload": offload}
    ours, other = trainer(**changes), trainer(**changes)
    ours.open_replicas(tmp_path, 1)
    for _ in range(4):
        ours.train_step()
    assert ours.replicas is not None
    ours.replicas.wait()
    generation, reasons = choose(survey(tmp_path, "here").held)
    assert generation is not None, reasons
    assert generation.step == 4
    other.restore(generation, "here")
    for mine, theirs in zip(ours.state().values(), other.state().values(), strict=True):
        assert torch.equal(mine.tensor, theirs.tensor)
    ours.close_replicas()


def test_a_copy_under_way_holds_back_the_next_update(tmp_path: Path) -> None:
    ours = trainer()
    ours.open_replicas(tmp_path, 1)
    assert ours.replicas is not None
    ours.train_step()
    wanted = {name: part.tensor.clone() for name, part in ours.state().items()}
    ours.replicas.write(1, ours.facts())
    ours.replicas.before_update()
    for part in ours.state().values():
        part.tensor.zero_()
    ours.replicas.wait()
    generation = choose(survey(tmp_path, "here").held).generation
    assert generation is not None
    other = trainer()
    other.restore(generation, "here")
    for name, part in other.state().items():
        assert torch.equal(part.tensor, wanted[name])
    ours.close_replicas()
