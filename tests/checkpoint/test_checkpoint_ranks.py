"""Save and load on four gloo processes: any mesh to any mesh, and one rank's failure reaches all."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoint_ranks
import pytest
from checkpoint_cases import shards, tensors

from raytron.checkpoint.catalog import committed, newest_good, open_generation
from raytron.testing.world import World

Results = Callable[[str], list[Any]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def results(world: World, root: Path) -> Results:
    """What each rank found in a case, in rank order; all cases run at once."""
    found = world.run(checkpoint_ranks.RANKS, checkpoint_ranks.run, root)
    return lambda case: [rank[case] for rank in found]


def test_saved_on_4_ranks_loads_on_4_3_2_and_1(root: Path, results: Results) -> None:
    found = results("save_on_4_load_on_any")
    assert len({rank["path"] for rank in found}) == 1
    for size in (4, 3, 2, 1):
        for rank in range(size):
            assert found[rank][f"wrong {size}"] == []
            assert found[rank][f"facts {size}"] == {"step": 3}
    assert found[2]["whole"]
    good = newest_good(root / "save_on_4_load_on_any")
    assert good is not None
    assert good.ranks == 4
    assert len(shards(good.path)) == 4
    assert good.records.bytes == sum(tensor.nbytes for tensor in tensors().values())


def test_a_group_may_leave_ranks_out(results: Results) -> None:
    found = results("save_on_3_of_4")
    assert "not part of the process group" in found[0]["outside"]
    assert [rank["wrong"] for rank in found[1:]] == [[]] * 3
    assert len({rank["path"] for rank in found[1:]}) == 1


def test_replicas_are_written_once_and_spread(root: Path, results: Results) -> None:
    path = root / "replicas_are_written_once" / results("replicas_are_written_once")[0]
    sizes = [file.stat().st_size for file in shards(path)]
    assert len(sizes) == 4
    assert max(sizes) < 1.05 * min(sizes)
    assert sum(sizes) < 1.05 * 4 * sum(1000 + i for i in range(16))


def test_stages_load_what_other_stages_saved(results: Results) -> None:
    for rank in results("pipeline_stages_hold_other_names"):
        assert rank["wrong"] == []
        for part in (
            "stage.9: missing in the checkpoint (on ranks 2, 3)",
            "stage.2.weight: unexpected",
            "stage.3.weight",
        ):
            assert part in rank["error"]


def test_one_ranks_failure_reaches_all_and_commits_nothing(root: Path, results: Results) -> None:
    for seen in results("one_rank_fails"):
        for case, error in seen.items():
            assert f"rank {case[0]}: rank-file: No space left on device" in error
    for case in ("2-write", "0-write", "0-publish"):
        assert list((root / "one_rank_fails" / case).iterdir()) == []


def test_a_directory_that_can_not_be_made_is_told_to_all(results: Results) -> None:
    errors = results("directory_can_not_be_made")
    assert len(set(errors)) == 1
    assert "rank 0" in errors[0]
    assert "Not a directory" in errors[0]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("overlap", "overlap: [2:5] and [4:6] overlap"),
        ("same offset", "same offset: [0:4] and [0:3] overlap"),
        ("gap", "gap: 1 of 8 elements"),
        ("shape", "shape: ranks disagree about its shape or dtype: (8,) F32 on rank 0, (9,) F32 on rank 3"),
        ("dtype", "(8,) F16 on rank 1, (8,) F32 on rank 0"),
    ],
)
def test_coverage_is_exact(root: Path, results: Results, case: str, message: str) -> None:
    errors = {rank[case] for rank in results("coverage_is_exact")}
    assert len(errors) == 1
    assert message in errors.pop()
    assert committed(root / "coverage_is_exact") == []


def test_damage_to_one_ranks_file_stops_every_rank(root: Path, results: Results) -> None:
    damaged = open_generation(next((root / "damaged_on_one_rank").iterdir()))
    for rank in results("damaged_on_one_rank"):
        assert rank["untouched"]
        assert "rank00003-000.safetensors: damaged: its digest is" in rank["error"]
    assert newest_good(damaged.path.parent, lambda _path, _error: None) is None


def test_one_ranks_read_error_stops_every_rank(results: Results) -> None:
    for rank in results("one_rank_fails_to_read"):
        assert rank["untouched"]
        assert "rank 1: disk: Input/output error" in rank["error"]


def test_small_checkpoints_are_quick(results: Results) -> None:
    slowest = {what: max(rank[what] for rank in results("how_long")) for what in ("save", "load")}
    print(slowest)
    assert max(slowest.values()) < 10


@pytest.mark.recovery
def test_a_rank_that_dies_leaves_nothing_committed(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=checkpoint_ranks.die_while_saving, args=(rank, tmp_path)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0, 9]
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen["error"] != "CheckpointError"
    assert "ABANDONED" in seen["left"]
    assert "COMMIT" not in seen["left"]
    assert seen["pruned"] == 1
    assert list((tmp_path / "checkpoints").iterdir()) == []
