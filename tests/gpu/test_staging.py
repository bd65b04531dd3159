"""One device: a checkpoint holds what stood there when it began, although the device goes on. Run with `pytest -m gpu`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from raytron.checkpoint.saver import Saver
from raytron.checkpoint.whole import read_whole
from raytron.parallel.layout import Slice

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_it_holds_what_stood_there_when_it_began(tmp_path: Path) -> None:
    device = torch.device("cuda")
    weight = torch.randn(4096, 1024, device=device)
    slices = {"model.w": Slice((4096, 512), (0, 0), weight[:, :512]), "model.b": Slice((1024,), (0,), weight[0])}
    saver = Saver(device=device)
    for step in (1, 2):  # the second into the same pinned buffers
        weight.normal_()
        before = weight.cpu()
        saver.begin(tmp_path, step, slices, {})
        saver.hold()
        weight.zero_()
        saved = saver.finish()
        assert saved is not None
        assert saved.error is None
        read = read_whole(saved.path)
        assert torch.equal(read["w"], before[:, :512])
        assert torch.equal(read["b"], before[0])
