"""The data sets of a run: what is read, what is refused before anything starts, and what is said of epochs."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from making import make_dataset

from raytron.config import RunConfig, load
from raytron.data.blend_check import epochs_notice, epochs_read, step_of
from raytron.data.check import data_problems
from raytron.data.ensure import ensure_data
from raytron.data.manifest import write_manifest
from raytron.data.run_data import open_run_data, source_names
from raytron.data.shards import Dataset
from raytron.data.stream import ShardStream
from raytron.errors import ConfigError, DataError

LENGTH = 4


def tokens(first: int, samples: int) -> list[list[int]]:
    """One document of so many samples, counting up from `first`."""
    return [[first + number % 90 for number in range(samples * LENGTH + 1)]]


@pytest.fixture
def sources(tmp_path: Path) -> list[Dataset]:
    """Three data sets of 50, 20 and 10 samples, whose token ids tell them apart: hundreds."""
    return [
        make_dataset(tmp_path / name, [tokens(100 * number, size)], validation=[tokens(100 * number, held)])
        for number, (name, size, held) in enumerate([("web", 50, 6), ("code", 20, 3), ("books", 10, 0)], start=1)
    ]


def blended(sources: list[Dataset], weights: list[float], stages: object = (), **changes: object) -> RunConfig:
    blend = [{"dataset": str(each.path), "weight": weight} for each, weight in zip(sources, weights, strict=True)]
    config = load({"data": {"blend": blend, "stages": stages}, "sequence_length": LENGTH, "global_batch_size": 8})
    return config.replace(**{"steps": 10, "data.blend_block": 32, **changes})


def test_a_batch_holds_each_sources_own_samples(sources: list[Dataset]) -> None:
    data = open_run_data(blended(sources, [0.5, 0.25, 0.25]), "unused")
    stream = data.train()
    batch = stream.batch(0, 160)
    hundreds = batch.tokens[:, 0] // 100
    assert np.bincount(hundreds).tolist() == [0, 80, 40, 40]
    assert np.array_equal(hundreds, batch.tokens[:, -1] // 100)
    assert (batch.labels == np.where(batch.tokens % 100 == 89, batch.tokens // 100 * 100, batch.tokens + 1)).all()
    for parts in (2, 3, 7):
        pieces = [stream.batch(0, 160, part, parts) for part in range(parts)]
        assert np.array_equal(np.concatenate([piece.tokens for piece in pieces]), batch.tokens)
    assert stream.samples_per_epoch == 80
    assert data.sizes == (50, 20, 10)


def test_documents_are_told_apart_in_a_blend_too(sources: list[Dataset]) -> None:
    stream = open_run_data(blended(sources, [0.5, 0.25, 0.25], **{"data.document_mask": True}), "unused").train()
    batch = stream.batch(0, 32)
    assert batch.documents is not None
    assert batch.documents.shape == (32, LENGTH)
    assert stream.batch(0, 1, 1, 2).documents is not None


def test_one_data_set_is_read_as_before(sources: list[Dataset]) -> None:
    config = load({"data": {"dataset": str(sources[0].path)}, "sequence_length": LENGTH, "seed": 3})
    data = open_run_data(config, sources[0].path)
    mine, other = data.train().batch(0, 90), ShardStream(sources[0], "train", LENGTH, seed=3).batch(0, 90)
    assert np.array_equal(mine.tokens, other.tokens)
    assert data.recipe.hash == sources[0].hash
    assert [(each.name, each.share) for each in data.held] == [("validation", 1.0)]


def test_the_sources_own_splits_validate_by_their_weights(sources: list[Dataset]) -> None:
    data = open_run_data(blended(sources, [0.6, 0.2, 0.2]), "unused")
    sets = data.validation()
    assert [each.name for each in sets] == ["web", "code"]  # the books have no sample held out
    assert [each.share for each in sets] == pytest.approx([0.75, 0.25])
    assert sets[1].stream.batch(0, 3).tokens[:, 0].tolist() == [200, 204, 208]
    assert not open_run_data(blended(sources, [0.6, 0.2, 0.2], **{"evaluate.batches": 0}), "unused").held


def test_named_sets_validate_in_place_of_them(sources: list[Dataset]) -> None:
    named = [
        {"name": "code", "dataset": str(sources[1].path)},
        {"name": "all-books", "dataset": str(sources[2].path), "split": "train"},
    ]
    config = blended(sources[:2], [0.5, 0.5], **{"data.validation": named})
    assert data_problems(config) == []
    sets = open_run_data(config, "unused").validation()
    assert [(each.name, each.share) for each in sets] == [("code", 1.0), ("all-books", 0.0)]
    assert sets[1].stream.batch(0, 10).tokens[0].tolist() == [300, 301, 302, 303]


def test_sources_are_named_by_their_folders() -> None:
    blend = [{"dataset": path, "weight": 0.25} for path in ("/a/web", "/b/web", "code", "/")]
    assert source_names(load({"data": {"blend": blend}})) == ["web-0", "web-1", "code", "3"]


def test_a_blend_that_fits_has_no_problems(sources: list[Dataset]) -> None:
    assert data_problems(blended(sources, [0.5, 0.25, 0.25])) == []
    assert ensure_data(blended(sources, [0.5, 0.25, 0.25])) == sources[0].path


def test_everything_that_does_not_fit_is_told_at_once(sources: list[Dataset], tmp_path: Path) -> None:
    make_dataset(tmp_path / "vocab", [tokens(1, 9)], vocab=900)
    make_dataset(tmp_path / "eod", [tokens(1, 8)], eod=5)
    other = make_dataset(tmp_path / "other", [tokens(1, 7)])
    other.tokenizer.write_bytes(b"{}")
    write_manifest(other.path, replace(other.manifest, tokenizer_sha256=hashlib.sha256(b"{}").hexdigest()))
    make_dataset(tmp_path / "short", [[[1, 2, 3]]])
    paths = [str(tmp_path / name) for name in ("web", "vocab", "eod", "other", "short", "web")]
    config = load({"data": {"blend": [{"dataset": path, "weight": 1 / 6} for path in paths]}})
    found = data_problems(config.replace(**{"sequence_length": LENGTH, "model.vocab": 950}))
    told = {(problem.where, problem.what.split(": ", 1)[-1]) for problem in found}
    assert ("data.blend[0].dataset", "its token ids go up to 999, the model's only to 949") in told
    assert ("data.blend[1].dataset", "vocabulary 900, not 1000") in told
    assert ("data.blend[2].dataset", "end of document 5, not 0") in told
    assert any(where == "data.blend[3].dataset" and what.startswith("tokenizer 44136fa355b3") for where, what in told)
    assert any(where == "data.blend[4].dataset" and "one sample needs 5" in what for where, what in told)
    assert any(where == "data.blend[5].dataset" and "data.blend[0], too" in what for where, what in told)
    assert all(problem.remedy for problem in found)


def test_data_sets_that_can_not_be_opened_are_all_told(tmp_path: Path) -> None:
    blend = [{"dataset": str(tmp_path / name), "weight": 0.5} for name in ("one", "two")]
    found = data_problems(load({"data": {"blend": blend}}))
    assert [problem.where for problem in found] == ["data.blend[0].dataset", "data.blend[1].dataset"]
    assert "one: is no data set" in found[0].what


def test_a_source_that_would_be_read_too_often_says_when(sources: list[Dataset]) -> None:
    config = blended(sources, [0.5, 0.25, 0.25], steps=40)
    blend = [{"dataset": str(each.path), "weight": w} for each, w in zip(sources, (0.5, 0.25, 0.25), strict=True)]
    blend[2]["max_epochs"] = 2
    config = config.replace(**{"data.blend": blend})
    (problem,) = data_problems(config)
    assert problem.where == "data.blend[2].max_epochs"
    order = open_run_data(config, "").recipe.order((50, 20, 10), config.seed)
    beyond = np.flatnonzero(order.choose(np.arange(320))[0] == 2)[20]
    step = int(beyond) // 8 + 1
    assert f"is read 8 times within 40 steps; 2 are done at step {step} (sample {beyond})" in problem.what
    assert f"at most {step - 1} steps, or a weight of at most 0.0625" in problem.remedy
    assert data_problems(config.replace(steps=step - 1)) == []
    assert data_problems(config.replace(steps=step)) != []


def test_stages_count_in_how_often_a_source_is_read(sources: list[Dataset]) -> None:
    stages = [{"start_step": 5, "weights": [0, 0.5, 0.5]}]
    config = blended(sources, [1, 0, 0], stages, steps=21)
    data = open_run_data(config, "unused")
    assert epochs_read(data, 168) == [40 / 50, 64 / 20, 64 / 10]
    notice = epochs_notice(data)
    assert notice == "21 steps read 672 tokens, epochs: web 0.8, code 3.2, books 6.4; other weights from step 6 on"


def test_how_often_one_data_set_is_read(sources: list[Dataset]) -> None:
    config = load({"data": {"dataset": str(sources[0].path)}, "sequence_length": LENGTH, "global_batch_size": 10})
    notice = epochs_notice(open_run_data(config.replace(steps=20), sources[0].path))
    assert notice == "20 steps read 800 tokens: 4 times all there are"


def test_the_step_of_a_sample_is_that_of_the_ramp() -> None:
    ramp = {"batch_ramp.start": 2, "batch_ramp.increment": 2, "batch_ramp.samples": 60}
    config = RunConfig().replace(global_batch_size=8, **ramp)
    consumed, steps = 0, []
    for step in range(1, 40):
        steps += [step] * config.batch_size_at(consumed)
        consumed = len(steps)
    assert [step_of(config, sample) for sample in range(len(steps))] == steps


def test_a_source_without_a_sample_is_an_error_where_nobody_checked(tmp_path: Path) -> None:
    make_dataset(tmp_path / "short", [[[1, 2, 3]]])
    config = load({"data": {"dataset": str(tmp_path / "short")}, "sequence_length": LENGTH})
    with pytest.raises(DataError, match="one sample needs 5"):
        epochs_notice(open_run_data(config, tmp_path / "short"))


def test_validation_sets_are_checked_against_what_is_trained_on(sources: list[Dataset], tmp_path: Path) -> None:
    make_dataset(tmp_path / "vocab", [tokens(1, 9)], vocab=900)
    named = [
        {"name": "self", "dataset": str(sources[0].path), "split": "train"},
        {"name": "vocab", "dataset": str(tmp_path / "vocab"), "split": "train"},
        {"name": "books", "dataset": str(sources[2].path)},
        {"name": "absent", "dataset": str(tmp_path / "absent")},
    ]
    own = {"name": "own", "dataset": str(sources[1].path), "split": "train"}
    (problem,) = data_problems(blended(sources, [0.5, 0.25, 0.25], **{"data.validation": [own]}))
    assert problem.where == "data.validation[0].split"
    config = load({"data": {"dataset": str(sources[0].path), "validation": named}, "sequence_length": LENGTH})
    found = {problem.where: problem.what for problem in data_problems(config)}
    assert set(found) == {f"data.validation[{number}].dataset" for number in (1, 2, 3)} | {"data.validation[0].split"}
    assert "differs from the data to train on: vocabulary 900" in found["data.validation[1].dataset"]
    with pytest.raises(ConfigError, match="would be validated on"):
        ensure_data(config)
