import pickle

import pytest
import torch.distributed as dist
from ray.exceptions import ActorDiedError
from ray.exceptions import OutOfMemoryError as KilledForMemory

from raytron.actors.recovery import WorkersLost, is_settled, verdict
from raytron.actors.worker import PeerError, is_peer_failure
from raytron.errors import CheckpointError, OutOfMemoryError, WorkerError

PEER = PeerError(0, "stage 0, step 3", "RuntimeError: gloo: connection closed by peer")
OWN = WorkerError(1, "stage 1, step 3", "ValueError: no")


def test_a_death_is_the_cause_and_its_peers_errors_are_not():
    found = verdict({0: PEER, 1: ActorDiedError(), 2: OWN}, silent=[3])
    assert isinstance(found, WorkersLost)
    assert found.ranks == (1,)


def test_an_exception_of_its_own_stops_the_run():
    assert verdict({0: PEER, 1: OWN}, silent=[]) is OWN


def test_a_process_that_ray_ends_for_memory_is_no_crash():
    """It names the rank and what that did last; the peers' errors, and deaths beside it, are consequences."""
    killed = KilledForMemory("Task was killed due to the node running low on memory.")
    found = verdict({0: PEER, 1: ActorDiedError(), 2: killed}, silent=[3], doing={2: "step 7"})
    assert isinstance(found, OutOfMemoryError)
    assert (found.rank, found.where, found.host) == (2, "step 7", True)
    assert "running low on memory" in str(found)
    assert is_settled({2: killed})


def test_whoever_is_silent_while_others_time_out_is_lost():
    found = verdict({0: PEER}, silent=[1, 2])
    assert isinstance(found, WorkersLost)
    assert found.ranks == (1, 2)


def test_only_a_death_ends_the_wait_for_more():
    assert is_settled({1: ActorDiedError()})
    assert not is_settled({0: PEER, 1: OWN})


@pytest.mark.parametrize(
    ("error", "peer"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:4711"), True),
        (dist.DistBackendError("NCCL communicator was aborted"), True),
        (ConnectionResetError("reset"), True),
        (ValueError("a gloo in the text of another kind of error"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (CheckpointError("disk full"), False),
    ],
)
def test_lost_connections_are_told_from_other_errors(error, peer):
    assert is_peer_failure(error) is peer


def test_failures_travel_between_processes():
    full = OutOfMemoryError(1, "stage 0, step 3", "no room", "traceback", host=True)
    for error in (PEER, OWN, WorkersLost([2, 1], "gone"), full):
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error)
        assert str(again) == str(error)
    assert pickle.loads(pickle.dumps(full)).host
