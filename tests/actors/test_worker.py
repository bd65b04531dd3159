import threading

import pytest
import torch.distributed as dist

from raytron.actors import worker
from raytron.actors.worker import Worker
from raytron.checkpoint.peers import Peers
from raytron.errors import CheckpointError
from raytron.parallel.mesh import close_world, open_world


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
    rank._leaving, rank._orders = threading.Lock(), object()
    failed_under = object() if rebuilt else rank._orders
    rank._free_peers(failed_under)
    assert dist.is_initialized() == rebuilt


def test_a_rank_that_has_left_its_group_does_not_save_or_load_alone(alone):
    group = dist.group.WORLD
    close_world()
    with pytest.raises(CheckpointError, match="has left the process group"):
        Peers(group)
