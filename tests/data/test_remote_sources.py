"""Sources behind URLs: an S3 server and web servers of this machine, and fsspec's memory."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from raytron.config import DataConfig, TokenizerConfig
from raytron.data import corpus as corpus_module
from raytron.data import files as files_module
from raytron.data.corpus import resolve
from raytron.data.files import opened
from raytron.data.prepare import prepare
from raytron.data.records import Fields, Tally, records
from raytron.data.shards import open_dataset
from raytron.errors import ConfigError, DataError

TEXTS = [f"document {n} " * 20 for n in range(40)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_module, "WAITS_S", (0.01, 0.01, 0.01))


@pytest.fixture(scope="module")
def s3(s3_client: Any) -> Iterator[str]:
    """A bucket on a server of this machine."""
    s3_client.create_bucket(Bucket="texts")
    files_module._file_system.cache_clear()
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    yield "s3://texts"
    files_module._file_system.cache_clear()
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture(scope="module")
def gs(google_bucket: str) -> Iterator[str]:
    files_module._file_system.cache_clear()
    yield google_bucket
    files_module._file_system.cache_clear()


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder; `Ranges` knows ranges, this one gives only whole files."""

    failures = 0  # answers with "503" that are still to be given
    requests = 0

    def log_message(self, *_: object) -> None:
        pass

    def fails(self) -> bool:
        kind = type(self)
        kind.requests += 1
        if kind.failures:
            kind.failures -= 1
            self.send_error(503)
            return True
        return False

    def do_GET(self) -> None:
        if not self.fails():
            super().do_GET()

    def do_HEAD(self) -> None:
        if not self.fails():
            super().do_HEAD()


class Ranges(Handler):
    def do_GET(self) -> None:
        if self.fails():
            return
        path = Path(self.translate_path(self.path))
        asked = self.headers.get("Range")
        if asked is None or not path.is_file():
            SimpleHTTPRequestHandler.do_GET(self)
            return
        start, _, stop = asked.removeprefix("bytes=").partition("-")
        content = path.read_bytes()
        part = content[int(start) : int(stop) + 1 if stop else None]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{int(start) + len(part) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)


@pytest.fixture(params=[Handler, Ranges])
def web(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Path, type[Handler]]]:
    """The address of a web server, the folder that it serves, and its handler."""
    folder = tmp_path / "web"
    folder.mkdir()
    request.param.failures = request.param.requests = 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(request.param, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", folder, request.param
    server.shutdown()
    server.server_close()


def texts(*sources: str) -> list[str]:
    corpus = resolve(sources)
    return [record.text for unit in corpus.units for record in records(unit, corpus.fields, Tally())]


def fill(root: str) -> None:
    """Two files, and one that is hidden, below a place."""
    files = fsspec.filesystem(root.partition(":")[0])
    files.pipe_file(f"{root}/b/deep.jsonl", LINES.encode())
    files.pipe_file(f"{root}/a.txt", b"a text")
    files.pipe_file(f"{root}/.hidden.txt", b"hidden")
    table = pa.table({"text": TEXTS})
    with files.open(f"{root}/c.parquet", "wb") as file:
        parquet.write_table(table, file, row_group_size=10)
    with files.open(f"{root}/d.arrow", "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=10)


@pytest.mark.parametrize("kind", ["memory", "s3", "gs"])
def test_folders_globs_and_files(kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    root = "memory://texts/corpus" if kind == "memory" else f"{request.getfixturevalue(kind)}/corpus"
    fill(root)
    expected = ["a text", *TEXTS, *TEXTS, *TEXTS]
    assert texts(root) == expected
    assert texts(f"{root}/") == expected
    assert texts(f"{root}/*.txt", f"{root}/b/deep.jsonl") == ["a text", *TEXTS]
    monkeypatch.setattr(corpus_module, "UNIT_BYTES", 1000)
    assert texts(root) == expected
    with pytest.raises(ConfigError, match="absent does not exist"):
        resolve([f"{root}/absent"])


def test_a_changed_object_is_another_corpus(s3: str) -> None:
    files = fsspec.filesystem("s3")
    files.pipe_file(f"{s3}/stamp/a.txt", b"before")
    stamp = resolve([f"{s3}/stamp"]).stamp
    assert resolve([f"{s3}/stamp"]).stamp == stamp
    files.pipe_file(f"{s3}/stamp/a.txt", b"behind")
    assert resolve([f"{s3}/stamp"]).stamp != stamp


def test_web_files_with_and_without_ranges(
    web: tuple[str, Path, type[Handler]], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, folder, _ = web
    (folder / "a.jsonl").write_text(LINES)
    parquet.write_table(pa.table({"text": TEXTS}), folder / "b.parquet", row_group_size=10)
    monkeypatch.setattr(corpus_module, "UNIT_BYTES", 1000)
    assert texts(f"{address}/a.jsonl", f"{address}/b.parquet") == TEXTS * 2
    with opened(f"{address}/a.jsonl") as file:
        file.seek(100)
        assert file.read(50).decode() == LINES[100:150]


def test_a_web_server_that_stumbles_is_asked_again(web: tuple[str, Path, type[Handler]]) -> None:
    address, folder, handler = web
    (folder / "a.jsonl").write_text(LINES)
    handler.failures = 2
    assert texts(f"{address}/a.jsonl") == TEXTS
    assert handler.failures == 0


def test_a_web_server_that_is_not_there_is_named(
    web: tuple[str, Path, type[Handler]], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, folder, handler = web
    (folder / "a.jsonl").write_text(LINES)
    with pytest.raises(ConfigError, match=r"absent.txt does not exist"):
        resolve([f"{address}/absent.txt"])
    unit = resolve([f"{address}/a.jsonl"]).units[0]
    handler.failures = 10**6
    with pytest.raises(DataError, match=r"a\.jsonl: can't be reached: .*; asked 4 times in 0.03 s\n    remedy: look"):
        list(records(unit, Fields(), Tally()))
    with pytest.raises(ConfigError, match=r"nowhere.*can't be reached"):
        resolve(["http://127.0.0.1:9/nowhere.jsonl"])


def test_a_store_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(fsspec.get_filesystem_class("memory")):  # type: ignore[misc]
        asked = 0

        def info(self, path: str, **_: object) -> dict[str, object]:
            type(self).asked += 1
            raise ConnectionResetError("by peer")

        def isdir(self, path: str) -> bool:
            return False

    monkeypatch.setattr(files_module, "_file_system", lambda scheme: Silent(skip_instance_cache=True))
    with pytest.raises(
        ConfigError, match=r"memory://x: can't be reached: ConnectionResetError: by peer; asked 4 times"
    ):
        resolve(["memory://x"])
    assert Silent.asked == 4


def test_an_unknown_protocol_says_what_to_install() -> None:
    with pytest.raises(ConfigError, match=r"nowhere://: can't be used: .*\n.*install fsspec's client of nowhere"):
        resolve(["nowhere://bucket/a.txt"])


def test_a_data_set_is_built_from_the_web(
    local_ray: None, web: tuple[str, Path, type[Handler]], tmp_path: Path
) -> None:
    address, folder, _ = web
    (folder / "a.jsonl").write_text(LINES)
    data = DataConfig(
        sources=(f"{address}/a.jsonl",), validation_fraction=0.2, tokenizer=TokenizerConfig(vocab=280, train_mb=0.01)
    )
    dataset = open_dataset(prepare(data, tmp_path / "data"))
    assert dataset.documents("train") + dataset.documents("validation") == len(TEXTS)
