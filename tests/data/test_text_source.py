"""Text that is tokenized as it is read: the same samples whoever reads them, and the very ids of a tokenized data set."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from numpy.typing import NDArray

from raytron.cli import main
from raytron.config import RunConfig, load, to_yaml
from raytron.data import prepare, text_build, text_sources, tokenize
from raytron.data.batch import Batch
from raytron.data.check import data_problems
from raytron.data.ensure import ensure_data
from raytron.data.feed import RayDataStream
from raytron.data.prefetch import PrefetchStream
from raytron.data.run_data import RunData, open_run_data
from raytron.data.sample_page import describe_sample
from raytron.data.shards import Dataset, open_dataset
from raytron.data.text_index import OpenPart, open_text
from raytron.data.text_reader import TextReader
from raytron.data.tokenizer import Tokenizer, train_tokenizer
from raytron.errors import ConfigError, DataError

LENGTH = 48
WORDS = (
    "so", "it", "goes,", "and", "every", "word", "of", "a", "text", "–", "schön,", "naïve,", "東京", "is", "token",
    "of\na", "line",
)  # fmt: skip


def document(number: int) -> str:
    draw = random.Random(number)
    return f"{number}: " + " ".join(draw.choices(WORDS, k=draw.randint(1, 200 if number % 4 == 0 else 25)))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(path, map(document, range(200)), 400, "<|endoftext|>")
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents in every kind of file that is read in place: 0 to 39 in plain files, the others in three tables."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(40):
        mark = b"\xef\xbb\xbf" if number == 7 else b""
        (folder / f"a{number:02d}.txt").write_bytes(mark + document(number).encode())
    lines = [
        json.dumps({"text": document(number), "n": number}, ensure_ascii=number % 2 == 0) for number in range(40, 140)
    ]
    (folder / "b.jsonl").write_text("\n".join([*lines[:50], "", json.dumps({"text": None}), *lines[50:]]) + "\n")
    table = pa.table({"text": [*map(document, range(140, 200)), None, " "], "n": list(range(62))})
    parquet.write_table(table, folder / "c.parquet", row_group_size=17)
    with pa.OSFile(str(folder / "d.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        for start in range(200, 260, 25):
            texts = list(map(document, range(start, min(start + 25, 260))))
            writer.write_batch(pa.record_batch({"text": texts, "n": list(range(len(texts)))}))
    return folder


def configured(run_dir: Path, sources: Path | list[str], tokenizer: Path | str, **changes: Any) -> RunConfig:
    data = {
        "source": "text",
        "sources": [str(sources)] if isinstance(sources, Path) else sources,
        "tokenizer": {"path": str(tokenizer)},
        "validation_fraction": 0.2,
    }
    made = {"sequence_length": LENGTH, "seed": 3, "global_batch_size": 12, "model": {"vocab": 400}, "data": data}
    return load({**made, "run_dir": str(run_dir)}).replace(**changes)


def opened(config: RunConfig) -> RunData:
    return open_run_data(config, ensure_data(config))


@pytest.fixture(scope="module")
def config(corpus: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return configured(tmp_path_factory.mktemp("run"), corpus, tokenizer)


@pytest.fixture(scope="module")
def data(config: RunConfig) -> RunData:
    return opened(config)


@pytest.fixture(scope="module")
def prepared(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The same text, tokenized first, by tasks that run here."""

    def here(task: Any, groups: Any, **arguments: Any) -> Iterator[dict[str, Any]]:
        for number, units in enumerate(groups):
            batch = {"group": [number], "units": [json.dumps([astuple(unit) for unit in units])]}
            yield {name: column[0] for name, column in task(batch, **arguments).items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenize, "over_cluster", here)
        patch.setattr(prepare, "require_ray", lambda: None)
        settings = config.replace(**{"data.source": "tokens"}).data
        return open_dataset(prepare.prepare(settings, tmp_path_factory.mktemp("prepared") / "data"))


def equal(one: Batch, other: Batch) -> bool:
    pairs = zip(one, other, strict=True)
    return all((a is None and b is None) or np.array_equal(a, b) for a, b in pairs)  # type: ignore[arg-type]


def documents(dataset: Dataset, split: Any) -> dict[int, NDArray[Any]]:
    """The tokens of each document of a split by its id."""
    found = {}
    for entry in dataset.entries(split):
        shard = dataset.read(entry)
        parts = np.split(shard.tokens, shard.offsets[1:-1])
        found |= dict(zip(shard.doc_ids.tolist(), parts, strict=True))
    return found


# ---- the same for all


def test_batches_do_not_depend_on_who_reads_them_or_where_reading_begins(data: RunData, config: RunConfig) -> None:
    stream = data.train()
    size = stream.samples_per_epoch
    whole = stream.batch(0, 2 * size)
    for parts in (2, 3, 7):
        pieces = [
            open_run_data(config, data.sources[0].name).train().batch(0, 2 * size, part, parts) for part in range(parts)
        ]
        for field in ("ids", "tokens", "labels", "weights"):
            together = np.concatenate([getattr(piece, field) for piece in pieces])
            assert np.array_equal(together, getattr(whole, field))
    for first, count in ((5, 1), (size - 2, 4), (size, 7)):
        again = open_run_data(config, data.sources[0].name).train().batch(first, count)
        assert np.array_equal(again.tokens, whole.tokens[first : first + count])
    ahead = PrefetchStream(stream, 2, lambda first: 6)
    assert all(np.array_equal(ahead.batch(at, 6).tokens, whole.tokens[at : at + 6]) for at in (0, 6, 12, 0, 6))
    ahead.close()
    assert stream.batch(3, 0).tokens.shape == (0, LENGTH)


def test_each_epoch_reads_every_sample_once_in_an_order_of_its_own(data: RunData) -> None:
    stream = data.train()
    size = stream.samples_per_epoch
    assert size == data.sizes[0] > 50
    epochs = [Counter(map(bytes, stream.batch(at, size).tokens)) for at in (0, size)]
    assert epochs[0] == epochs[1]
    assert not np.array_equal(stream.batch(0, size).tokens, stream.batch(size, size).tokens)
    other = open_run_data(data.config.replace(seed=4), data.sources[0].name).train()
    assert not np.array_equal(other.batch(0, size).tokens, stream.batch(0, size).tokens)


def test_ray_datas_tasks_give_the_same_batches(local_ray: None, data: RunData) -> None:
    direct, stream = data.train(), RayDataStream(data, lambda first: 12, window=3)
    assert all(equal(stream.batch(at, 12), direct.batch(at, 12)) for at in (0, 12, 24))


# ---- as a tokenized data set


def test_documents_have_the_ids_the_tokens_and_the_split_that_a_data_set_gives_them(
    data: RunData, prepared: Dataset
) -> None:
    text = data.sources[0]
    for split in ("train", "validation"):
        reader, there = TextReader(text, split), documents(prepared, split)  # type: ignore[arg-type]
        found: dict[int, list[NDArray[Any]]] = {}
        whole = 0
        for window, tokens, lengths in reader.encoded(range(reader.size)):
            parts = np.split(tokens, np.cumsum(lengths)[:-1])
            for each, part in zip(window.slices, parts, strict=True):
                found.setdefault(each.document, []).append(part)
                if each.begin == 0 and each.ends:
                    assert np.array_equal(part, there[each.document])
                    whole += 1
        assert found.keys() == there.keys()
        assert whole > len(there) / 4
        decoder = Tokenizer(text.tokenizer, "<|endoftext|>")
        for number, parts in found.items():
            assert decoder.decode(np.concatenate(parts).tolist()) == decoder.decode(there[number].tolist())
            same = [np.array_equal(np.concatenate(parts), there[number]) for number, parts in found.items()]
        assert np.mean(same) > 0.9, "cuts keep to places that tokens keep to, too"


def test_with_one_byte_a_token_an_epoch_is_the_whole_corpus(config: RunConfig, corpus: Path, tmp_path: Path) -> None:
    data = opened(configured(tmp_path, corpus, "byte"))
    stream = data.train()
    batch = stream.batch(0, stream.samples_per_epoch)
    real = batch.weights.sum() + len(batch.ids)  # the first token of each is no label
    text = data.sources[0]
    assert real == data.tokens == text.tokens("train")
    assert real + text.tokens("validation") == sum(len(document(n).encode()) + 1 for n in range(260))
    assert real / batch.tokens.size > 0.9
    manifest = text.manifest  # type: ignore[union-attr]
    assert (set(manifest.worth), manifest.fill_for, manifest.cut) == ({1000}, 1.0, 0.0)


def test_samples_are_full_and_little_is_cut(data: RunData) -> None:
    reader = TextReader(data.sources[0], "train")  # type: ignore[arg-type]
    counts = np.array([len(each.tokens) for each in reader.encoded(range(reader.size))])
    assert np.minimum(counts, LENGTH + 1).mean() > 0.75 * (LENGTH + 1)
    assert np.maximum(counts - LENGTH - 1, 0).sum() < 0.03 * counts.sum()
    (notice,) = data.notices
    assert "% of a sample are tokens" in notice
    assert "tokens are cut off (measured on some samples)" in notice
    asked = data.config.replace(**{"data.text_fill": 0.4, "run_dir": f"{data.config.run_dir}/dense"})
    assert opened(asked).sizes[0] > 1.3 * data.sizes[0]


# ---- what a sample is


def test_padding_does_not_count_and_documents_are_kept_apart(config: RunConfig, tmp_path: Path) -> None:
    apart = opened(config.replace(**{"data.document_mask": True}))
    mixed = opened(config).train().batch(0, 40)
    batch = apart.train().batch(0, 40)
    assert np.array_equal(batch.tokens, mixed.tokens)
    assert mixed.documents is None
    assert batch.documents is not None
    eod = apart.sources[0].eod
    after_end = batch.tokens == eod
    assert (batch.weights[after_end] == 0).all(), "what follows the end of a document is another one, or padding"
    padded = (batch.tokens == eod) & (batch.labels == eod)
    assert padded.any()
    assert (mixed.weights[padded] == 0).all()
    ends = (np.diff(batch.documents, axis=1) > 0) & ~padded[:, 1:]
    assert ends.sum() > 20
    assert (batch.tokens[:, :-1][ends] == eod).all(), "a document that is cut ends with its sample"


def test_pad_gives_each_document_samples_of_its_own(config: RunConfig, tmp_path: Path) -> None:
    data = opened(config.replace(**{"data.packing": "pad", "run_dir": str(tmp_path)}))
    reader = TextReader(data.sources[0], "train", documents=True)  # type: ignore[arg-type]
    windows = [reader.window(number) for number in range(reader.size)]
    assert all(len(window.slices) == 1 for window in windows)
    assert {window.slices[0].document for window in windows if not window.slices[0].ends}, "long ones are cut"
    rows = reader.read(np.arange(reader.size))
    assert rows.documents is not None
    assert (rows.counts == (np.asarray(rows.documents) == 0)).all()


def test_middles_are_filled_in(config: RunConfig) -> None:
    names = {"data.fim.prefix": "!", "data.fim.middle": "?", "data.fim.suffix": "#"}
    changed = opened(config.replace(**{"data.fim.rate": 1.0, **names})).train().batch(0, 20)
    (mark,) = Tokenizer(config.data.tokenizer.path or "", "<|endoftext|>").encode("?")
    assert (changed.tokens == mark).any(axis=1).all()
    assert changed.tokens.shape == opened(config).train().batch(0, 20).tokens.shape


def test_a_validation_split_is_read_in_order(data: RunData) -> None:
    (held,) = data.validation()
    first = held.stream.batch(0, 4)
    assert np.array_equal(held.stream.batch(held.stream.samples_per_epoch, 4).tokens, first.tokens)
    reader = TextReader(data.sources[0], "validation")  # type: ignore[arg-type]
    assert np.array_equal(first.tokens[0], reader.read(np.array([0])).tokens[0, :-1])


def test_a_sample_is_shown_from_its_id_to_its_files(data: RunData, config: RunConfig) -> None:
    Path(config.run_dir, "config.yaml").write_text(to_yaml(config))
    kinds = set()
    for sample in range(0, 60, 3):
        page = describe_sample(config.run_dir, sample)
        assert f"sample {sample}, of step {sample // 12 + 1}\n" in page
        assert "tokenized now\n" in page
        kinds |= {kind for kind in (".txt, byte", "b.jsonl, byte", "c.parquet, row", "d.arrow, row") if kind in page}
    assert len(kinds) == 4


def test_the_index_is_shown_and_verified(data: RunData, config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    text = data.sources[0]
    assert main(["inspect", text.name, "--verify"]) == 0
    page = capsys.readouterr().out
    assert f"hash        {text.hash}\n" in page
    counts = [f"{text.documents(split):,}" for split in ("train", "validation")]
    assert [line.split()[2] for line in page.splitlines()[4:6]] == counts
    assert "files       43\n" in page
    assert page.endswith("the text of every sample is what was indexed\n")


# ---- the index


def test_an_index_is_used_again_and_made_anew_where_files_are_touched(
    config: RunConfig, corpus: Path, tmp_path: Path
) -> None:
    told: list[str] = []
    mine = tmp_path / "mine.jsonl"
    mine.write_text("\n".join(json.dumps({"text": document(number)}) for number in range(30)))
    config = config.replace(**{"data.sources": [str(mine)], "run_dir": str(tmp_path / "run")})
    folder = ensure_data(config)
    before = open_text(folder)
    ensure_data(config, lambda share, text: told.append(text))
    assert told == [f"the index of the text in {folder} is complete"]
    os.utime(mine, (1, 1))
    ensure_data(config, lambda share, text: told.append(text))
    assert told[-1] == "indexed 1 of 1 parts of the text"
    assert open_text(folder).hash == before.hash, "the text is the same"
    (part, *_) = sorted(folder.glob("train-*.arrow"))
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    assert open_text(ensure_data(config)).hash == before.hash
    assert bytes(content) != part.read_bytes()
    mine.write_text(mine.read_text().replace("0: ", "1: ", 1))
    assert open_text(ensure_data(config)).hash != before.hash
    for key, value in (("sequence_length", 40), ("data.validation_fraction", 0.3), ("data.packing", "pad")):
        assert open_text(ensure_data(config.replace(**{key: value}))).hash != before.hash


def test_much_text_is_indexed_by_tasks_just_as_here(
    local_ray: None, config: RunConfig, data: RunData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_build, "GROUP_BYTES", 8000)
    here = open_text(ensure_data(config.replace(run_dir=str(tmp_path / "here"))))
    monkeypatch.setattr(text_build, "HERE_BYTES", 0)
    there = open_text(ensure_data(config.replace(run_dir=str(tmp_path / "there"))))
    assert len(there.parts("train")) > 2
    assert there.manifest == here.manifest
    assert there.documents("train") == data.sources[0].documents("train")


def test_text_that_was_changed_is_not_trained_on(config: RunConfig, tmp_path: Path) -> None:
    for name in ("text.txt", "text.jsonl", "text.parquet"):
        mine = tmp_path / name
        texts = [document(number) for number in range(20)]

        def write(texts: list[str], mine: Path = mine) -> None:
            if mine.suffix == ".parquet":
                parquet.write_table(pa.table({"text": texts}), mine)
            else:
                mine.write_text(
                    "\n".join(json.dumps({"text": text}) if mine.suffix == ".jsonl" else text for text in texts)
                )

        write(texts)
        changes = {"data.sources": [str(mine)], "run_dir": str(tmp_path / f"run-{name}")}
        data = opened(config.replace(**changes, **{"data.validation_fraction": 1e-6}))
        whole = data.train().batch(0, data.sizes[0])
        write([*texts[:4], texts[4].replace("o", "0"), *texts[5:]])
        with pytest.raises(DataError, match=rf"{name}: is not as it was when its documents were indexed"):
            data.train().batch(0, data.sizes[0])
        write(texts)
        assert equal(data.train().batch(0, data.sizes[0]), whole)
        mine.unlink()
        with pytest.raises(DataError, match=rf"{name}: is not as it was .*\n.*begin a run"):
            data.train().batch(0, data.sizes[0])


# ---- other ways


def test_text_and_a_data_set_are_blended(config: RunConfig, prepared: Dataset, corpus: Path, tmp_path: Path) -> None:
    lines = str(corpus / "b.jsonl")
    blend = [{"dataset": str(prepared.path), "weight": 0.5}, {"sources": [lines], "weight": 0.5}]
    stages = [{"start_sample": 32, "weights": [0.25, 0.75]}]
    changes = {"data.source": "tokens", "data.sources": ["python-stdlib"], "data.blend": blend, "data.blend_block": 16}
    made = config.replace(**changes, **{"data.stages": stages, "run_dir": str(tmp_path)})
    assert data_problems(made) == []
    data = opened(made)
    stream = data.train()
    batch = stream.batch(0, 64)
    place = stream.order.locate(np.arange(64))  # type: ignore[attr-defined]
    assert np.bincount(place.source).tolist() == [16 + 8, 16 + 24]
    mine = place.source == 1
    reader = TextReader(data.sources[1], "train")  # type: ignore[arg-type]
    assert np.array_equal(batch.tokens[mine], reader.read(place.sample[mine]).tokens[:, :-1])
    assert [each.name for each in data.held] == ["data", "b.jsonl"]
    often = made.replace(**{"data.blend": [blend[0], {**blend[1], "max_epochs": 0.01}], "data.stages": []})
    with pytest.raises(ConfigError, match=r"data.blend\[1\].max_epochs: .*b.jsonl is read"):
        ensure_data(often)
    other = tmp_path / "other.json"
    train_tokenizer(other, ["other text"], 300, "<|endoftext|>")
    with pytest.raises(ConfigError, match=r"was tokenized with another tokenizer"):
        ensure_data(made.replace(**{"data.tokenizer.path": str(other)}))
    gone = made.replace(**{"data.blend": [blend[0], {"sources": ["nowhere"], "weight": 0.5}]})
    (problem,) = data_problems(gone)
    assert problem.where == "data.blend[1].sources"


def test_remote_text_is_read_by_exact_ranges(config: RunConfig, corpus: Path, tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    for name in ("a00.txt", "b.jsonl", "c.parquet"):
        store.pipe(f"/text/{name}", (corpus / name).read_bytes())
    far = ["memory://text/a00.txt", "memory://text/b.jsonl", "memory://text/c.parquet"]
    near = [str(corpus / name) for name in ("a00.txt", "b.jsonl", "c.parquet")]
    batches = []
    for name, sources in (("far", far), ("near", near)):
        data = opened(config.replace(**{"data.sources": sources, "run_dir": str(tmp_path / name)}))
        batches.append(data.train().batch(0, data.sizes[0]))
    assert equal(*batches)
    store.pipe("/text/d.arrow", (corpus / "d.arrow").read_bytes())
    with pytest.raises(ConfigError, match="remote Arrow file"):
        ensure_data(config.replace(**{"data.sources": ["memory://text/d.arrow"], "run_dir": str(tmp_path)}))


def test_a_tokenizer_is_trained_where_none_is_given(config: RunConfig, tmp_path: Path) -> None:
    made = config.replace(**{"data.tokenizer.path": None, "data.tokenizer.vocab": 300, "run_dir": str(tmp_path)})
    data = opened(made)
    assert data.train().batch(0, 4).tokens.max() < 300
    assert opened(made).sources[0].hash == data.sources[0].hash
    other = opened(made.replace(**{"data.tokenizer.vocab": 310}))
    assert (other.sources[0].vocab, other.sources[0].hash != data.sources[0].hash) == (310, True)


# ---- what goes wrong


def test_bad_records_are_named_or_counted(config: RunConfig, tmp_path: Path) -> None:
    mine = tmp_path / "bad.jsonl"
    lines = [json.dumps({"text": document(number)}) for number in range(20)]
    mine.write_text("\n".join([*lines[:9], '{"txt": 1}', "{no json", *lines[9:]]))
    made = config.replace(**{"data.sources": [str(mine)], "run_dir": str(tmp_path / "run")})
    with pytest.raises(
        DataError, match=r"bad.jsonl: the line at byte \d+ has no field 'text'.*\n.*on_bad_record to skip"
    ):
        ensure_data(made)
    skipped = opened(made.replace(**{"data.on_bad_record": "skip"}))
    assert "2 bad records left out, such as" in skipped.notices[0]
    mine.write_text("\n".join(lines))
    assert opened(made).sources[0].hash == skipped.sources[0].hash


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("broken.parquet", b"PAR1 and then nothing", r"broken.parquet can't be read"),
        ("broken.txt", b"caf\xe9 and \xff", r"broken.txt: is not UTF-8 text"),
        ("packed.jsonl.gz", b"x", r"packed: a document in it is found only .*\n.*unpack it, or .*data.source: tokens"),
        ("blank.txt", b" \n \n", r"no document: the files hold no text"),
        ("empty.txt", b"", r"no document: every file is empty"),
    ],
)
def test_files_that_cannot_be_read_in_place_are_named(
    config: RunConfig, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    made = config.replace(**{"data.sources": [str(tmp_path / name)], "run_dir": str(tmp_path / "run")})
    with pytest.raises((ConfigError, DataError), match=message):
        ensure_data(made)
    if not name.endswith("txt") or not content:
        assert message.split()[0] in str(data_problems(made)[0])


def test_a_row_group_that_is_too_large_is_refused(
    config: RunConfig, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_sources, "LARGEST_ROW_GROUP", 1000)
    table = parquet.read_table(corpus / "c.parquet")
    parquet.write_table(table, tmp_path / "large.parquet")
    made = config.replace(**{"data.sources": [str(tmp_path / "large.parquet")], "run_dir": str(tmp_path / "run")})
    (problem,) = data_problems(made)
    assert "row group" in problem.what
    assert "smaller" not in problem.remedy
    assert "data.source: tokens" in problem.remedy


def test_ids_beyond_the_model_are_refused_before_anything_is_read(config: RunConfig, tmp_path: Path) -> None:
    made = config.replace(**{"model.vocab": 350, "run_dir": str(tmp_path)})
    (problem,) = data_problems(made)
    assert problem.where == "data.tokenizer.path"
    assert "model.vocab to 400" in problem.remedy
    with pytest.raises(ConfigError, match=r"its token ids go up to 399, the model's only to 349"):
        ensure_data(made)


def test_a_damaged_part_and_another_tokenizer_are_named(data: RunData, config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "train-000000.arrow").write_bytes(b"no arrow")
    with pytest.raises(DataError, match="not a readable part of an index"):
        OpenPart(tmp_path / "train-000000.arrow")
    folder = ensure_data(config.replace(run_dir=str(tmp_path / "run")))
    train_tokenizer(folder / "tokenizer.json", ["other text"], 300, "<|endoftext|>")
    with pytest.raises(DataError, match="is not the tokenizer that the text was indexed with"):
        open_run_data(config, folder).train()
    index = folder / "index.json"
    index.write_text(index.read_text().replace('"fill_for": ', '"fill_for": 1'))
    with pytest.raises(DataError, match="was changed after it was written"):
        open_text(folder)
