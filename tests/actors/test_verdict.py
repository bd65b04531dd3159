import pickle

import pytest
import torch.distributed as dist
from ray.exceptions import ActorDiedError

from raytron.actors.recovery import WorkersLost, is_settled, verdict
from raytron.actors.worker import PeerError, is_peer_failure
from raytron.errors import CheckpointError, WorkerError

PEER = PeerError(0, "stage 0, step 3", "RuntimeError: gloo: connection closed by peer")
OWN = WorkerError(1, "stage 1, step 3", "ValueError: no")


def test_a_death_is_the_cause_and_its_peers_errors_are_not():
    found = verdict({0: PEER, 1: ActorDiedError(), 2: OWN}, silent=[3])
    assert isinstance(found, WorkersLost)
    assert found.ranks == (1,)


def test_an_exception_of_its_own_stops_the_run():
    assert verdict({0: PEER, 1: OWN}, silent=[]) is OWN


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
    for error in (PEER, OWN, WorkersLost([2, 1], "gone")):
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error)
        assert str(again) == str(error)
