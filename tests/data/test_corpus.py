from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytron.data import corpus as corpus_module
from raytron.data import records as records_module
from raytron.data.corpus import Corpus, resolve, sample
from raytron.data.records import Fields, documents
from raytron.errors import ConfigError, DataError


def read(corpus: Corpus) -> list[str]:
    return [text for unit in corpus.units for text in documents(unit, corpus.fields.key)]


def write_jsonl(path: Path, texts: list[str | None]) -> None:
    path.write_text("".join(json.dumps({"text": text, "n": 1}) + "\n" for text in texts))


def test_every_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("a text\n")
    write_jsonl(tmp_path / "c.jsonl", ["one", "", None, "two"])
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b'{"text": "packed"}\n\n'))
    parquet.write_table(pa.table({"text": ["row", None, " "], "n": [1, 2, 3]}), tmp_path / "e.parquet")
    (tmp_path / "a.bin").write_bytes(b"\xff")
    (tmp_path / ".hidden.txt").write_text("hidden")
    (tmp_path / "empty.txt").write_text("")
    corpus = resolve([str(tmp_path)])
    assert read(corpus) == ["a text\n", "one", "two", "packed", "row"]
    assert corpus.sources[0].files == 4


def test_sources_keep_their_order_and_globs_are_sorted(tmp_path: Path) -> None:
    for name in ("z.log", "y.log", "x.txt"):
        (tmp_path / name).write_text(name)
    assert read(resolve([f"{tmp_path}/x.txt", f"{tmp_path}/*.log"])) == ["x.txt", "y.log", "z.log"]


@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30), max_size=20),
    unit=st.integers(1, 200),
)
def test_cutting_a_file_in_units_changes_no_document(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], unit: int
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    write_jsonl(folder / "a.jsonl", ["first", *texts])
    (folder / "b.txt").write_text("first\n" + "\n".join(texts), encoding="utf-8", newline="")
    whole_lines = read(resolve([f"{folder}/a.jsonl"]))
    whole_text = (folder / "b.txt").read_bytes().decode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_module, "UNIT_BYTES", unit)
        assert read(resolve([f"{folder}/a.jsonl"])) == whole_lines
        for window in (8, 2**20):  # in which a line end is looked for
            patch.setattr(records_module, "WINDOW_BYTES", window)
            units = resolve([f"{folder}/b.txt"]).units
            cut = [found.text for one in units for found in records_module.READERS["text"](one, Fields())]
            assert "".join(cut) == whole_text


def test_parquet_is_cut_between_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"row {n} " * 20 for n in range(50)]
    parquet.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=7, compression="none")
    monkeypatch.setattr(corpus_module, "UNIT_BYTES", 2000)
    corpus = resolve([str(tmp_path)])
    assert len(corpus.units) > 2
    assert read(corpus) == texts


def test_the_corpus_ends_after_max_bytes(tmp_path: Path) -> None:
    lines = "".join(f"line {n:04d}\n" for n in range(1000))
    (tmp_path / "a.txt").write_text(lines)
    (tmp_path / "b.txt").write_text("never read")
    corpus = resolve([str(tmp_path)], max_bytes=2005)
    assert read(corpus) == [lines[:2010]]
    assert corpus.bytes == 2005


def test_the_standard_library_is_a_corpus() -> None:
    corpus = resolve(["python-stdlib"], max_bytes=2 * 2**20)
    assert all(unit.path.endswith(".py") and "site-packages" not in unit.path for unit in corpus.units)
    assert corpus.bytes == 2 * 2**20
    assert sum(map(len, read(corpus))) > 2**20
    assert resolve(["python-stdlib"]).bytes > 5 * 2**20


def test_a_sample_takes_from_many_files(tmp_path: Path) -> None:
    for n in range(6):
        (tmp_path / f"{n}.txt").write_text(str(n) * 2**20)
    taken = list(sample(resolve([str(tmp_path)]), 3 * 2**20, [4, 1, 3, 0, 2, 5]))
    assert [text[0] for text in taken] == ["4", "1", "3"]
    assert sum(map(len, taken)) == 3 * 2**20


def test_all_unusable_sources_are_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "bad.zst").write_bytes(b"x")
    (tmp_path / "folder").mkdir()
    sources = [f"{tmp_path}/absent", f"{tmp_path}/*.none", f"{tmp_path}/folder", f"{tmp_path}/bad.zst"]
    with pytest.raises(ConfigError) as caught:
        resolve(sources)
    whats = [problem.what for problem in caught.value.problems]
    assert "absent does not exist" in whats[0]
    assert "*.none has no file to read" in whats[1]
    assert "folder has no file to read" in whats[2]
    assert "bad.zst is packed" in whats[3]
    assert all(problem.remedy for problem in caught.value.problems)


def test_empty_files_are_no_corpus(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ConfigError, match="no document"):
        resolve([str(tmp_path)])


def test_a_missing_column_names_those_that_there_are(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"body": ["a"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"has no column 'text'\n.*use one of its columns: body, n"):
        resolve([str(tmp_path)])
    with pytest.raises(ConfigError, match=r"column 'n' of .* is int64"):
        resolve([str(tmp_path)], text_key="n")
    assert read(resolve([str(tmp_path)], text_key="body")) == ["a"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"body": "x"}', "the line at byte 16 has no field 'text'; its fields: body"),
        ("[1]", "has no field 'text'; its fields: none"),
        ('{"text": 3}', "field 'text' is int, not text"),
        ('{"text": ', "the line at byte 16 is not JSON"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text":"fine"}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        read(resolve([str(path)]))


def test_broken_text_is_named_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(DataError, match=r"a\.txt: is not UTF-8 text: byte 0xe9, 3 bytes after 0"):
        read(resolve([str(tmp_path)]))


def test_a_cut_gzip_file_is_named(tmp_path: Path) -> None:
    packed = gzip.compress(b'{"text": "packed"}\n' * 100)
    (tmp_path / "a.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: can't be read"):
        read(resolve([str(tmp_path)]))
