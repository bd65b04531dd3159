"""The step on one rank: what a non-finite gradient, a request and an evaluation do."""

import numpy as np
import pytest
import torch

from raytron.config import from_mapping
from raytron.data.batch import Batch
from raytron.errors import DataError
from raytron.parallel.mesh import Mesh, abort_world
from raytron.plan.mesh import MeshShape
from raytron.plan.plan import make_plan
from raytron.training.engine import Engine

CONFIG = from_mapping(
    {"model": {"layers": 1, "hidden": 16, "heads": 2, "ffn": 16, "vocab": 31}, "sequence_length": 6,
     "global_batch_size": 4, "micro_batch_size": 2, "data": {"dataset": "random"}}
)  # fmt: skip


@pytest.fixture
def engine():
    return Engine(make_plan(CONFIG, None), Mesh(MeshShape(), 0))


def batch():
    rows = np.random.default_rng(0).integers(0, 31, (4, 7))
    return Batch(np.arange(4), rows[:, :-1].copy(), rows[:, 1:].copy(), np.ones((4, 6), dtype=np.float32))


def weights(engine):
    return [param.detach().clone() for param in engine.model.params]


def test_a_step_learns_and_reports(engine):
    results = [engine.step(batch(), 1e-2) for _ in range(5)]
    assert results[-1].loss < results[0].loss
    assert results[0].loss == pytest.approx(np.log(31), abs=0.1)
    assert results[0].tokens == 24
    assert not results[0].skipped


def test_a_gradient_that_is_not_finite_changes_nothing(engine):
    before = weights(engine)
    with torch.no_grad():
        engine.model.params[0].fill_(float("nan"))
    result = engine.step(batch(), 1e-2)
    assert result.skipped
    assert all(torch.equal(a, b) for a, b in zip(before[1:], weights(engine)[1:], strict=True))
    assert engine.optimizer.updates == 0


def test_nothing_is_committed_of_a_step_whose_mesh_was_given_up_meanwhile(engine):
    """What an aborted collective of NCCL leaves in its buffers looks like a result."""
    before = weights(engine)
    engine.before_commit = lambda: abort_world(engine.mesh)
    with pytest.raises(ConnectionAbortedError, match="given up"):
        engine.step(batch(), 1e-2)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(engine), strict=True))
    assert (engine.optimizer.updates, engine.whole) == (0, True)


def test_documents_that_a_stream_does_not_tell_apart_are_refused():
    apart = Engine(make_plan(CONFIG.replace(**{"data.document_mask": True}), None), Mesh(MeshShape(), 0))
    with pytest.raises(DataError, match="do not say where documents end"):
        apart.step(batch(), 1e-2)


def test_requests_come_back(engine):
    assert engine.step(batch(), 0.0, request=0).request == 0
    assert engine.step(batch(), 0.0, request=3).request == 3


def test_evaluation_changes_nothing_and_equals_the_loss(engine):
    before = weights(engine)
    loss, tokens = engine.evaluate(batch())
    assert all(torch.equal(a, b) for a, b in zip(before, weights(engine), strict=True))
    assert loss / tokens == pytest.approx(engine.step(batch(), 0.0).loss, rel=1e-6)


def test_a_loss_without_tokens_is_no_division_by_zero(engine):
    empty = batch()._replace(weights=np.zeros((4, 6), dtype=np.float32))
    result = engine.step(empty, 1e-2)
    assert (result.loss, result.tokens, result.skipped) == (0.0, 0, False)
