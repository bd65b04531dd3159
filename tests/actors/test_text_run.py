"""Whole runs on text that nobody tokenized: they train, go on on another mesh, and not with other text."""

from __future__ import annotations

import shutil

import pytest
from tiny_run import TINY

from raytron.actors.run import tokenize, train
from raytron.config import load
from raytron.errors import ConfigError
from raytron.observe.records import read_records


def on_text(tmp_path, corpus, name="run", **changes):
    data = {"source": "text", "sources": [str(corpus)], "validation_fraction": 0.2, "tokenizer": {"vocab": 300}}
    made = {**TINY, "name": f"{tmp_path.name}-{name}".replace("_", "-"), "run_dir": str(tmp_path / name), "data": data}
    made["lr"] = {"decay_steps": 4}  # also of a run that is begun with fewer steps
    return load(made).replace(**changes)


def losses(tmp_path, name):
    return [record["loss"] for record in read_records(tmp_path / name / "metrics.jsonl")]


def test_a_run_trains_on_text_and_goes_on_only_with_the_same_text(local_ray, tmp_path, corpus):
    mine = tmp_path / "text"
    shutil.copytree(corpus, mine)
    result = train(on_text(tmp_path, mine, steps=2), quiet=True)
    assert result.status == "complete"
    assert result.validation_loss is not None
    told = [record["message"] for record in read_records(tmp_path / "run" / "events.jsonl")]
    assert any("tokenized as they are read" in message for message in told)
    assert any(message.startswith("data: about ") for message in told)
    assert not (tmp_path / "run" / "data").exists()
    (mine / "0.txt").write_text("other text\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"the data is not what step-.* was trained on: source 0 was .* and is"):
        train(on_text(tmp_path, mine, steps=3), quiet=True)
    shutil.copy(corpus / "0.txt", mine / "0.txt")
    assert train(on_text(tmp_path, mine, steps=3), quiet=True).step == 3
    assert len(losses(tmp_path, "run")) == 3


@pytest.mark.slow
def test_every_mesh_and_every_feed_trains_on_the_same_samples(local_ray, tmp_path, corpus):
    train(on_text(tmp_path, corpus, "whole", steps=4), quiet=True)
    train(on_text(tmp_path, corpus, "tasks", steps=4, **{"data.feed": "ray_data", "data.prefetch": 0}), quiet=True)
    train(on_text(tmp_path, corpus, "moved", steps=2), quiet=True)
    train(on_text(tmp_path, corpus, "moved", steps=4, **{"mesh.pp": 1, "mesh.dp": 2}), quiet=True)
    whole = losses(tmp_path, "whole")
    assert losses(tmp_path, "tasks") == whole
    assert losses(tmp_path, "moved") == pytest.approx(whole, rel=1e-5)


def test_there_is_nothing_to_prepare(tmp_path, corpus):
    with pytest.raises(ConfigError, match=r"data.source: text is tokenized as it is read.*\n.*remedy: train, or"):
        tokenize(on_text(tmp_path, corpus), lambda fraction, message: None)
