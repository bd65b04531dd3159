"""Segments in memory: whole or not there, newest first, and every damage is seen."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raytron.checkpoint import gather, segment
from raytron.checkpoint.coverage import Box
from raytron.checkpoint.folder import memory_folder
from raytron.checkpoint.gather import Window, read_windows
from raytron.checkpoint.memory import NOTES_ROOM, Replicas, segment_name
from raytron.checkpoint.segment import Inventory, Origin, Part, SegmentFile, read_segment
from raytron.checkpoint.sources import choose, survey
from raytron.errors import CheckpointError
from raytron.parallel.layout import Slice


class Died(Exception):
    """What stands for the death of a writer."""


def die() -> None:
    raise Died


def state(value: float) -> dict[str, Slice]:
    return {
        "a": Slice((4, 6), (0, 0), torch.full((4, 6), value)),
        "b": Slice((5,), (0,), torch.full((5,), value, dtype=torch.bfloat16)),
        "scalar": Slice((), (), torch.tensor(value, dtype=torch.float64)),
        "empty": Slice((0, 3), (0, 0), torch.empty(0, 3)),
        "strided": Slice((3, 4), (0, 0), torch.full((3, 8), value)[:, ::2]),
    }


def fill(held: dict[str, Slice], value: float) -> None:
    for piece in held.values():
        piece.tensor.fill_(value)


def facts(step: int) -> dict[str, Any]:
    return {"step": step, "note": "x" * step}


def written(folder: Path, steps: int, *, epoch: int = 1, hook: Any = lambda phase: None) -> dict[str, Slice]:
    """A state that was 1, 2, … and went into a segment at each step."""
    held = state(0.0)
    replicas = Replicas(folder, epoch, held, facts(0), mesh="tp1", hook=hook)
    for step in range(1, steps + 1):
        fill(held, float(step))
        replicas.before_update()
        replicas.write(step, facts(step))
        replicas.wait()
    replicas.close()
    return held


def restored(folder: Path, **how: Any) -> tuple[int, float]:
    """The step that is chosen, and the value that it brings, the same in all tensors."""
    generation = choose(survey(folder, "here").held, **how).generation
    assert generation is not None
    held = state(-1.0)
    told = gather.load(held, generation, "here")
    assert told == facts(generation.step)
    values = {value for piece in held.values() for value in piece.tensor.double().flatten().tolist()}
    assert len(values) == 1
    return generation.step, values.pop()


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def test_the_newest_step_comes_back(tmp_path):
    written(tmp_path, 5)
    assert restored(tmp_path) == (5, 5.0)
    assert restored(tmp_path, up_to=4) == (4, 4.0)
    assert choose(survey(tmp_path, "here").held, up_to=3).generation is None
    assert len(list(tmp_path.glob("*.segment"))) == 2


@pytest.mark.parametrize("phase", ["replicate", "replicated"])
def test_whoever_dies_while_it_writes_leaves_the_step_before(tmp_path, phase):
    seen = []

    def die(at: str) -> None:
        seen.append(at)
        if at == phase and seen.count(phase) == 5:
            raise Died

    with pytest.raises(Died):
        written(tmp_path, 5, hook=die)
    assert restored(tmp_path) == (4, 4.0)
    if phase == "replicated":
        (reason,) = survey(tmp_path, "here").passed_over
        assert "not complete" in reason


@pytest.mark.parametrize("part", ["table", "facts", "data", "truncated", "empty", "zeroed page", "link"])
def test_damage_is_named_and_the_older_buffer_taken(tmp_path, part):
    written(tmp_path, 4)
    newest = tmp_path / segment_name(1, 0, 1)
    head = read_segment(newest)
    assert head.step == 4
    if part == "truncated":
        os.truncate(newest, head.size - 1)
    elif part == "empty":
        os.truncate(newest, 0)
    elif part == "link":
        newest.rename(tmp_path / "elsewhere")
        newest.symlink_to(tmp_path / "elsewhere")
    elif part == "zeroed page":
        data = bytearray(newest.read_bytes())
        data[head.data[0] :] = bytes(head.data[1])
        newest.write_bytes(data)
    else:
        flip(newest, {"table": 80, "facts": newest.read_bytes().index(b'"note"') + 3, "data": head.data[0] + 3}[part])
    (reason,) = survey(tmp_path, "node 7").passed_over
    assert reason.startswith(f"node 7: {newest}: ")
    assert restored(tmp_path) == (3, 3.0)


def test_nothing_good_is_none(tmp_path):
    written(tmp_path, 2)
    for path in tmp_path.glob("*.segment"):
        flip(path, read_segment(path).data[0])
    found = survey(tmp_path, "here")
    assert len(found.passed_over) == 2
    assert choose(found.held) == (None, [])
    assert survey(tmp_path / "nowhere", "here") == ([], [])


def test_a_later_epoch_wins_at_the_same_step_and_epochs_are_not_mixed(tmp_path):
    written(tmp_path, 4, epoch=1)
    written(tmp_path, 3, epoch=2)
    assert restored(tmp_path) == (4, 4.0)
    generation = choose(survey(tmp_path, "here").held, up_to=3).generation
    assert generation is not None
    assert generation.epoch == 2


def test_what_is_chosen_and_then_written_again_is_refused_and_nothing_changes(tmp_path):
    written(tmp_path, 2)
    generation = choose(survey(tmp_path, "here").held).generation
    assert generation is not None
    written(tmp_path, 4)
    held = state(-1.0)
    with pytest.raises(CheckpointError, match="written again since"):
        gather.load(held, generation, "here")
    assert all(bool((piece.tensor == -1).all()) for piece in held.values())


def test_another_model_is_refused(tmp_path):
    written(tmp_path, 1)
    generation = choose(survey(tmp_path, "here").held).generation
    assert generation is not None
    wrong = state(-1.0) | {"a": Slice((4, 7), (0, 0), torch.zeros(4, 7))}
    with pytest.raises(CheckpointError, match=r"a: its shape is \(4, 6\)"):
        gather.load(wrong, generation, "here")


def test_a_missing_tensor_is_missed(tmp_path):
    """A rank's part is whole in itself: only the inventory tells that another rank held more."""
    whole = Inventory.of({"a": ("F32", (2,)), "b": ("F32", (2,))})
    file = SegmentFile(
        tmp_path / segment_name(1, 0, 0), Origin(1, 0, 2, "pp2", whole), [Part("a", "F32", (2,), Box((0,), (2,)))], 99
    )
    file.publish(1, {})
    generation, (reason,) = choose(survey(tmp_path, "here").held)
    assert generation is None
    assert "1 of 2 tensors are nowhere; nothing is there of rank 1" in reason


def test_ranks_that_disagree_about_the_facts_make_no_generation(tmp_path):
    whole = Inventory.of({"a": ("F32", (2,))})
    for rank in range(2):
        part = Part("a", "F32", (2,), Box((rank,), (1,)))
        SegmentFile(tmp_path / segment_name(1, rank, 0), Origin(1, rank, 2, "dp2", whole), [part], 99).publish(
            1, {"consumed": rank}
        )
    generation, (reason,) = choose(survey(tmp_path, "here").held)
    assert generation is None
    assert "do not tell of the same state" in reason


def test_a_full_memory_is_an_error_with_a_remedy(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(CheckpointError, match=r"no room for \d+ bytes(?s:.*)remedy: .*recovery.memory_every"):
        Replicas(tmp_path, 1, state(0.0), {})
    assert list(tmp_path.glob("*.segment")) == []


@pytest.mark.parametrize("note", ["x" * 300_000, float("nan"), object()])
def test_facts_that_can_not_be_written_cost_no_more_than_a_segment(tmp_path, caplog, note):
    replicas = Replicas(tmp_path, 1, state(0.0), {})
    replicas.write(1, facts(1))
    replicas.write(2, {"note": note})
    replicas.wait()
    assert "the state of step 2 is not in memory" in caplog.text
    assert [held.step for held in survey(tmp_path, "here").held] == [1]
    replicas.hook = lambda phase: die() if phase == "replicated" else None
    with pytest.raises(Died):
        replicas.write(3, facts(3))
    assert restored(tmp_path) == (1, 0.0)
    replicas.hook = lambda phase: None
    fill(replicas.slices, 3.0)
    replicas.write(3, facts(3))
    assert restored(tmp_path) == (3, 3.0)


def test_notes_are_of_one_rank_and_come_back_with_the_step(tmp_path):
    replicas = Replicas(tmp_path, 1, state(0.0), {})
    replicas.write(1, facts(1))
    replicas.write(2, facts(2), [b'{"step":1}', b'{"step":2,"loss":0.25}'])
    assert {held.step: held.head.notes for held in survey(tmp_path, "here").held} == {
        1: (),
        2: ({"step": 1}, {"step": 2, "loss": 0.25}),
    }
    assert restored_facts(tmp_path) == facts(2)
    with segment.mapped(replicas.newest) as view:
        assert segment.glance(view).step == 2
    flip(replicas.newest, replicas.newest.read_bytes().index(b'"loss"') + 2)
    (reason,) = survey(tmp_path, "here").passed_over
    assert "its seal does not match" in reason


@pytest.mark.parametrize("note", [b"[1]", b"{", b'{"a": 1}\n7'])
def test_notes_that_are_no_objects_make_no_segment(tmp_path, note):
    replicas = Replicas(tmp_path, 1, state(0.0), {})
    replicas.write(1, facts(1), [note])
    found = survey(tmp_path, "here")
    assert not found.held
    assert ["damaged" in reason for reason in found.passed_over].count(True) == 1


def test_more_notes_than_there_is_room_for_cost_no_more_than_a_segment(tmp_path, caplog):
    replicas = Replicas(tmp_path, 1, state(0.0), {})
    replicas.write(1, facts(1))
    replicas.write(2, facts(2), [b"{}"] * (NOTES_ROOM // 3 + 1))
    assert "the notes of step 2 need" in caplog.text
    replicas.write(3, facts(3), [b"{}"] * (NOTES_ROOM // 3))
    assert [held.step for held in survey(tmp_path, "here").held] == [1, 3]


def restored_facts(folder: Path) -> dict[str, Any]:
    generation = choose(survey(folder, "here").held).generation
    assert generation is not None
    return generation.facts


def test_a_machine_without_tmpfs_is_told_so(monkeypatch, tmp_path):
    assert memory_folder("some/run", "0123456789abcdef0123") == Path("/dev/shm/raytron-some-run-0123456789abcdef")
    monkeypatch.setattr("raytron.checkpoint.folder.TMPFS", tmp_path / "none")
    with pytest.warns(UserWarning, match="what is meant for memory is written to"):
        assert memory_folder("run", "n").name == "raytron-run-n"


@given(st.integers(0, 400), st.binary(min_size=1, max_size=40))
@settings(max_examples=60)
def test_a_head_of_any_bytes_is_read_or_refused(tmp_path_factory, at, noise):
    folder = tmp_path_factory.mktemp("fuzz")
    written(folder, 1)
    path = folder / segment_name(1, 0, 0)
    data = bytearray(path.read_bytes())
    data[at : at + len(noise)] = noise
    path.write_bytes(data)
    found = survey(folder, "here")
    assert [held.step for held in found.held] == [1] or str(path) in found.passed_over[0]


@given(st.recursive(st.none() | st.integers() | st.text(max_size=5), lambda x: st.lists(x, max_size=6), max_leaves=12))
@settings(max_examples=100)
def test_a_sealed_table_that_makes_no_sense_is_refused(tmp_path_factory, row):
    """A forger can seal what he likes; it still has to be a table."""
    folder = tmp_path_factory.mktemp("sealed")
    origin = Origin(1, 0, 1, "one", Inventory(1, "0"))
    original = segment._table
    try:
        segment._table = lambda *_: original(origin, [], []).replace(b'"rectangles":[]', b'"rectangles":[%s]' % (
            segment.to_json({"row": row})[7:-1]))  # fmt: skip
        SegmentFile(folder / "0.segment", origin, [], 99).publish(1, {})
    finally:
        segment._table = original
    (reason,) = survey(folder, "here").passed_over
    assert "damaged" in reason


def test_windows_are_read_alike_from_here_and_from_afar(tmp_path):
    held = {"x": Slice((6, 8), (0, 0), torch.arange(48.0).view(6, 8))}
    replicas = Replicas(tmp_path, 1, held, {})
    replicas.write(1, {})
    head = read_segment(tmp_path / segment_name(1, 0, 0))
    window = Window(head.rectangles[0].start, (6, 32), (1, 8), (3, 12))
    (path,) = [path for path in tmp_path.iterdir() if path.name.endswith("-0.segment")]
    data = read_windows(path, head.seal, [window, window])
    assert data.view(np.float32).reshape(2, 3, 3).tolist() == [held["x"].tensor[1:4, 2:5].tolist()] * 2
    for wrong in (
        window._replace(sizes=(6, 12)),
        window._replace(start=1 << 40),
        window._replace(offsets=(-1, 0)),
        window._replace(offsets=(0,)),
    ):
        with pytest.raises(CheckpointError, match="lies outside"):
            read_windows(path, head.seal, [wrong])


def test_only_what_is_needed_is_fetched_once_and_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(gather, "FETCH_BYTES", 64)
    whole = torch.arange(80.0).view(10, 8)
    Replicas(tmp_path, 1, {"x": Slice((10, 8), (0, 0), whole)}, {}).write(1, {})
    generation = choose(survey(tmp_path, "there").held).generation
    assert generation is not None
    asked = []

    def fetch(node: str, path: str, seal: str, windows: Any) -> Any:
        asked.append(sum(window.bytes for window in windows))
        return read_windows(path, seal, windows)

    mine = {"x": Slice((10, 8), (2, 3), torch.zeros(5, 4))}
    gather.load(mine, generation, "here", fetch)
    assert torch.equal(mine["x"].tensor, whole[2:7, 3:7])
    assert sum(asked) == mine["x"].tensor.nbytes
    assert max(asked) <= 64
    with pytest.raises(CheckpointError, match="there is no way to it"):
        gather.load(mine, generation, "here")
