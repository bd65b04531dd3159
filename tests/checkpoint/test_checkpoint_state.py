"""Save and load in one process: any rectangles, any dtype, and nothing but what verifies."""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_cases import DAMAGE, flip_bit, shards, share, tensors, wrong
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from raytron.checkpoint import checkpointer
from raytron.checkpoint.catalog import committed, newest_good, open_generation, prune, verify
from raytron.checkpoint.coverage import Box, coverage_problem
from raytron.checkpoint.describe import describe
from raytron.checkpoint.local_storage import Descriptor
from raytron.checkpoint.planner import DTYPE_OF_NAME, NAME_OF_DTYPE
from raytron.checkpoint.record import ELEMENT_BYTES
from raytron.checkpoint.whole import read_whole
from raytron.errors import CheckpointError
from raytron.parallel.layout import Slice


def save_state(directory: Path, step: int = 1, seed: int = 0) -> Path:
    return checkpointer.save(directory, step, share(tensors(seed), 1, 0), {"step": step, "consumed": 8 * step})


@st.composite
def rectangles(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    """A shape, and boxes that tile it, by cutting boxes in two again and again."""
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=0, max_size=4)))
    boxes = [Box((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 6)) if shape else 0):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        dim = draw(st.integers(0, len(shape) - 1))
        at = draw(st.integers(0, box.sizes[dim]))
        for start, size in ((0, at), (at, box.sizes[dim] - at)):
            offsets = tuple(o + start * (d == dim) for d, o in enumerate(box.offsets))
            boxes.append(Box(offsets, tuple(size if d == dim else n for d, n in enumerate(box.sizes))))
    return shape, boxes


@given(rectangles(), st.data())
def test_tiles_cover_and_anything_else_does_not(tiling: tuple[tuple[int, ...], list[Box]], data: st.DataObject) -> None:
    shape, tiles = tiling
    boxes = [box for box in tiles if box.volume]
    assert coverage_problem(shape, boxes) is None
    chosen = data.draw(st.integers(0, len(boxes) - 1))
    assert "nobody" in (coverage_problem(shape, boxes[:chosen] + boxes[chosen + 1 :]) or "")
    assert "overlap" in (coverage_problem(shape, [*boxes, boxes[chosen]]) or "")


@given(rectangles(), st.data())
def test_boxes_that_only_count_as_many_elements_do_not_cover(
    tiling: tuple[tuple[int, ...], list[Box]], data: st.DataObject
) -> None:
    """One box takes the place of another one of the same sizes."""
    shape, tiles = tiling
    boxes = [box for box in tiles if box.volume]
    pairs = [(a, b) for a in boxes for b in boxes if a is not b and a.sizes == b.sizes]
    if pairs:
        gone, twice = data.draw(st.sampled_from(pairs))
        assert "overlap" in (coverage_problem(shape, [box for box in boxes if box is not gone] + [twice]) or "")


def test_made_up_rectangles_are_judged_soon() -> None:
    """A grid of three dimensions, and the same grid with a flaw."""
    boxes = [Box((x, y, z), (1, 1, 1)) for x in range(24) for y in range(24) for z in range(24)]
    begin = time.process_time()
    assert coverage_problem((24, 24, 24), boxes) is None
    assert "overlap" in (coverage_problem((24, 24, 24), [*boxes[1:], boxes[-1]]) or "")
    assert time.process_time() - begin < 30
    assert "dimensions are cut" in (coverage_problem((2,) * 12, [Box((0,) * 12, (1,) * 12)]) or "")


def read_box(path: Path, name: str, box: Box, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    target = torch.empty(*box.sizes, 2, dtype=dtype)[..., 0] if box.sizes else torch.empty((), dtype=dtype)
    checkpointer.load(path, {name: Slice(shape, box.offsets, target)}, partial=True)
    return target


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8]))
def test_cut_one_way_and_loaded_another(tmp_path: Path, data: st.DataObject, dtype: torch.dtype) -> None:
    shape, saved = data.draw(rectangles())
    whole = torch.randint(0, 100, shape).to(dtype)
    # one process can hold one slice of a name, so each box is a tensor of its own here; many ranks are tested elsewhere
    parts = {
        f"part.{i}": Slice(
            box.sizes,
            (0,) * len(shape),
            whole[tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))],
        )
        for i, box in enumerate(saved)
    }
    path = checkpointer.save(tmp_path, 1, {"whole": Slice(shape, (0,) * len(shape), whole), **parts}, {})
    _, wanted = data.draw(rectangles().filter(lambda tiling: len(tiling[0]) == len(shape)))
    for box in wanted:
        offsets = tuple(min(o, n) for o, n in zip(box.offsets, shape, strict=True))
        sizes = tuple(min(s, n - o) for s, o, n in zip(box.sizes, offsets, shape, strict=True))
        box = Box(offsets, sizes)
        expected = whole[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]
        assert torch.equal(read_box(path, "whole", box, shape, dtype), expected)
    for name, piece in parts.items():
        target = torch.empty_like(piece.tensor)
        checkpointer.load(path, {name: Slice(piece.shape, piece.offsets, target)}, partial=True)
        assert torch.equal(target, piece.tensor)
    shutil.rmtree(path)


@pytest.mark.parametrize(("dim", "start", "length"), [(0, 3, 2), (1, 70_000, 1), (1, 7, 290_000), (2, 0, 2), (2, 1, 1)])
def test_rows_larger_than_a_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dim: int, start: int, length: int
) -> None:
    monkeypatch.setattr(Descriptor, "span", 1 << 20)
    whole = torch.arange(5 * 300_000 * 2, dtype=torch.int32).view(5, 300_000, 2)
    assert whole[0].numel() * 4 > 2 * Descriptor.span
    path = checkpointer.save(tmp_path, 1, {"w": Slice(tuple(whole.shape), (0, 0, 0), whole)}, {})
    target = torch.zeros_like(whole.narrow(dim, start, length))
    offsets = tuple(start if d == dim else 0 for d in range(3))
    checkpointer.load(path, {"w": Slice(tuple(whole.shape), offsets, target)})
    assert torch.equal(target, whole.narrow(dim, start, length))


@pytest.mark.parametrize("name", sorted(ELEMENT_BYTES))
def test_every_dtype(tmp_path: Path, name: str) -> None:
    dtype = DTYPE_OF_NAME[name]
    assert dtype.itemsize == ELEMENT_BYTES[name]
    bits = torch.randint(0, 2 if dtype == torch.bool else 256, (24,), dtype=torch.uint8)
    whole = bits.view(dtype)
    path = checkpointer.save(tmp_path, 1, {"model.w": Slice(tuple(whole.shape), (0,), whole)}, {})
    assert torch.equal(read_whole(path)["w"].view(torch.uint8), bits)
    assert NAME_OF_DTYPE[dtype] == name


def test_saved_and_loaded_with_facts_and_without_a_warning(tmp_path: Path) -> None:
    held = share(tensors(), 1, 0, blank=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = save_state(tmp_path)
        assert checkpointer.load(path, held) == {"step": 1, "consumed": 8}
    assert wrong(tensors(), held) == []
    assert checkpointer.facts(path) == checkpointer.facts(open_generation(path))
    assert sorted(p.name for p in path.iterdir()) == ["COMMIT", "metadata.json", "rank00000-000.safetensors"]


def test_shards_are_plain_safetensors(tmp_path: Path) -> None:
    read = load_file(shards(save_state(tmp_path))[0])
    assert set(read) == {name for name, tensor in tensors().items() if tensor.numel()}
    assert all(torch.equal(read[name], tensors()[name]) for name in read)


def test_a_rank_begins_another_file_when_one_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raytron.checkpoint.deal.SHARD_BYTES", 600)
    path = save_state(tmp_path)
    assert len(shards(path)) == 3
    held = share(tensors(), 1, 0, blank=True)
    checkpointer.load(path, held)
    assert wrong(tensors(), held) == []


def test_parameters_that_need_gradients_load_in_place(tmp_path: Path) -> None:
    path = checkpointer.save(tmp_path, 1, {"w": Slice((4,), (0,), torch.arange(4.0))}, {})
    parameter = torch.nn.Parameter(torch.zeros(4))
    storage = parameter.data_ptr()
    checkpointer.load(path, {"w": Slice((4,), (0,), parameter)})
    assert parameter.tolist() == [0, 1, 2, 3]
    assert parameter.data_ptr() == storage
    assert parameter.requires_grad


def test_dtypes_convert_only_if_told(tmp_path: Path) -> None:
    path = checkpointer.save(tmp_path, 1, {"w": Slice((2,), (0,), torch.tensor([1.5, 2.5]))}, {})
    half, whole = torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(CheckpointError, match=r"w: its dtype is torch.float32 in the checkpoint, not torch.bfloat16"):
        checkpointer.load(path, {"w": Slice((2,), (0,), half)})
    with pytest.raises(CheckpointError, match="int64"):
        checkpointer.load(path, {"w": Slice((2,), (0,), whole)}, convert=True)
    checkpointer.load(path, {"w": Slice((2,), (0,), half)}, convert=True)
    assert half.tolist() == [1.5, 2.5]


def test_what_does_not_fit_is_named_all_at_once_and_changes_nothing(tmp_path: Path) -> None:
    path = save_state(tmp_path)
    held = share(tensors(), 1, 0, blank=True)
    held["model.extra"] = held.pop("model.norm")
    held["rng"] = Slice((3,), (0,), torch.zeros(3, dtype=torch.uint8))
    before = {name: piece.tensor.clone() for name, piece in held.items()}
    with pytest.raises(CheckpointError) as caught:
        checkpointer.load(path, held)
    for part in (
        "model.extra: missing",
        "model.norm: unexpected",
        "rng: its shape is (9,) in the checkpoint, not (3,)",
    ):
        assert part in str(caught.value)
    assert all(torch.equal(before[name], piece.tensor) for name, piece in held.items())


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        (Slice((4,), (0,), torch.zeros(2)), "2 of 4 elements"),
        (Slice((4,), (3,), torch.zeros(2)), "outside the shape"),
        (Slice((4,), (-1,), torch.zeros(2)), "outside the shape"),
        (Slice((4,), (0, 0), torch.zeros(4)), "outside the shape"),
        (Slice((4,), (0,), torch.zeros(4, device="meta")), "dense tensors"),
        (Slice((4,), (0,), torch.zeros(4, dtype=torch.complex128)), "can't be stored"),
    ],
)
def test_slices_that_make_no_sense_are_refused(tmp_path: Path, piece: Slice, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        checkpointer.save(tmp_path, 1, {"w": piece}, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("facts", [{"x": object()}, {"x": float("nan")}, [1], {"x": {1, 2}}])
def test_facts_must_be_json(tmp_path: Path, facts: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match="facts"):
        checkpointer.save(tmp_path / "checkpoints", 1, {}, facts)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("victim", ["COMMIT", "metadata.json", "rank00000-000.safetensors"])
def test_damage_is_found_named_and_passed_over(tmp_path: Path, victim: str, damage: Callable[[Path], None]) -> None:
    directory = tmp_path / "checkpoints"
    good, bad = save_state(directory, 1), save_state(directory, 2, seed=1)
    damage(bad / victim)
    held = share(tensors(), 1, 0, blank=True)
    before = {name: piece.tensor.clone() for name, piece in held.items()}
    with pytest.raises(CheckpointError, match=victim):
        checkpointer.load(bad, held)
    assert all(torch.equal(before[name], piece.tensor) for name, piece in held.items())
    reports: list[str] = []
    found = newest_good(directory, lambda path, error: reports.append(f"{path.name}: {error}"))
    assert found is not None
    assert found.path == good
    uncommitted = victim == "COMMIT" and not (bad / "COMMIT").exists()
    assert [bad.name in report and victim in report for report in reports] == ([] if uncommitted else [True])


def test_files_of_another_step_are_found(tmp_path: Path) -> None:
    old, new = save_state(tmp_path, 1), save_state(tmp_path, 2, seed=1)
    for name in ("rank00000-000.safetensors", "metadata.json"):
        kept = (new / name).read_bytes()
        (new / name).write_bytes((old / name).read_bytes())
        with pytest.raises(CheckpointError, match=name):
            checkpointer.load(new, share(tensors(), 1, 0, blank=True))
        (new / name).write_bytes(kept)
    (new / "COMMIT").write_bytes((old / "COMMIT").read_bytes())
    with pytest.raises(CheckpointError, match=r"metadata\.json"):
        checkpointer.load(new, share(tensors(), 1, 0, blank=True))


def test_only_files_that_are_read_must_verify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raytron.checkpoint.deal.SHARD_BYTES", 600)
    path = save_state(tmp_path)
    record = open_generation(path).records.tensors["optimizer.moment"].chunks[0]
    flip_bit(path / record.file)
    with pytest.raises(CheckpointError, match=record.file):
        verify(open_generation(path))
    assert torch.equal(read_whole(path, "model.layers.1.")["weight"], tensors()["model.layers.1.weight"])
    with pytest.raises(CheckpointError, match=record.file):
        read_whole(path, "optimizer.")


def test_whole_models_are_read_by_prefix(tmp_path: Path) -> None:
    read = read_whole(save_state(tmp_path))
    assert set(read) == {"layers.0.weight", "layers.1.weight", "norm", "gate_up"}
    assert all(torch.equal(tensor, tensors()[f"model.{name}"]) for name, tensor in read.items())
    with pytest.raises(CheckpointError, match=r"no tensor whose name begins with 'ema\.'"):
        read_whole(committed(tmp_path)[0], "ema.")


def test_a_description_names_what_is_inside(tmp_path: Path) -> None:
    save_state(tmp_path / "checkpoints", 1)
    path = save_state(tmp_path / "checkpoints", 120)
    text = describe(tmp_path, verify=True)
    assert text == describe(path, verify=True) == describe(tmp_path / "checkpoints", verify=True)
    for part in ("step        120", "consumed  960", "digests verified", "by 1 rank", "8 tensors"):
        assert part in text
    assert "model.layers.*.weight 2 12 × 10 F32 960 B" in " ".join(text.split())
    assert "digests not read" in describe(path)
    flip_bit(shards(path)[0])
    with pytest.raises(CheckpointError, match="digest"):
        describe(path, verify=True)
    with pytest.raises(CheckpointError, match="no committed checkpoint"):
        describe(tmp_path / "nothing")


@pytest.mark.parametrize("phase", ["write", "publish"])
def test_a_failed_save_leaves_nothing_and_the_old_generation_good(tmp_path: Path, phase: str) -> None:
    good = save_state(tmp_path, 1)

    def fail(at: str) -> None:
        if at == phase:
            raise OSError(28, "No space left on device", "disk")

    with pytest.raises(CheckpointError, match="disk: No space left on device"):
        checkpointer.save(tmp_path, 2, share(tensors(), 1, 0), {}, hook=fail)
    assert list(tmp_path.iterdir()) == [good]
    assert prune(tmp_path, 1) == []


def test_an_interrupt_stays_an_interrupt(tmp_path: Path) -> None:
    def interrupt(_phase: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpointer.save(tmp_path, 2, share(tensors(), 1, 0), {}, hook=interrupt)
    assert committed(tmp_path) == []
    prune(tmp_path, 1)
    assert list(tmp_path.iterdir()) == []


def test_a_generation_is_never_overwritten(tmp_path: Path) -> None:
    first, second = save_state(tmp_path, 5), save_state(tmp_path, 5, seed=1)
    assert first != second
    assert [generation.path for generation in committed(tmp_path)] == [second, first]
