"""Checkpoints in object stores: fsspec's memory and file, and a local server that speaks S3."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import share, tensors, wrong

from raytron.checkpoint import catalog, checkpointer, owner
from raytron.checkpoint.catalog import committed, find, newest_good, open_generation, prune, verify
from raytron.checkpoint.describe import describe
from raytron.checkpoint.files import opened, storage_of
from raytron.checkpoint.object_store import ObjectStore, object_store
from raytron.checkpoint.storage import key_of, scheme_of, url_of
from raytron.checkpoint.whole import read_whole
from raytron.errors import CheckpointError
from raytron.parallel.layout import Slice


@pytest.fixture(scope="module")
def s3(s3_client: Any) -> Iterator[str]:
    """A bucket on a server of this machine."""
    s3_client.create_bucket(Bucket="runs")
    object_store.cache_clear()
    yield "s3://runs"
    object_store.cache_clear()


@pytest.fixture(scope="module")
def gs(google_bucket: str) -> Iterator[str]:
    object_store.cache_clear()
    yield google_bucket
    object_store.cache_clear()


@pytest.fixture(params=["memory", "file", "s3", "gs"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """An empty folder of each kind of store."""
    roots = {"memory": "memory://store", "file": f"file://{tmp_path}"}
    root = roots.get(request.param) or request.getfixturevalue(request.param)
    return Path(f"{root}/{tmp_path.name}/checkpoints")


def save(place: Path, step: int, seed: int = 0) -> Path:
    return checkpointer.save(place, step, share(tensors(seed), 1, 0), {"step": step})


def damage(path: Path) -> None:
    """Flips a bit of an object."""
    files: Any = storage_of(path).files  # type: ignore[attr-defined]
    data = bytearray(files.cat_file(key_of(path)))
    data[-5] ^= 1
    files.pipe_file(key_of(path), bytes(data))


@pytest.mark.parametrize(
    ("text", "scheme", "key", "url"),
    [
        ("s3://bucket/a/b", "s3", "bucket/a/b", "s3://bucket/a/b"),
        ("file:///tmp/a", "file", "/tmp/a", "file:///tmp/a"),
        ("/tmp/s3:/a", None, "", "/tmp/s3:/a"),
        ("relative/a", None, "", "relative/a"),
        ("c:/windows", None, "", "c:/windows"),
    ],
)
def test_a_path_tells_where_it_is(text: str, scheme: str | None, key: str, url: str) -> None:
    path = Path(text)
    assert (scheme_of(path), url_of(path)) == (scheme, url)
    assert scheme is None or key_of(path / "x") == f"{key}/x"
    assert scheme_of(path / "x") == scheme_of((path / "x").parent) == scheme


def test_an_unknown_protocol_says_what_to_install() -> None:
    with pytest.raises(CheckpointError, match="nowhere:// can't be used"):
        newest_good("nowhere://bucket")


def test_saved_listed_verified_and_loaded(place: Path) -> None:
    assert committed(place) == []
    paths = [save(place, step, seed=step) for step in (1, 2)]
    assert [generation.path for generation in committed(place)] == paths[::-1]
    assert find(place).path == find(paths[1]).path == paths[1]
    held = share(tensors(2), 1, 0, blank=True)
    assert checkpointer.load(paths[1], held) == {"step": 2}
    assert wrong(tensors(2), held) == []
    assert torch.equal(read_whole(paths[0])["gate_up"], tensors(1)["model.gate_up"])
    assert "digests verified" in describe(place, verify=True)
    names = set(storage_of(paths[0]).sizes(paths[0]))
    assert names == {"COMMIT", "metadata.json", "rank00000-000.safetensors"}


def test_a_rectangle_is_read_by_its_bytes(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(place, 1)
    read: list[int] = []
    source = type(opened(path / "COMMIT").__enter__())
    plain = source.read_into

    def counted(self: Any, view: memoryview, start: int) -> None:
        read.append(len(view))
        plain(self, view, start)

    monkeypatch.setattr(source, "read_into", counted)
    monkeypatch.setattr("raytron.checkpoint.store.check_file", lambda *_: None)
    generation = open_generation(path)
    assert generation.records
    read.clear()
    target = torch.zeros(3, 10)
    checkpointer.load(generation, {"model.layers.0.weight": Slice((12, 10), (3, 0), target)}, partial=True)
    assert torch.equal(target, tensors()["model.layers.0.weight"][3:6])
    assert [count for count in read if count == target.nbytes] == [target.nbytes]


def test_damage_is_found_and_passed_over(place: Path) -> None:
    good, bad = save(place, 1), save(place, 2)
    damage(bad / "rank00000-000.safetensors")
    with pytest.raises(CheckpointError, match=r"rank00000-000\.safetensors: damaged"):
        verify(open_generation(bad))
    found = newest_good(place, lambda _path, _error: None)
    assert found is not None
    assert found.path == good
    storage_of(bad).remove(bad / "rank00000-000.safetensors")
    with pytest.raises(CheckpointError, match=r"rank00000-000\.safetensors: can't be read"):
        checkpointer.load(bad, share(tensors(), 1, 0, blank=True))
    damage(bad / "COMMIT")
    assert [generation.path for generation in committed(place, lambda _path, _error: None)] == [good]


def test_retention_and_leftovers(place: Path) -> None:
    paths = [save(place, step) for step in range(4)]
    assert catalog.note_validation(paths[1], 1.0)
    writing, given_up = catalog.create(place, 8), catalog.create(place, 9)
    catalog.abandon(given_up)
    catalog.abandon(paths[3])
    assert set(prune(place, 1, keep_best=1)) == {paths[0], paths[3], given_up}
    assert [generation.step for generation in committed(place)] == [2, 1]
    assert storage_of(place).folders(place) == sorted([paths[1], paths[2], writing])
    assert not owner.is_ownerless(writing, 0.0)


def test_a_failed_save_leaves_nothing(place: Path) -> None:
    good = save(place, 1)

    def fail(phase: str) -> None:
        if phase == "publish":
            raise OSError(5, "Input/output error", "the-store")

    with pytest.raises(CheckpointError, match="the-store: Input/output error"):
        checkpointer.save(place, 2, share(tensors(), 1, 0), {}, hook=fail)
    assert storage_of(place).folders(place) == [good]


def test_what_is_there_is_not_published_again(place: Path) -> None:
    if scheme_of(place) == "gs":
        pytest.skip("the emulator takes no heed of ifGenerationMatch, by which gcsfs asks for this")
    path = save(place, 1)
    storage = storage_of(path)
    with pytest.raises(FileExistsError):
        storage.publish(path / "COMMIT", b"another")
    with pytest.raises(FileExistsError):
        storage.write(path / "metadata.json", [memoryview(b"another")])
    assert verify(open_generation(path))


def test_an_answer_that_was_lost_is_no_conflict(s3: str) -> None:
    storage, path = storage_of(Path(s3)), Path(s3) / "lost" / "COMMIT"
    storage.publish(path, b"content")
    storage.publish(path, b"content")


class Plain:
    """A store that knows no conditions, and fails in its own way."""

    def __init__(self) -> None:
        self.put: dict[str, bytes] = {}

    def pipe_file(self, key: str, data: bytes) -> None:
        self.put[key] = data

    def exists(self, key: str) -> bool:
        raise RuntimeError("no connection")


def test_a_store_without_conditions_is_simply_written() -> None:
    files = Plain()
    ObjectStore(files).publish(Path("s3://bucket/a"), b"content")
    assert files.put == {"bucket/a": b"content"}
    with pytest.raises(OSError, match="no connection"):
        ObjectStore(files).exists(Path("s3://bucket/a"))
