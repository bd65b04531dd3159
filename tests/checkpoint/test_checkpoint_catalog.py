"""What is committed, what may be removed, and metadata that nobody should trust."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_cases import flip_bit
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from raytron.checkpoint import catalog, owner
from raytron.checkpoint.catalog import committed, find, newest_good, open_generation, prune, verify
from raytron.checkpoint.coverage import Box
from raytron.checkpoint.describe import describe, size_text
from raytron.checkpoint.files import digest_bytes, to_json
from raytron.checkpoint.record import (
    Chunk,
    FileRecord,
    Records,
    TensorRecord,
    dump_records,
    parse_commit,
    parse_loss,
    parse_records,
)
from raytron.errors import CheckpointError


def make(directory: Path, step: int) -> Path:
    """A committed generation with one shard of two tensors."""
    path = catalog.create(directory, step)
    data = bytes([step % 256]) * 64
    (path / "rank00000-000.safetensors").write_bytes(data)
    file = FileRecord("rank00000-000.safetensors", 64, digest_bytes(data))
    weight = TensorRecord(
        "F32", (2, 4), tuple(Chunk(Box((row, 0), (1, 4)), file.name, 8 + 16 * row) for row in range(2))
    )
    count = TensorRecord("I64", (), (Chunk(Box((), ()), file.name, 40),))
    records = Records({file.name: file}, {"weight": weight, "count": count, "none": TensorRecord("U8", (0,), ())})
    catalog.commit(path, step, 1, {"step": step}, records)
    return path


def shard(path: Path) -> Path:
    return path / "rank00000-000.safetensors"


def steps(directory: Path) -> list[int]:
    return [generation.step for generation in committed(directory)]


def test_generations_are_listed_newest_first(tmp_path: Path) -> None:
    for step in (3, 120_000_000, 20):
        make(tmp_path, step)
    again = make(tmp_path, 20)
    (tmp_path / "step-00000030-0a1b2c3d").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    assert steps(tmp_path) == [120_000_000, 20, 20, 3]
    assert committed(tmp_path)[1].path == again
    assert committed(tmp_path / "nothing") == []
    assert all(verify(generation) == generation.records for generation in committed(tmp_path))


def test_a_path_may_mean_a_generation_a_folder_or_a_run(tmp_path: Path) -> None:
    make(tmp_path / "checkpoints", 1)
    newest = make(tmp_path / "checkpoints", 2)
    assert find(newest).path == find(tmp_path / "checkpoints").path == find(tmp_path).path == newest
    renamed = newest.rename(tmp_path / "best")
    assert find(renamed).step == 2


def test_a_generation_is_not_committed_before_its_commit_file(tmp_path: Path) -> None:
    path = make(tmp_path, 1)
    (path / "COMMIT").rename(path / ".COMMIT.1")
    assert committed(tmp_path) == []
    with pytest.raises(CheckpointError, match="not committed"):
        open_generation(path)
    with pytest.raises(CheckpointError, match="no such directory"):
        open_generation(tmp_path / "nothing")


def test_retention_keeps_the_newest(tmp_path: Path) -> None:
    paths = [make(tmp_path, step) for step in range(5)]
    assert prune(tmp_path, None) == []
    assert prune(tmp_path, 7) == []
    assert sorted(prune(tmp_path, 2)) == paths[:3]
    assert steps(tmp_path) == [4, 3]
    with pytest.raises(ValueError, match="at least one"):
        prune(tmp_path, 0)


def test_retention_never_removes_the_newest_good_one(tmp_path: Path) -> None:
    paths = [make(tmp_path, step) for step in range(5)]
    for path in paths[2:]:
        flip_bit(shard(path))
    assert prune(tmp_path, 2) == [paths[0]]
    assert steps(tmp_path) == [4, 3, 2, 1]
    good = newest_good(tmp_path, lambda _path, _error: None)
    assert good is not None
    assert good.step == 1
    flip_bit(shard(paths[1]))
    assert prune(tmp_path, 1) == []
    assert newest_good(tmp_path) is None


def test_milestones_and_the_best_stay_although_they_are_old(tmp_path: Path) -> None:
    losses = {1: 3.0, 2: 2.0, 3: 2.5, 4: 2.0, 6: 2.9}
    for step in range(9):
        path = make(tmp_path, step)
        if step in losses:
            assert catalog.note_validation(path, losses[step])
    prune(tmp_path, 1, keep_every=3, keep_best=2)
    assert steps(tmp_path) == [8, 6, 4, 3, 2]
    assert [generation.validation_loss for generation in committed(tmp_path)] == [None, 2.9, 2.0, 2.5, 2.0]
    prune(tmp_path, 1, keep_best=1)
    assert steps(tmp_path) == [8, 4]


def test_a_validation_loss_is_optional_and_sealed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = [make(tmp_path, step) for step in range(3)]
    assert catalog.note_validation(paths[0], 2.0)
    assert catalog.note_validation(paths[0], 1.5)
    assert open_generation(paths[0]).validation_loss == 1.5
    assert not catalog.note_validation(paths[1], float("nan"))
    assert not catalog.note_validation(tmp_path / "gone", 1.0)
    flip_bit(paths[0] / "VALIDATION", 9)
    with pytest.raises(CheckpointError, match="VALIDATION"):
        _ = open_generation(paths[0]).validation_loss
    assert verify(open_generation(paths[0]))
    prune(tmp_path, 1, keep_best=1)
    assert steps(tmp_path) == [2]
    assert "VALIDATION" in caplog.text


def test_retention_judges_by_sizes_if_told(tmp_path: Path) -> None:
    paths = [make(tmp_path, step) for step in range(3)]
    flip_bit(shard(paths[2]))
    os.truncate(shard(paths[1]), 63)
    assert prune(tmp_path, 1, digests=False) == [paths[1], paths[0]]


def test_an_unreadable_commit_goes_once_it_is_old(tmp_path: Path) -> None:
    paths = [make(tmp_path, step) for step in range(4)]
    flip_bit(paths[0] / "COMMIT")
    flip_bit(paths[3] / "COMMIT")
    assert prune(tmp_path, 2) == [paths[0]]
    assert paths[3].exists()


def leftover(directory: Path, **changes: Any) -> Path:
    """An uncommitted generation of this process, or of another."""
    path = catalog.create(directory, 9)
    (path / "rank00001-000.safetensors").write_bytes(b"part")
    if changes:
        written = json.loads((path / owner.WRITING).read_bytes())
        (path / owner.WRITING).write_bytes(to_json({**written, **changes}))
    return path


def make_old(path: Path) -> None:
    for each in (*path.iterdir(), path):
        os.utime(each, (0, time.time() - 3 * 86400))


def test_leftovers_go_only_when_no_writer_can_own_them(tmp_path: Path) -> None:
    kept = make(tmp_path, 1)
    living = leftover(tmp_path)
    make_old(living)
    dead, reused = leftover(tmp_path, process=2**22 + 1), leftover(tmp_path, born="1")
    elsewhere, old_elsewhere = leftover(tmp_path, place="another node"), leftover(tmp_path, place="another node")
    unclaimed, given_up = leftover(tmp_path), leftover(tmp_path)
    make_old(old_elsewhere)
    (unclaimed / owner.WRITING).unlink()
    catalog.abandon(given_up)
    assert set(prune(tmp_path, 1)) == {dead, reused, old_elsewhere, given_up}
    assert set(tmp_path.iterdir()) == {kept, living, elsewhere, unclaimed}
    assert set(prune(tmp_path, 1, abandoned_after_s=0.0)) == {elsewhere, unclaimed}


def test_a_writer_that_died_leaves_a_leftover_that_goes(tmp_path: Path) -> None:
    script = f"import os; from raytron.checkpoint import catalog; catalog.create({str(tmp_path)!r}, 4); os._exit(9)"
    subprocess.run([sys.executable, "-c", script], check=False)
    assert len(list(tmp_path.iterdir())) == 1
    assert len(prune(tmp_path, 3)) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_link_is_neither_listed_nor_followed(tmp_path: Path) -> None:
    outside = make(tmp_path / "outside", 5)
    inside = tmp_path / "inside"
    make(inside, 1)
    (inside / "step-00000000-link").symlink_to(outside)
    assert steps(inside) == [1]
    assert prune(inside, 1) == []
    assert verify(open_generation(outside)).bytes == 40


def test_abandoned_generations_never_count_again(tmp_path: Path) -> None:
    path = make(tmp_path, 1)
    catalog.abandon(path)
    assert committed(tmp_path) == []
    assert prune(tmp_path, 1) == [path]


def test_catalog_and_description_need_no_torch() -> None:
    script = "import sys, raytron.checkpoint.catalog, raytron.checkpoint.describe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_sizes_are_for_people() -> None:
    assert [size_text(n) for n in (0, 1023, 1536, 3 << 30)] == ["0 B", "1023 B", "1.5 KiB", "3.0 GiB"]


# ---- metadata that nobody should trust


def reseal(path: Path, change: Callable[[dict[str, Any]], None], name: str = "metadata.json") -> None:
    """Change a generation's metadata (or COMMIT) and make every digest fit again, as a forger would."""
    body = json.loads((path / name).read_bytes())
    change(body)
    if name == "metadata.json":
        data = json.dumps(body).encode()
        (path / name).write_bytes(data)
        reseal(path, lambda c: c.update(metadata={"size": len(data), "digest": digest_bytes(data)}), "COMMIT")
    else:
        body.pop("seal", None)
        (path / name).write_bytes(canonical({**body, "seal": digest_bytes(canonical(body))}))


def canonical(body: object) -> bytes:
    """Canonical JSON that admits NaN."""
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "a/b", "..", ".", "", ".hidden", "a\0b", "a\\b/..", "x" * 300, 7, None]
)
def test_paths_may_not_leave_the_directory(tmp_path: Path, name: object) -> None:
    path = make(tmp_path, 1)
    (tmp_path / "secret").write_bytes(shard(path).read_bytes())
    reseal(path, lambda body: body["files"][0].update(name=name))
    with pytest.raises(CheckpointError, match="may leave the directory"):
        verify(open_generation(path))


@pytest.mark.parametrize("make_special", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_only_regular_files_are_opened(tmp_path: Path, make_special: Callable[[Path], None]) -> None:
    for name in ("rank00000-000.safetensors", "metadata.json", "COMMIT"):
        path = make(tmp_path, 1)
        (path / name).unlink()
        make_special(path / name)
        with pytest.raises(CheckpointError, match=name):
            verify(open_generation(path))


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (("tensors", "weight", "chunks", 1, "offsets"), [0, 0], "overlap"),
        (("tensors", "weight", "chunks", 1, "sizes"), [1, 3], "covered by nobody"),
        (("tensors", "weight", "chunks", 1, "offsets"), [2, 0], "outside the shape"),
        (("tensors", "weight", "chunks", 1, "start"), 56, "ends beyond"),
        (("tensors", "weight", "chunks", 1, "start"), -8, "no count"),
        (("tensors", "weight", "chunks", 1, "start"), True, "no count"),
        (("tensors", "weight", "chunks", 1, "file"), 1, "not listed"),
        (("tensors", "weight", "chunks"), [], "covered by nobody"),
        (("tensors", "weight", "shape"), [1 << 61, 4], "impossible shape"),
        (("tensors", "weight", "dtype"), "PICKLE", "unknown dtype"),
        (("tensors", "none", "shape"), [0, 1 << 61, 1 << 61], "impossible shape"),
        (("files",), [], "not listed"),
        (("files", 0, "digest"), "00", "no digest"),
    ],
)
def test_forged_metadata_is_refused(tmp_path: Path, where: tuple[Any, ...], value: object, message: str) -> None:
    path = make(tmp_path, 1)

    def change(body: Any) -> None:
        for key in where[:-1]:
            body = body[key]
        body[where[-1]] = value

    reseal(path, change)
    with pytest.raises(CheckpointError, match=message):
        verify(open_generation(path))


def test_a_small_file_can_not_pose_as_many_tensors(tmp_path: Path) -> None:
    path = make(tmp_path, 1)
    reseal(path, lambda body: body["tensors"].update({f"{i}": body["tensors"]["weight"] for i in range(9)}))
    with pytest.raises(CheckpointError, match="can't stand in"):
        verify(open_generation(path))


def test_another_version_is_named(tmp_path: Path) -> None:
    path = make(tmp_path, 1)
    reseal(path, lambda body: body.update(version=99), "COMMIT")
    with pytest.raises(CheckpointError, match="version 99"):
        open_generation(path)


def test_records_round_trip(tmp_path: Path) -> None:
    records = open_generation(make(tmp_path, 1)).records
    assert parse_records(tmp_path, dump_records(records)) == records


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("metadata.json"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to everything inside a JSON value."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    return [*([path] if path else []), *(p for key in keys for p in places(value[key], (*path, key)))]


def mutate(data: st.DataObject, body: dict[str, Any]) -> dict[str, Any]:
    """Replace or delete a few things anywhere in a JSON object."""
    body = copy.deepcopy(body)
    for _ in range(data.draw(st.integers(1, 3))):
        candidates = places(body)
        if not candidates:
            break
        *above, last = data.draw(st.sampled_from(candidates))
        inside: Any = body
        for key in above:
            inside = inside[key]
        if data.draw(st.booleans()):
            inside[last] = data.draw(JSON)
        else:
            del inside[last]
    return body


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), name=st.sampled_from(["metadata.json", "COMMIT"]))
def test_mutated_metadata_gives_no_other_error(tmp_path: Path, data: st.DataObject, name: str) -> None:
    found = committed(tmp_path)
    path = found[0].path if found else make(tmp_path, 1)
    kept = {each: (path / each).read_bytes() for each in ("COMMIT", "metadata.json")}
    body = mutate(data, json.loads(kept[name]))
    reseal(path, lambda whole: (whole.clear(), whole.update(body))[0], name)
    message = f"{path}: fine after all"
    try:
        verify(open_generation(path))
        describe(path)
    except CheckpointError as error:
        message = str(error)
    finally:
        for each, content in kept.items():
            (path / each).write_bytes(content)
    assert str(path) in message


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
@example(b"[" * 100_000)
@example(b'{"seal":' * 50_000)
@example(b'{"step": 1' + b"0" * 5000 + b"}")
@example(b'{"tensors": {"a": {"dtype": "F32", "shape": [1e999], "chunks": NaN}}, "files": []}')
@example(b"\xff\xfe{}")
def test_bytes_that_are_no_metadata(data: bytes) -> None:
    for parse in (parse_commit, parse_records, parse_loss):
        with pytest.raises(CheckpointError, match="some/where"):
            parse(Path("some/where"), data)


def test_another_text_of_the_same_number_is_damage(tmp_path: Path) -> None:
    commit = make(tmp_path, 1) / "COMMIT"
    data = commit.read_bytes()
    time = json.loads(data)["time"]
    commit.write_bytes(data.replace(repr(time).encode(), f"{time:.12f}".encode()))
    with pytest.raises(CheckpointError, match="seal"):
        open_generation(commit.parent)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 10_000), bit=st.integers(0, 7), name=st.sampled_from(["metadata.json", "COMMIT"]))
def test_every_flipped_bit_is_found(tmp_path: Path, at: int, bit: int, name: str) -> None:
    found = committed(tmp_path)
    path = found[0].path if found else make(tmp_path, 1)
    kept = (path / name).read_bytes()
    changed = bytearray(kept)
    changed[at % len(kept)] ^= 1 << bit
    (path / name).write_bytes(changed)
    try:
        with pytest.raises(CheckpointError, match=name):
            verify(open_generation(path))
    finally:
        (path / name).write_bytes(kept)
