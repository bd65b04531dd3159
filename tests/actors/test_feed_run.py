"""Whole runs whose samples come by another way: the same samples, so the same losses to the bit."""

from __future__ import annotations

import pytest
from tiny_run import TINY

from raytron.actors.run import train
from raytron.config import load
from raytron.observe.records import read_records


def losses(tmp_path, dataset, name, **data):
    made = {**TINY, "name": f"feed-{name}", "run_dir": str(tmp_path / name), "steps": 3}
    result = train(load({**made, "data": {"dataset": str(dataset), **data}}), quiet=True)
    assert result.status == "complete"
    records = list(read_records(tmp_path / name / "metrics.jsonl"))
    assert all(0 <= record["data_wait_s"] <= record["step_time_s"] for record in records)
    return [record["loss"] for record in records]


@pytest.mark.parametrize("packing", ["best_fit"])
def test_samples_read_ahead_or_by_ray_data_are_the_same(tmp_path, dataset, packing):
    plain = losses(tmp_path, dataset, "plain", packing=packing, prefetch=0)
    assert losses(tmp_path, dataset, "ahead", packing=packing) == plain
    assert losses(tmp_path, dataset, "ray-data", packing=packing, feed="ray_data") == plain
