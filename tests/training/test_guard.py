"""Bad numbers: a step is run again, and its second run or the policy decides. Every claim is to the bit."""

from __future__ import annotations

import math
import pickle

import pytest
import torch

from raytron.config import from_mapping
from raytron.errors import CheckpointError, ConfigError, GuardError
from raytron.parallel.mesh import Mesh
from raytron.plan.mesh import MeshShape
from raytron.plan.plan import make_plan
from raytron.testing.streams import RandomStream
from raytron.training.guard import Finding, Rollback
from raytron.training.trainer import Trainer

BASE = from_mapping(
    {"model": {"layers": 4, "hidden": 16, "heads": 4, "ffn": 16, "vocab": 31, "dropout": 0.1}, "sequence_length": 8,
     "global_batch_size": 4, "micro_batch_size": 1, "data": {"dataset": "random"}, "steps": 10,
     "lr": {"peak": 1e-2}, "guard": {"spike": 8.0, "spike_window": 10}}
)  # fmt: skip
STEPS, BAD = 8, 7  # the detector judges from the sixth step on
NAN, HUGE = math.nan, 1e6


@pytest.fixture(autouse=True)
def one_thread():
    """Of tests that train in this process: more only get in each other's way on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Fault:
    """Scales the gradient of what one rank's stage gives, in step BAD: in its first runs, or in all."""

    def __init__(self, trainer, factors):
        self.trainer, self.factors, self.runs = trainer, factors, 0
        inner = trainer.engine.forward_backward

        def counted(*arguments):
            self.runs += trainer.step + 1 == BAD
            return inner(*arguments)

        trainer.engine.forward_backward = counted
        for stage in trainer.engine.model.stages.values():
            stage.register_forward_hook(self.hook)

    def hook(self, module, given, y):
        if self.trainer.step + 1 == BAD and torch.is_grad_enabled() and self.runs <= len(self.factors):
            factor = self.factors[self.runs - 1]
            y.register_hook(lambda gradient: gradient * factor)


def trainer_of(rank, changes):
    config = BASE.replace(**changes)
    mesh = Mesh(MeshShape.of(config.mesh), rank)
    return Trainer(make_plan(config, None), mesh, RandomStream(31, 8))


def weights(trainer):
    return {name: part.tensor.detach().clone() for name, part in trainer.state().items()}


def train(trainer, steps=STEPS):
    records = []
    while trainer.step < steps:
        records.append(trainer.train_step())
    return records


def plain(rank, changes, skip=()):
    trainer = trainer_of(rank, changes)
    trainer.skip(skip)
    return train(trainer), weights(trainer)


def faulty(rank, changes, where, factors):
    trainer = trainer_of(rank, changes)
    fault = Fault(trainer, factors if rank == where else [1.0] * len(factors))
    return train(trainer), weights(trainer), fault.runs


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def untimed(records):
    return [
        {k: v for k, v in record.items() if k not in ("step_time_s", "data_wait_s", "tokens_per_s", "rerun")}
        for record in records
    ]


DP2 = {"mesh.dp": 2}
EXPERTS = {"model.experts.count": 4, "model.experts.bias_rate": 1e-2, "model.experts.aux_loss": 1e-2}
MESHES = [
    {},
    DP2,
    {"mesh.tp": 2, "mesh.dp": 2},
    {"mesh.pp": 2, "mesh.dp": 2},
    {**DP2, "observe.gradient_noise": True, "observe.layer_norms": 1},
    pytest.param({**DP2, "data_parallel.zero": 2}, marks=pytest.mark.slow),
    {**DP2, "data_parallel.zero": 3, **EXPERTS},
    {**DP2, "determinism": "canonical", "cluster.threads_per_worker": 1},
    pytest.param({"mesh.cp": 2, **EXPERTS, "mesh.ep": 2}, marks=pytest.mark.slow),
    pytest.param({"mesh.pp": 2, "pipeline.schedule": "zb-v", **DP2}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("factor", [NAN, HUGE], ids=["nan", "leap"])
@pytest.mark.parametrize("changes", MESHES, ids=str)
def test_a_transient_fault_leaves_no_trace(world, changes, factor):
    shape = MeshShape.of(BASE.replace(**changes).mesh)
    truth = world.run(shape.world, plain, changes)
    found = world.run(shape.world, faulty, changes, shape.world - 1, [factor])
    for (records, expected), (others, values, runs) in zip(truth, found, strict=True):
        assert runs == 2
        assert same(expected, values)
        assert untimed(records) == untimed(others)
        rerun = others[BAD - 1]["rerun"]
        assert (rerun["what"], rerun["runs"]) == ("not finite" if math.isnan(factor) else "spike", 2)
        assert (rerun["transient"], rerun["action"]) == (True, "keep")
        assert [record["step"] for record in others if "rerun" in record] == [BAD]
        if shape.dp > 1 or shape.world == 1:
            assert shape.world - 1 in rerun["ranks"]
            assert all(shape.coords(rank).dp == shape.dp - 1 for rank in rerun["ranks"]), "the replica of the fault"


@pytest.mark.parametrize("changes", [{}, DP2], ids=str)
def test_a_deterministic_fault_is_skipped_with_its_samples_and_its_rate(world, changes):
    ranks = MeshShape.of(BASE.replace(**changes).mesh).world
    found = world.run(ranks, faulty, changes, 0, [NAN] * 9)
    truth = world.run(ranks, plain, changes, [BAD])
    for (expected, end), (records, values, runs) in zip(truth, found, strict=True):
        assert runs == 2, "equal to the bit: a third run would tell nothing"
        assert same(end, values)
        assert [record["lr"] for record in expected] == [record["lr"] for record in records]
        assert [record["step"] for record in records if record.get("skipped")] == [BAD]
        assert records[BAD - 1]["rerun"]["action"] == "skip"
        assert not records[BAD - 1]["rerun"]["transient"]
        assert records[BAD - 1]["rerun"]["ranks"] == (0,)


def test_runs_that_differ_each_time_end_after_three():
    records, _, runs = faulty(0, {"guard.on_spike": "skip"}, 0, [1e6, 1e7, 1e8, 1e9])
    assert runs == 3
    assert records[BAD - 1]["skipped"]
    assert len(set(records[BAD - 1]["rerun"]["grad_norms"])) == 3


def test_a_leap_is_kept_unless_the_policy_says_otherwise():
    quiet, end, _ = faulty(0, {"guard.spike": 1e9}, 0, [HUGE] * 9)
    records, values, runs = faulty(0, {}, 0, [HUGE] * 9)
    assert (runs, records[BAD - 1]["rerun"]["action"]) == (2, "keep")
    assert same(end, values)
    assert untimed(quiet) == untimed(records)
    skipped, values, _ = faulty(0, {"guard.on_spike": "skip"}, 0, [HUGE] * 9)
    assert skipped[BAD - 1]["skipped"]
    assert same(values, plain(0, {}, [BAD])[1])


def stopping(rank, changes, factors):
    trainer = trainer_of(rank, changes)
    Fault(trainer, factors)
    try:
        train(trainer)
    except (GuardError, Rollback) as error:
        return type(error), str(error), getattr(error, "back_to", None), trainer.step, weights(trainer)
    return None


def test_stop_names_the_step_its_samples_and_the_remedy(world):
    before = world.run(2, plain, {**DP2, "steps": BAD - 1})
    assert len(before) == 2
    for kind, text, _, step, _ in world.run(2, stopping, {**DP2, "guard.on_nonfinite": "stop"}, [NAN] * 9):
        assert kind is GuardError
        assert step == BAD - 1
        assert text.startswith("step 7, samples 24 to 27: loss ")
        assert "gradient norm nan" in text
        assert "remedy: " in text


def rolled_back(rank, changes, directory):
    """Trains to the fault, goes back to the newest generation that is old enough, and skips the step there."""
    trainer, generations = trainer_of(rank, changes), {}
    Fault(trainer, [HUGE] * 9)
    try:
        while True:
            trainer.train_step()
            generations[trainer.step] = trainer.save(directory)
    except Rollback as rollback:
        back = max(step for step in generations if step <= rollback.back_to)
        again = trainer_of(rank, changes)
        again.load(generations[back])
        again.skip([rollback.step])
        halfway = train(again, BAD + 1)
        saved = again.save(directory / "after")
        resumed = trainer_of(rank, changes)
        resumed.load(saved)
        return rollback.step, back, halfway, weights(again), sorted(resumed.engine.guard.skip)


def test_rollback_goes_back_and_skips_the_step_when_it_comes_again(world, tmp_path):
    changes = {**DP2, "guard.on_spike": "rollback", "guard.rollback_steps": 3}
    truth = world.run(2, plain, changes, [BAD])
    for (_, end), (step, back, records, values, skip) in zip(
        truth, world.run(2, rolled_back, changes, tmp_path), strict=True
    ):
        assert (step, back) == (BAD, BAD - 3)
        assert [record["step"] for record in records if record.get("skipped")] == [BAD]
        assert same(end, values)
        assert skip == [BAD]


def test_steps_skipped_in_a_row_end_the_run():
    trainer = trainer_of(0, {"guard.max_skipped": 3})
    with torch.no_grad():
        trainer.engine.model.params[0].fill_(NAN)
    for _ in range(3):
        assert trainer.train_step()["skipped"]
    with pytest.raises(GuardError, match=r"after 3 skipped steps in a row \(guard.max_skipped\)"):
        trainer.train_step()


def test_a_resumed_run_decides_alike(tmp_path):
    whole = trainer_of(0, {})
    train(whole, BAD - 1)
    saved = whole.save(tmp_path)
    records, resumed = [], trainer_of(0, {})
    resumed.load(saved)
    for trainer in (whole, resumed):
        Fault(trainer, [HUGE])
        records.append(train(trainer)[0])
    assert records[0]["rerun"] == records[1]["rerun"]


def test_an_overflow_of_fp16_is_no_fault():
    trainer = trainer_of(0, {"precision.dtype": "fp16", "precision.loss_scale": 2.0**15})
    fault = Fault(trainer, [NAN] * 9)
    records = train(trainer)
    assert fault.runs == 1
    assert "rerun" not in records[BAD - 1]
    assert records[BAD - 1]["skipped"]
    assert records[BAD]["loss_scale"] == 2.0**14


AT_ONCE = {"optimizer.at_once": True, "optimizer.clip_norm": None}


def test_steps_that_update_at_once_are_not_run_again(tmp_path):
    trainer = trainer_of(0, AT_ONCE)
    fault = Fault(trainer, [HUGE] * 9)
    while trainer.step < STEPS:
        trainer.train_step()
    trainer.settle()
    assert fault.runs == 1
    with pytest.raises(ConfigError, match="at once"):
        trainer.skip([STEPS + 1])
    waiting = trainer_of(0, {})
    waiting.skip([3])
    with pytest.raises(CheckpointError, match="skip step 3"):
        trainer.load(waiting.save(tmp_path))


def test_findings_are_sentences_and_travel():
    found = Finding("spike", "loss 9 where 2 ± 0.04 is usual", 2, True, (3,), (9.0, 2.0), (1.0, 1.0), "keep")
    assert str(found) == (
        "loss 9 where 2 ± 0.04 is usual, but not when the step was run again: a transient fault on rank 3; "
        "the good run counts"
    )
    assert str(found._replace(transient=False, ranks=(0, 1), action="skip")).endswith(
        "on ranks 0, 1, in each of 2 runs: skip"
    )
    error = Rollback(7, 3, found)
    again = pickle.loads(pickle.dumps(error))
    assert (again.step, again.back_to, again.finding, str(again)) == (7, 3, found, str(error))
