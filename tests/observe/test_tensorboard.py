"""Metrics for TensorBoard."""

import sys

import pytest

from raytron.errors import ConfigError
from raytron.observe.board import TensorBoard


def test_numbers_of_steps_become_scalars(tmp_path):
    pytest.importorskip("tensorboard")
    board = TensorBoard(tmp_path)
    board.write({"step": 3, "loss": 2.5, "tokens": 64, "skipped": True, "request": 0, "note": "text", "mfu": None})
    board.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["loss", "tokens"]
    assert [(point.step, point.value) for point in events.Scalars("loss")] == [(3, 2.5)]


def test_without_the_package_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"pip install 'raytron\[tensorboard\]'"):
        TensorBoard(tmp_path)
