import threading
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from raytron.actors import worker
from raytron.actors.worker import Worker, is_peer_failure
from raytron.checkpoint.peers import Peers
from raytron.errors import CheckpointError
from raytron.parallel.mesh import Mesh, close_world, open_world
from raytron.plan.mesh import MeshShape


@pytest.fixture
def alone():
    """A world of this process, in which a rank's error is about to free its peers."""
    open_world(dist.HashStore(), 0, 1)
    yield
    close_world()


@pytest.mark.parametrize("rebuilt", [False, True])
def test_an_error_frees_the_peers_of_its_own_mesh_only(alone, rebuilt, monkeypatch):
    """The rank may be in the next mesh by the time its error of the last one is dealt with."""
    monkeypatch.setattr(worker, "FREE_PEERS_S", 0.0)
    rank = object.__new__(Worker)
    rank._leaving, rank._orders, rank._trainer = threading.Lock(), object(), None
    failed_under = object() if rebuilt else rank._orders
    rank._free_peers(failed_under)
    assert dist.is_initialized() == rebuilt


def test_a_rank_that_has_left_its_group_does_not_save_or_load_alone(alone):
    group = dist.group.WORLD
    close_world()
    with pytest.raises(CheckpointError, match="has left the process group"):
        Peers(group)


@pytest.mark.parametrize("epoch", [4, 5])
def test_the_mesh_of_one_epoch_is_given_up_and_no_other(alone, epoch):
    rank = object.__new__(Worker)
    rank._leaving, rank._orders, rank._mesh = threading.Lock(), SimpleNamespace(epoch=5), Mesh(MeshShape(), 0)
    rank.abandon(epoch)
    assert rank._mesh.abandoned == (epoch == 5)
    if epoch == 5:
        with pytest.raises(ConnectionAbortedError) as raised:
            rank._mesh.check()
        assert is_peer_failure(raised.value), "a consequence, not a cause"


class Saving:
    """A trainer with a checkpoint under way."""

    def __init__(self, error=None):
        self.told, self.error = [], error

    def settle_saves(self):
        self.told.append("settled")
        if self.error is not None:
            raise self.error

    def park(self):
        self.told.append("parked")

    def end_reads(self):
        self.told.append("ended")

    def close_replicas(self):
        self.told.append("closed")

    def reports(self):
        return [{"step": 8}] if "settled" in self.told and self.error is None else []


@pytest.mark.parametrize(
    ("finish", "error", "reports"),
    [(True, None, [{"step": 8}]), (True, ConnectionError("a peer is gone"), []), (False, None, [])],
)
def test_who_leaves_may_end_the_checkpoint_under_way_first(finish, error, reports):
    rank = object.__new__(Worker)
    rank._leaving, rank.rank, rank._trainer, rank._records = threading.Lock(), 0, Saving(error), []
    trainer = rank._trainer
    left = rank.leave(park=True, finish=finish)
    assert trainer.told == ["settled"] * finish + ["parked", "ended", "closed"]
    assert (left.parked, left.reports) == (True, reports)
