"""Keepers on a local Ray: a node's ranks are lost, and its partner has what they had."""

from __future__ import annotations

import contextlib
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from raytron.actors.keeper import Place, fetch_through, partners, spawn, sweep
from raytron.checkpoint import gather
from raytron.checkpoint.folder import is_used
from raytron.checkpoint.memory import Replicas
from raytron.checkpoint.sources import choose
from raytron.errors import CheckpointError
from raytron.parallel.layout import Slice


def state(value: float) -> dict[str, Slice]:
    return {"x": Slice((300, 400), (0, 0), torch.full((300, 400), value))}


def facts(step: int) -> dict[str, Any]:
    return {"step": step}


@pytest.fixture
def keepers(local_ray, tmp_path):
    """Two keepers on this machine, as if they were on two nodes."""
    node = ray.get_runtime_context().get_node_id()
    made = {label: spawn("run", node, label=label, folder=str(tmp_path / label)) for label in ("a", "b")}
    places = {label: ray.get(keeper.place.remote()) for label, keeper in made.items()}
    assert places["a"] == Place("a", str(tmp_path / "a"))
    yield made
    for keeper in made.values():
        ray.kill(keeper)


def kill(keeper: Any) -> None:
    """As a lost node does it, and waits until it is dead."""
    ray.kill(keeper)
    with contextlib.suppress(ray.exceptions.RayActorError):
        while True:
            ray.get(keeper.place.remote())


def replicas_in(folder: Path, epoch: int, steps: int) -> Replicas:
    replicas = Replicas(folder, epoch, state(0.0), facts(0))
    for step in range(1, steps + 1):
        replicas.slices["x"].tensor.fill_(float(step))
        replicas.write(step, facts(step))
        replicas.wait()
    return replicas


def test_a_lost_nodes_step_comes_from_its_partner(keepers, tmp_path):
    ray.get(keepers["b"].follow.remote(keepers["a"], 4, 1))
    replicas_in(tmp_path / "a", 4, 3)
    kill(keepers["a"])
    shutil.rmtree(tmp_path / "a")
    found = ray.get(keepers["b"].held.remote())
    assert found.passed_over == []
    generation = choose(found.held).generation
    assert generation is not None
    assert (generation.step, generation.epoch, generation.sources[0].node) == (3, 4, "b")
    blank = state(-1.0)
    assert gather.load(blank, generation, "c", fetch_through(keepers)) == facts(3)
    assert bool((blank["x"].tensor == 3).all())


def test_ranks_are_let_go_when_their_partner_is_gone(keepers, tmp_path):
    ray.get(keepers["b"].follow.remote(keepers["a"], 4, 1))
    replicas = replicas_in(tmp_path / "a", 4, 1)
    kill(keepers["b"])
    ray.get(keepers["a"].alone.remote())
    start = time.monotonic()
    for step in (2, 3, 4):
        replicas.write(step, facts(step))
        replicas.wait()
    assert time.monotonic() - start < 4  # patience for one step lasts 5 s


def test_a_keeper_that_died_is_followed_by_one_that_finds_all(keepers, tmp_path):
    ray.get(keepers["b"].follow.remote(keepers["a"], 4, 1))
    replicas_in(tmp_path / "a", 4, 2)
    for label in ("a", "b"):
        kill(keepers[label])
        node = ray.get_runtime_context().get_node_id()
        keepers[label] = spawn("run", node, label=label, folder=str(tmp_path / label))
    for label in ("a", "b"):
        held = ray.get(keepers[label].held.remote()).held
        assert sorted(each.step for each in held) == [1, 2]
    ray.get(keepers["b"].follow.remote(keepers["a"], 5, 1))
    replicas_in(tmp_path / "a", 5, 3)
    for label in ("a", "b"):
        ray.get(keepers[label].forget.remote(5))
        assert {each.epoch for each in ray.get(keepers[label].held.remote()).held} == {5}


def test_a_keeper_reads_in_its_own_folder_only(keepers, tmp_path):
    replicas_in(tmp_path / "a", 1, 1)
    (held,) = ray.get(keepers["a"].held.remote()).held
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(held.path, tmp_path / "elsewhere" / "s.segment")
    fetch, seal = fetch_through(keepers), held.head.seal
    assert len(fetch("a", held.path, seal, [gather.Window(0, (8,), (0,), (8,))])) == 8
    for path in (tmp_path / "elsewhere" / "s.segment", tmp_path / "a" / ".." / "elsewhere" / "s.segment"):
        with pytest.raises(CheckpointError, match="is no segment of the keeper"):
            fetch("a", str(path), seal, [])
    with pytest.raises(CheckpointError, match="written again since"):
        fetch("a", held.path, "0" * 32, [])
    with pytest.raises(CheckpointError, match="node c has no keeper"):
        fetch("c", held.path, seal, [])
    kill(keepers["b"])
    with pytest.raises(CheckpointError, match="the keeper of node b gave nothing"):
        fetch("b", held.path, seal, [])


def test_a_run_that_ends_leaves_nothing(keepers, tmp_path):
    ray.get(keepers["b"].follow.remote(keepers["a"], 1, 1))
    replicas_in(tmp_path / "a", 1, 1)
    for label in ("a", "b"):
        ray.get(keepers[label].close.remote())
        assert not (tmp_path / label).exists()


def test_what_dead_users_left_is_swept(local_ray, tmp_path):
    node = ray.get_runtime_context().get_node_id()
    folder = tmp_path / "raytron-dead"
    keeper = spawn("run", node, folder=str(folder))
    ray.get(keeper.place.remote())
    assert sweep(node, str(tmp_path))() == []
    kill(keeper)
    end = time.monotonic() + 20
    while is_used(folder):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert sweep(node, str(tmp_path))() == [str(folder)]


def test_partners_are_a_ring():
    assert partners(["a"]) == {}
    assert partners(["a", "b"]) == {"a": "b", "b": "a"}
    assert partners(["a", "b", "c"]) == {"a": "c", "b": "a", "c": "b"}
