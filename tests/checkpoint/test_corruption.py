"""Whatever happens to the files of a checkpoint: it is found, named, passed over, and nothing live changes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_cases import flip_bit, make_link, remove, shards, share, truncate
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raytron import cli
from raytron.checkpoint import catalog, checkpointer
from raytron.checkpoint.catalog import committed, newest_good, open_generation, verify
from raytron.errors import CheckpointError

PAGE = 4096
SHARDS = 4
FILES = [f"rank00000-{number:03d}.safetensors" for number in range(SHARDS)]
Damage = Callable[[Path, Path], None]


def zero_a_page(path: Path) -> None:
    data = bytearray(path.read_bytes())
    start = len(data) // 2 // PAGE * PAGE
    assert any(data[start : start + PAGE])
    data[start : start + PAGE] = bytes(len(data[start : start + PAGE]))
    path.write_bytes(data)


def flip_in_the_head(path: Path) -> None:
    flip_bit(path, 12)


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


def empty(path: Path) -> None:
    path.write_bytes(b"")


ALONE = (truncate, flip_bit, flip_in_the_head, zero_a_page, append, empty, remove, make_link)
DAMAGE: dict[str, Damage] = {
    **{each.__name__: lambda path, _other, each=each: each(path) for each in ALONE},
    "of_another_step": lambda path, other: shutil.copyfile(other / path.name, path),  # type: ignore[dict-item]
}


def state(seed: int) -> dict[str, torch.Tensor]:
    """Four tensors that fill a file each, of several pages; no two alike."""
    generator = torch.Generator().manual_seed(seed)
    return {f"model.{number}": torch.randn(64, 48, generator=generator) for number in range(SHARDS)}


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """An older and a newer generation of the same shape."""
    monkeypatch.setattr("raytron.checkpoint.deal.SHARD_BYTES", 64 * 48 * 4)
    paths = [checkpointer.save(tmp_path / "checkpoints", s, share(state(s), 1, 0), {"step": s}) for s in (1, 2)]
    assert [shard.name for shard in shards(paths[1])] == FILES
    return paths[0], paths[1]


def same_json(one: bytes, other: bytes) -> bool:
    """Whether bytes differ by blanks at most."""
    try:
        return bool(json.loads(one) == json.loads(other))
    except ValueError:
        return False


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_bytes_in_any_file(tmp_path, data):
    """Files are read at the places that metadata tells, not by their own headers: none of these can deceive."""
    found = committed(tmp_path)
    path = found[0].path if found else checkpointer.save(tmp_path, 1, share(state(1), 1, 0), {})
    victim = data.draw(st.sampled_from(sorted(path.iterdir())))
    kept = victim.read_bytes()
    at = data.draw(st.integers(0, len(kept) - 1))
    changed = kept[:at] + data.draw(st.binary(min_size=1, max_size=20)) + kept[data.draw(st.integers(at, len(kept))) :]
    victim.write_bytes(changed)
    held = share(state(7), 1, 0)
    try:
        if changed != kept and not (victim.name == "COMMIT" and same_json(changed, kept)):
            with pytest.raises(CheckpointError, match=victim.name):
                checkpointer.load(path, held)
            assert torch.equal(held["model.0"].tensor, state(7)["model.0"])
    finally:
        victim.write_bytes(kept)


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("victim", [*FILES, "metadata.json", "COMMIT"])
def test_every_damage_of_every_file(two, victim, damage, capsys):
    old, new = two
    DAMAGE[damage](new / victim, old)
    held = share(state(7), 1, 0)
    before = {name: piece.tensor.clone() for name, piece in held.items()}
    with pytest.raises(
        CheckpointError, match=victim if (victim, damage) != ("COMMIT", "of_another_step") else "metadata"
    ):
        checkpointer.load(new, held)
    assert all(torch.equal(before[name], piece.tensor) for name, piece in held.items())
    reports: list[str] = []
    good = newest_good(old.parent, lambda path, error: reports.append(f"{path.name}: {error}"))
    assert good is not None
    assert good.path == old
    checkpointer.load(good, held)
    assert torch.equal(held["model.0"].tensor, state(1)["model.0"])
    if victim == "COMMIT" and damage == "remove":  # then it is no checkpoint
        assert (reports, cli.main(["inspect", "--verify", str(old.parent)])) == ([], 0)
        return
    assert len(reports) == 1
    assert new.name in reports[0]
    assert cli.main(["inspect", "--verify", str(old.parent)]) == 1
    said = capsys.readouterr().err
    assert f"1 of 2 checkpoints damaged; the newest good one: {old.name}" in said
    assert f"{new.name}/" in said


def test_every_damaged_file_of_every_checkpoint_is_named(two, capsys):
    old, new = two
    catalog.note_validation(old, 2.0)
    damaged = [old / FILES[0], old / "VALIDATION", new / FILES[1], new / FILES[3]]
    for path in damaged:
        flip_bit(path, 20)
    with pytest.raises(CheckpointError) as caught:
        verify(open_generation(new))
    assert all(str(path) in str(caught.value) for path in damaged[2:])
    for place in (old.parent, old.parent.parent):
        assert cli.main(["inspect", "--verify", str(place)]) == 1
        said = capsys.readouterr().err
        assert all(str(path) in said for path in damaged)
        assert "2 of 2 checkpoints damaged; the newest good one: none" in said
        assert str(new / FILES[0]) not in said
    assert newest_good(old.parent, lambda _path, _error: None) is None


def test_a_good_one_is_shown_with_its_validation_loss(two, capsys):
    old, new = two
    catalog.note_validation(new, 2.25)
    assert cli.main(["inspect", "--verify", str(old.parent.parent)]) == 0
    said = capsys.readouterr().out
    assert "step        2" in said
    assert "validation  2.2500 nats" in said


def test_files_that_fit_their_own_checkpoint_do_not_fit_another(two):
    """All shards, or all shards and metadata, of another step."""
    old, new = two
    for names in (FILES, [*FILES, "metadata.json"]):
        for name in names:
            shutil.copyfile(old / name, new / name)
        with pytest.raises(CheckpointError, match=r"metadata\.json" if "metadata.json" in names else FILES[3]):
            verify(open_generation(new))
    assert [generation.step for generation in committed(old.parent)] == [2, 1]


def test_what_is_read_is_what_was_verified(two):
    """A tensor whose file is whole loads though another one is damaged; the state as a whole does not."""
    _, new = two
    flip_bit(new / FILES[2])
    held = share(state(2), 1, 0, blank=True)
    records = open_generation(new).records
    intact = [name for name, tensor in records.tensors.items() if tensor.chunks[0].file != FILES[2]]
    checkpointer.load(new, {name: held[name] for name in intact}, partial=True)
    assert all(torch.equal(held[name].tensor, state(2)[name]) for name in intact)
    with pytest.raises(CheckpointError, match=FILES[2]):
        checkpointer.load(new, held)
