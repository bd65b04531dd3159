from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from raytron.config import DataConfig, RunConfig, TokenizerConfig
from raytron.data import tokenize
from raytron.data.check import data_problems
from raytron.data.compact import compact
from raytron.data.corpus import resolve
from raytron.data.parts import Part, is_validation
from raytron.data.prepare import ensure_dataset, prepare
from raytron.data.shard_file import offsets_of, read_shard, write_shard
from raytron.data.shards import open_dataset
from raytron.data.stream import ShardStream
from raytron.data.task import Job, tokenize_group
from raytron.data.tokenize import group_units
from raytron.data.tokenizer import Tokenizer, train_tokenizer
from raytron.errors import ClusterError, ConfigError, DataError

TOKENIZER = TokenizerConfig(vocab=300, train_mb=0.1)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty small files."""
    folder = tmp_path_factory.mktemp("text")
    for n in range(60):
        (folder / f"{n:02d}.txt").write_text(f"document {n} says: " + "so it goes, " * (n + 1))
    return folder


@pytest.fixture(scope="module")
def data(text: Path) -> DataConfig:
    return DataConfig(sources=(str(text),), validation_fraction=0.2, tokenizer=TOKENIZER)


@pytest.fixture(scope="module")
def prepared(local_ray: None, data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(data, tmp_path_factory.mktemp("run") / "data")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_every_document_is_there_once_and_decodes(prepared: Path, text: Path) -> None:
    dataset = open_dataset(prepared)
    dataset.verify()
    tokenizer = Tokenizer(dataset.tokenizer, TOKENIZER.eod)
    texts = []
    for entry in dataset.manifest.shards:
        shard = dataset.read(entry)
        for start, stop in zip(shard.offsets[:-1], shard.offsets[1:], strict=True):
            assert shard.tokens[stop - 1] == dataset.eod
            texts.append(tokenizer.decode(shard.tokens[start : stop - 1].tolist()))
    assert sorted(texts) == sorted(path.read_text() for path in text.iterdir())
    assert dataset.documents("train") + dataset.documents("validation") == 60
    assert 4 <= dataset.documents("validation") <= 22


def test_the_entropy_is_that_of_the_training_tokens(prepared: Path) -> None:
    dataset = open_dataset(prepared)
    tokens = np.concatenate([dataset.read(entry).tokens for entry in dataset.entries("train")])
    share = np.unique(tokens, return_counts=True)[1] / len(tokens)
    assert dataset.unigram_entropy == pytest.approx(float(-(share * np.log(share)).sum()))
    assert 0 < dataset.unigram_entropy < math.log(300)
    assert dataset.manifest.unigram.tokens == dataset.tokens("train")


def test_preparing_again_reuses_and_leaves_no_leftovers(prepared: Path, data: DataConfig) -> None:
    before = contents(prepared)
    messages: list[str] = []
    assert prepare(data, prepared, lambda fraction, message: messages.append(message)) == prepared
    assert messages == [f"the data set in {prepared} is complete"]
    assert contents(prepared) == before
    assert set(before) == {"manifest.json", "tokenizer.json", "train-00000.arrow", "validation-00000.arrow"}


def test_progress_rises_and_other_tasks_give_the_same_bytes(
    prepared: Path, data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tokenize, "SMALLEST_GROUP_BYTES", 8000)
    told: list[float] = []
    prepare(data, tmp_path / "data", lambda fraction, message: told.append(fraction))
    assert told == sorted(told)
    assert told[-1] == 1.0
    assert len(told) > 5
    shards = {name: content for name, content in contents(tmp_path / "data").items() if name != "manifest.json"}
    assert shards == {name: content for name, content in contents(prepared).items() if name != "manifest.json"}
    assert "Running" not in capfd.readouterr().err


@pytest.mark.parametrize("group_bytes", [1, 3000, 10**9])
def test_task_groupings_do_not_change_the_shards(prepared: Path, text: Path, tmp_path: Path, group_bytes: int) -> None:
    job = Job(str(tmp_path), str(prepared / "tokenizer.json"), TOKENIZER.eod, "text", 0.2)
    parts: list[Part] = []
    for number, units in enumerate(group_units(resolve([str(text)]).units, group_bytes)):
        parts += tokenize_group(number, units, job)[0].parts
    compact(tmp_path, parts, 10**6, 0.2)
    for entry in open_dataset(prepared).manifest.shards:
        assert (tmp_path / entry.path).read_bytes() == (prepared / entry.path).read_bytes()


def test_an_unfinished_attempt_is_cleared(prepared: Path, data: DataConfig, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(prepared, folder)
    (folder / "manifest.json").unlink()
    (folder / "parts").mkdir()
    (folder / "parts" / "000000-train.arrow").write_text("half")
    (folder / "train-00007.arrow").write_text("stale")
    (folder / ".manifest.json.12.tmp").write_text("stale")
    prepare(data, folder)
    assert contents(folder) == contents(prepared)


def test_a_folder_of_something_else_is_refused(local_ray: None, data: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(DataError, match=r"holds no data set, but other files: thesis\.tex"):
        prepare(data, tmp_path)
    assert (tmp_path / "thesis.tex").exists()


def test_another_configuration_in_that_folder_is_refused(prepared: Path, data: DataConfig) -> None:
    changed = replace(data, validation_fraction=0.3, tokenizer=replace(TOKENIZER, vocab=280))
    with pytest.raises(ConfigError) as caught:
        prepare(changed, prepared)
    assert [problem.where for problem in caught.value.problems] == ["data.validation_fraction", "data.tokenizer"]
    assert "is 0.3, but" in caught.value.problems[0].what
    assert "another run_dir" in caught.value.problems[0].remedy


def test_ensure_dataset_in_a_run_and_by_path(prepared: Path, data: DataConfig) -> None:
    config = RunConfig(run_dir=str(prepared.parent), data=data)
    assert ensure_dataset(config) == prepared
    assert data_problems(config) == []
    given = RunConfig(run_dir="/nowhere", data=DataConfig(dataset=str(prepared)))
    assert ensure_dataset(given) == prepared
    small = given.replace(**{"model.vocab": 299})
    with pytest.raises(ConfigError, match=r"set model\.vocab to 300 or more"):
        ensure_dataset(small)
    assert [problem.remedy for problem in data_problems(small)] == ["set model.vocab to 300 or more"]


def test_another_tokenizer_is_refused(prepared: Path, tmp_path: Path) -> None:
    other = train_tokenizer(tmp_path / "tokenizer.json", ["entirely different text"] * 9, 280, TOKENIZER.eod)
    config = RunConfig(data=DataConfig(dataset=str(prepared), tokenizer=TokenizerConfig(path=str(other.path))))
    with pytest.raises(ConfigError, match="was tokenized with another tokenizer"):
        ensure_dataset(config)


def test_a_given_tokenizer_is_used(prepared: Path, data: DataConfig, tmp_path: Path) -> None:
    given = replace(data, tokenizer=TokenizerConfig(path=str(prepared / "tokenizer.json")))
    dataset = open_dataset(prepare(given, tmp_path / "data"))
    assert dataset.manifest.tokenizer_sha256 == open_dataset(prepared).manifest.tokenizer_sha256
    assert dataset.manifest.corpus_xxh3_128 == open_dataset(prepared).manifest.corpus_xxh3_128


def test_one_document_still_gives_a_validation_split(local_ray: None, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("call me whatever you like, reader. " * 400)
    data = DataConfig(sources=(f"{tmp_path}/book.txt",), validation_fraction=0.1, tokenizer=TOKENIZER)
    dataset = open_dataset(prepare(data, tmp_path / "data"))
    dataset.verify()
    total = dataset.tokens("train") + dataset.tokens("validation")
    assert dataset.tokens("validation") == int(0.1 * total)
    assert dataset.manifest.unigram.tokens == dataset.tokens("train")
    assert ShardStream(dataset, "validation", 8).samples_per_epoch > 0


def test_errors_inside_tasks_keep_their_words(prepared: Path, tmp_path: Path) -> None:
    tokenizer = TokenizerConfig(path=str(prepared / "tokenizer.json"))
    (tmp_path / "lines.jsonl").write_text(json.dumps({"text": "fine"}) + "\n" + json.dumps({"body": "?"}) + "\n")
    data = DataConfig(sources=(f"{tmp_path}/lines.jsonl",), tokenizer=tokenizer)
    with pytest.raises(
        DataError, match=r"lines\.jsonl: .* has no field 'text'; its fields: body\n    remedy: set data"
    ):
        prepare(data, tmp_path / "data")
    (tmp_path / "blank.txt").write_text(" \n")
    with pytest.raises(DataError, match="the files hold no text"):
        prepare(replace(data, sources=(f"{tmp_path}/blank.txt",)), tmp_path / "data")


def test_problems_are_told_before_anything_starts(tmp_path: Path) -> None:
    data = DataConfig(sources=(f"{tmp_path}/absent",), tokenizer=TokenizerConfig(vocab=100))
    wheres = [problem.where for problem in data_problems(RunConfig(run_dir=str(tmp_path), data=data))]
    assert wheres == ["data.sources", "data.tokenizer.vocab"]
    large = RunConfig(run_dir=str(tmp_path), data=DataConfig(tokenizer=TokenizerConfig(vocab=5000)))
    assert [problem.remedy for problem in data_problems(large)] == ["set model.vocab to 5000 or more"]
    missing = RunConfig(data=DataConfig(dataset=str(tmp_path)))
    assert "is no data set" in data_problems(missing)[0].what


def test_without_ray_it_says_so(data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(ClusterError, match="Ray is not initialised"):
        prepare(data, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_the_split_takes_its_share() -> None:
    share = np.mean([is_validation(one, 0.1) for one in range(20_000)])
    assert abs(share - 0.1) < 0.01
    assert not any(is_validation(one, 0.0) for one in range(100))
    kept = [one for one in range(1000) if is_validation(one, 0.1)]
    assert all(is_validation(one, 0.2) for one in kept)


def write_part(folder: Path, number: int, documents: list[list[int]], split: str = "train") -> Part:
    path = folder / f"part-{number}"
    flat = np.array([token for document in documents for token in document], np.uint16)
    offsets = offsets_of(np.array([len(document) for document in documents]))
    write_shard(path, flat, offsets, np.arange(len(documents), dtype=np.uint64) + 10 * number)
    return Part(str(path), split, len(documents), len(flat))  # type: ignore[arg-type]


def test_parts_are_joined_until_a_shard_is_full(tmp_path: Path) -> None:
    parts = [write_part(tmp_path, n, [[n, n, 0], [n, 0]]) for n in range(1, 6)]
    entries = compact(tmp_path, parts, shard_tokens=8, fraction=0.0)
    assert [(entry.path, entry.documents, entry.tokens) for entry in entries] == [
        ("train-00000.arrow", 4, 10),
        ("train-00001.arrow", 4, 10),
        ("train-00002.arrow", 2, 5),
    ]
    second = read_shard(tmp_path / "train-00001.arrow")
    assert second.tokens.tolist() == [3, 3, 0, 3, 0, 4, 4, 0, 4, 0]
    assert second.offsets.tolist() == [0, 3, 5, 8, 10]
    assert second.doc_ids.tolist() == [30, 31, 40, 41]
    assert len(list(tmp_path.iterdir())) == 3 + len(parts)


@pytest.mark.parametrize(
    ("fraction", "train", "validation"),
    [
        (0.3, [[1, 2, 3, 0], [4, 5, 6]], [[7, 8, 0]]),
        (0.2, [[1, 2, 3, 0], [4, 5, 6, 7]], [[8, 0]]),
        (0.9, [[1, 2, 3, 0], [4]], [[5, 6, 7, 8, 0]]),
        (0.05, [[1, 2, 3, 0], [4, 5, 6, 7, 8, 0]], []),
    ],
)
@pytest.mark.parametrize("fallen_to", ["train", "validation"])
def test_a_split_without_documents_is_cut_from_the_end(
    tmp_path: Path, fraction: float, train: list[list[int]], validation: list[list[int]], fallen_to: str
) -> None:
    part = write_part(tmp_path, 0, [[1, 2, 3, 0], [4, 5, 6, 7, 8, 0]], fallen_to)
    entries = compact(tmp_path, [part], shard_tokens=100, fraction=fraction)
    got: dict[str, list[list[int]]] = {"train": [], "validation": []}
    for entry in entries:
        shard = read_shard(tmp_path / entry.path)
        got[entry.split] = [part.tolist() for part in np.split(shard.tokens, shard.offsets[1:-1])]
    assert got == {"train": train, "validation": validation}


def test_a_cut_between_documents_divides_none(tmp_path: Path) -> None:
    part = write_part(tmp_path, 0, [[1, 0], [2, 0], [3, 0], [4, 0]])
    train, held_out = compact(tmp_path, [part], shard_tokens=100, fraction=0.5)
    assert (train.documents, train.tokens, held_out.documents, held_out.tokens) == (2, 4, 2, 4)
    assert read_shard(tmp_path / held_out.path).doc_ids.tolist() == [2, 3]
