"""Whole runs on a blend: what is told of them, and with which other data they may go on."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_run import TINY

from raytron.actors.run import tokenize, train
from raytron.checkpoint.catalog import committed
from raytron.config import load
from raytron.errors import ConfigError
from raytron.observe.records import read_records


@pytest.fixture(scope="module")
def digits(dataset, tmp_path_factory):
    """A second data set, by the first one's tokenizer."""
    text = tmp_path_factory.mktemp("digits")
    for number in range(24):
        (text / f"{number}.txt").write_text(" ".join(map(str, range(number, 150 + number))), encoding="utf-8")
    data = {"sources": [str(text)], "validation_fraction": 0.2, "tokenizer": {"path": str(dataset / "tokenizer.json")}}
    folder = tmp_path_factory.mktemp("more") / "digits"
    return tokenize(load({**TINY, "run_dir": str(folder), "data": data}), lambda fraction, message: None)


def blended(tmp_path, weights, *paths, steps=2, **data):
    blend = [{"dataset": str(path), "weight": weight} for path, weight in zip(paths, weights, strict=True)]
    made = {**TINY, "name": tmp_path.name.replace("_", "-"), "run_dir": str(tmp_path / "run"), "steps": steps}
    return load({**made, "data": {"blend": blend, "blend_block": 8, **data}})


def test_a_run_on_a_blend_tells_its_epochs_and_each_validation_loss(tmp_path, dataset, digits):
    both = [{"name": "words", "dataset": str(dataset)}, {"name": "digits", "dataset": str(digits)}]
    result = train(blended(tmp_path, [0.75, 0.25], dataset, digits, validation=both), quiet=True)
    assert result.status == "complete"
    assert set(result.validation_losses) == {"words", "digits"}
    assert result.validation_losses["words"] == result.validation_loss
    assert "words" in str(result)
    events = {record["event"]: record for record in read_records(Path(result.run_dir) / "events.jsonl")}
    assert events["data"]["sources"] == [str(dataset), str(digits)]
    assert events["epochs"]["message"].startswith("2 steps read 128 tokens, epochs: data-0 ")
    (generation, *_) = committed(Path(result.run_dir) / "checkpoints")
    assert generation.facts["data_recipe"]["stages"] == [[0, [3 << 30, 1 << 30]]]
    assert len(generation.facts["data"]) == 64


@pytest.mark.slow
def test_a_blend_goes_on_with_a_later_stage_and_not_with_other_weights(tmp_path, dataset, digits):
    """Eight samples are read; what comes after them may change."""
    train(load({**TINY, "name": "one", "run_dir": str(tmp_path / "run"), "steps": 2, "data": {"dataset": str(dataset)}}),
          quiet=True)  # fmt: skip
    with pytest.raises(
        ConfigError, match=r"the data is not what step-.* was trained on: there were 1 sources and are 2"
    ):
        train(blended(tmp_path, [0.5, 0.5], dataset, digits, steps=4), quiet=True)
    stage = {"start_step": 2, "weights": [0.5, 0.5]}
    more = train(blended(tmp_path, [1, 0], dataset, digits, steps=4, stages=[stage]), quiet=True)
    assert more.step == 4
    changed = [{**stage, "weights": [0.25, 0.75]}]
    with pytest.raises(ConfigError, match=r"0.5, 0.5 from sample 8 on was a stage"):
        train(blended(tmp_path, [1, 0], dataset, digits, steps=5, stages=changed), quiet=True)
    allowed = blended(tmp_path, [1, 0], dataset, digits, steps=5, stages=changed).replace(**{"resume.allow": ["data"]})
    assert train(allowed, quiet=True).step == 5
    steps = [record["step"] for record in read_records(tmp_path / "run" / "metrics.jsonl")]
    assert steps == [1, 2, 3, 4, 5]


def test_what_is_tokenized_is_not_tokenized_again(tmp_path, dataset, digits):
    with pytest.raises(ConfigError, match="tokenized already"):
        tokenize(blended(tmp_path, [0.5, 0.5], dataset, digits), lambda fraction, message: None)
