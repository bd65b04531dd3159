"""Records of every kind of file, and what becomes of the bad ones."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from raytron.data import corpus as corpus_module
from raytron.data import records as records_module
from raytron.data.corpus import Corpus, resolve
from raytron.data.records import Fields, Record, Tally, records
from raytron.errors import ConfigError, DataError

TEXTS = ["one", "two 2", "drei ä€😀", "four"]
LINES = "".join(json.dumps({"text": text, "url": f"u{n}", "n": n}) + "\n" for n, text in enumerate(TEXTS)).encode()


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return bytes(sink.getvalue())


def table(**columns: object) -> pa.Table:
    return pa.table({"text": TEXTS, "url": ["u0", "u1", "u2", "u3"], "n": [0, 1, 2, 3], **columns})


def write_arrow(path: Path, rows: pa.Table, stream: bool = False, batch: int = 2) -> None:
    new = pa.ipc.new_stream if stream else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as sink, new(sink, rows.schema) as writer:
        writer.write_table(rows, max_chunksize=batch)


def read(corpus: Corpus, fields: Fields | None = None) -> list[Record]:
    return [record for unit in corpus.units for record in records(unit, fields or corpus.fields, Tally())]


def make(folder: Path, name: str) -> Path:
    path = folder / name
    if name.endswith("parquet"):
        parquet.write_table(table(), path, row_group_size=2)
    elif "arrow" in name:
        write_arrow(path, table(), stream="stream" in name)
    else:
        pack = {"gz": gzip.compress, "zst": zstd}.get(name.split(".")[-1], bytes)
        path.write_bytes(pack(LINES))
    return path


KINDS = ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.arrow", "stream.arrow"]


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_gives_text_and_metadata(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = Fields(metadata_keys=("url", "n"))
    path = make(tmp_path, name)
    found = read(resolve([str(path)], fields=fields))
    assert [record.text for record in found] == TEXTS
    assert [json.loads(record.metadata or "") for record in found] == [{"url": f"u{n}", "n": n} for n in range(4)]
    monkeypatch.setattr(corpus_module, "UNIT_BYTES", 1)
    monkeypatch.setattr(records_module, "ROWS_BYTES", 1)
    again = read(resolve([str(path)], fields=fields))
    assert [record[:2] for record in again] == [record[:2] for record in found]
    if name.endswith(("parquet", "arrow")):
        assert [record.at for record in found] == [0, 1, 2, 3], "the rows of one unit"
    assert len(resolve([str(path)], fields=fields).units) >= (1 if "gz" in name or "zst" in name else 2)


def test_packed_files_of_several_streams(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES) + gzip.compress(LINES))
    (tmp_path / "b.jsonl.zst").write_bytes(zstd(LINES) + zstd(LINES))
    assert [record.text for record in read(resolve([str(tmp_path)]))] == TEXTS * 4


def test_a_data_set_that_was_saved_is_read_in_its_order(tmp_path: Path) -> None:
    """As `datasets.Dataset.save_to_disk` writes: Arrow streams, listed in state.json, beside caches that are not."""
    folder = tmp_path / "train"
    folder.mkdir()
    names = ["data-00001-of-00002.arrow", "data-00000-of-00002.arrow"]
    for name, row in zip(names, (0, 2), strict=True):
        write_arrow(folder / name, table().slice(row, 2), stream=True)
    write_arrow(folder / "cache-0123.arrow", table(), stream=True)
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    assert [record.text for record in read(resolve([str(folder)]))] == TEXTS
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ConfigError, match=r"holds the splits train, test of a data set\n.*name one of them.*/train"):
        resolve([str(tmp_path)])
    (folder / names[1]).unlink()
    with pytest.raises(ConfigError, match=r"lacks data-00000-of-00002\.arrow, which its state\.json lists"):
        resolve([str(folder)])


BAD = {
    "not JSON": b"{half\n",
    "no field": b'{"body": "x"}\n',
    "not text": b'{"text": 3}\n',
    "not UTF-8": b'{"text": "caf\xe9"}\n',
    "half a surrogate pair": b'{"text": "\\ud800"}\n',
    "may have": b'{"text": "' + b"x" * 3000 + b'"}\n',
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("packed", [False, True])
def test_a_bad_line_stops_or_is_counted(
    tmp_path: Path, name: str, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records_module, "LONGEST_RECORD", 2000)
    monkeypatch.setattr(records_module, "WINDOW_BYTES", 256)
    path = tmp_path / ("a.jsonl.gz" if packed else "a.jsonl")
    content = LINES + BAD[name] + LINES
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(DataError, match=rf"{name}[\s\S]*remedy: .*; or set data.on_bad_record to skip"):
        read(resolve([str(path)]))
    tally = Tally()
    units = resolve([str(path)]).units
    found = [one.text for unit in units for one in records(unit, Fields(on_bad_record="skip"), tally)]
    assert found == TEXTS * 2
    assert tally.bad == 1
    assert name in tally.examples[0]
    assert str(path) in tally.examples[0]


def test_only_the_first_bad_records_are_kept_as_examples(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"{\n" * 20 + LINES)
    tally = Tally()
    list(records(resolve([str(tmp_path)]).units[0], Fields(on_bad_record="skip"), tally))
    assert (tally.bad, len(tally.examples)) == (20, records_module.SHOWN_BAD)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_bad_row_stops_or_is_counted(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records_module, "LONGEST_RECORD", 100)
    broken = pa.array([b"one", b"caf\xe9", b"y" * 200, b"four"], pa.binary()).view(pa.string())
    rows = pa.table({"text": broken})
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        parquet.write_table(rows, path)
    else:
        write_arrow(path, rows, batch=4)
    with pytest.raises(DataError, match=r"row 1 of .* is not UTF-8 text"):
        read(resolve([str(path)]))
    tally = Tally()
    found = [one.text for one in records(resolve([str(path)]).units[0], Fields(on_bad_record="skip"), tally)]
    assert found == ["one", "four"]
    assert tally.bad == 2


def test_a_broken_text_file_is_one_bad_record(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.txt").write_bytes(b"fine")
    tally = Tally()
    units = resolve([str(tmp_path)]).units
    found = [one.text for unit in units for one in records(unit, Fields(on_bad_record="skip"), tally)]
    assert (found, tally.bad) == (["fine"], 1)


@pytest.mark.parametrize("name", KINDS[1:])
@pytest.mark.parametrize("on_bad_record", ["stop", "skip"])
def test_a_file_that_was_cut_off_always_stops(tmp_path: Path, name: str, on_bad_record: str) -> None:
    path = make(tmp_path, name)
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises((DataError, ConfigError), match=r"can't be read"):
        read(resolve([str(path)]), Fields(on_bad_record=on_bad_record))


def test_a_gzip_file_with_a_flipped_bit_stops(tmp_path: Path) -> None:
    packed = bytearray(gzip.compress(LINES * 50))
    packed[len(packed) // 2] ^= 16
    (tmp_path / "a.jsonl.gz").write_bytes(packed)
    with pytest.raises(DataError, match=r"a\.jsonl\.gz"):
        read(resolve([str(tmp_path)]), Fields(on_bad_record="stop"))


def test_metadata_needs_fields(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    parquet.write_table(table(), tmp_path / "b.parquet")
    with pytest.raises(ConfigError) as caught:
        resolve([str(tmp_path)], fields=Fields(metadata_keys=("url", "date")))
    assert [problem.where for problem in caught.value.problems] == ["data.metadata_keys"] * 2
    assert "a.txt is plain text" in caught.value.problems[0].what
    assert "has no column 'date'" in caught.value.problems[1].what


def test_a_line_without_a_kept_field_simply_lacks_it(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "url": null}\n{"text": "b"}\n')
    found = read(resolve([str(tmp_path)], fields=Fields(metadata_keys=("url",))))
    assert [record.metadata for record in found] == ['{"url": null}', "{}"]
