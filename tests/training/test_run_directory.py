"""What a run directory holds, and what may change when a run goes on in it."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from raytron.checkpoint import catalog
from raytron.checkpoint.record import Records
from raytron.config import load
from raytron.errors import ConfigError
from raytron.training.run_directory import RunDirectory, differences, occupied, settle


@pytest.fixture
def config(tmp_path):
    return load({"run_dir": str(tmp_path / "run"), "steps": 100})


@pytest.fixture
def begun(config):
    """The settled configuration of a run that has committed step 10."""
    settled, problems = settle(config)
    assert problems == []
    directory = RunDirectory(Path(settled.run_dir))
    directory.write_config(settled)
    catalog.commit(catalog.create(directory.checkpoints, 10), 10, 1, {}, Records({}, {}))
    return settled


def changed(config, **overrides):
    """Where the problems are of going on with other values."""
    return [problem.where for problem in settle(config.replace(**overrides))[1]]


def test_a_new_run_gets_an_absolute_directory_and_a_fixed_horizon(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settled, problems = settle(load({"run_dir": "runs/mine", "steps": 70}))
    assert problems == []
    assert settled.run_dir == str(tmp_path / "runs" / "mine")
    assert settled.lr.decay_steps == 70
    assert not (tmp_path / "runs").exists()


def test_more_steps_keep_the_horizon_that_the_run_began_with(begun, config):
    settled, problems = settle(config.replace(steps=500))
    assert problems == []
    assert (settled.steps, settled.lr.decay_steps) == (500, 100)


def test_a_rate_that_a_live_run_was_given_holds_when_it_goes_on(begun, config):
    changes = [{"start_step": 5, "peak": 1e-4}]
    RunDirectory.of(begun).write_config(begun.replace(**{"lr.changes": changes}))
    settled, problems = settle(config)
    assert problems == []
    assert [(each.start_step, each.given) for each in settled.lr.changes] == [(5, {"peak": 1e-4})]
    assert changed(config, **{"lr.changes": [{"start_step": 5, "peak": 2e-4}]}) == ["lr.changes"]
    taken_back, problems = settle(config.replace(**{"resume.allow": ["lr"]}))
    assert (problems, taken_back.lr.changes) == ([], ())


@pytest.mark.parametrize(("traced", "left"), [((2, 10), None), ((2, 11), (2, 11)), (None, None)])
def test_auto_measures_other_steps_than_those_that_are_past(begun, config, traced, left):
    asked = config.replace(**{"observe.trace_steps": traced, "pipeline.schedule": "auto"})
    assert settle(asked)[0].observe.trace_steps == left
    assert settle(asked.replace(**{"pipeline.schedule": "1f1b"}))[0].observe.trace_steps == traced
    anew = asked.replace(run_dir=f"{config.run_dir}-other")
    assert settle(anew)[0].observe.trace_steps == traced


@pytest.mark.parametrize(
    "overrides",
    [
        {"steps": 5},
        {"name": "other"},
        {"mesh.tp": 2, "mesh.pp": 2},
        {"pipeline.schedule": "zb-h1"},
        {"data_parallel.zero": 2},
        {"micro_batch_size": 4},
        {"checkpoint.every": 7, "evaluate.every": 7, "observe.tensorboard": True, "recovery.max_restarts": 0},
    ],
    ids=str,
)
def test_what_does_not_change_the_result_may_change(begun, overrides):
    assert changed(begun, **overrides) == []


@pytest.mark.parametrize(
    "overrides",
    [
        {"seed": 1},
        {"model.hidden": 512},
        {"global_batch_size": 32, "sequence_length": 128},
        {"lr.peak": 1e-2, "lr.decay_steps": 500},
        {"optimizer.beta2": 0.99, "precision.dtype": "bf16"},
        {"data.max_mb": 3.0, "data.tokenizer.vocab": 300},
    ],
    ids=str,
)
def test_what_changes_the_result_may_not_and_each_key_is_named(begun, overrides):
    assert sorted(changed(begun, **overrides)) == sorted(overrides)


def test_a_problem_says_both_values_and_the_remedy(begun):
    (problem,) = settle(begun.replace(seed=1))[1]
    assert problem.what == f"is 1, but the run in {begun.run_dir} was begun with 0"
    assert "another run_dir" in problem.remedy
    assert "resume.allow=seed" in problem.remedy


@pytest.mark.parametrize(
    ("allow", "left"),
    [
        (["lr.peak"], ["lr.final", "seed"]),
        (["lr"], ["seed"]),
        (["lr", "seed"], []),
        (["l"], ["lr.final", "lr.peak", "seed"]),
    ],
)
def test_resume_allow_admits_keys_and_whole_sections(begun, allow, left):
    overrides = {"lr.peak": 0.5, "lr.final": 0.1, "seed": 3, "resume.allow": allow}
    assert sorted(changed(begun, **overrides)) == left


def test_a_run_without_a_checkpoint_may_begin_anew_in_any_way(config):
    settled, _ = settle(config)
    RunDirectory(Path(settled.run_dir)).write_config(settled)
    again, problems = settle(config.replace(seed=1, steps=30))
    assert problems == []
    assert again.lr.decay_steps == 30


def test_a_directory_that_was_moved_goes_on(begun, tmp_path):
    Path(begun.run_dir).rename(tmp_path / "elsewhere")
    assert changed(begun, run_dir=str(tmp_path / "elsewhere")) == []


def test_a_configuration_that_can_not_be_read_is_a_problem(begun):
    RunDirectory(Path(begun.run_dir)).config.write_text("mesh: [")
    (problem,) = settle(begun)[1]
    assert "not valid YAML" in problem.what


def test_the_stored_configuration_is_the_settled_one(begun):
    directory = RunDirectory(Path(begun.run_dir))
    assert directory.stored() == begun
    assert differences(begun, directory.stored()) == []
    assert directory.newest().step == 10


def test_the_controllers_address_comes_and_goes(config):
    directory = RunDirectory(Path(config.run_dir))
    assert directory.read_controller() is None
    directory.write_controller({"address": "here:1"})
    assert directory.read_controller() == {"address": "here:1"}
    directory.controller.write_text("{torn")
    assert directory.read_controller() is None
    directory.write_controller(None)
    directory.write_controller(None)
    assert not directory.controller.exists()


def test_nothing_stored_is_no_error(config):
    assert RunDirectory(Path(config.run_dir)).stored() is None
    with pytest.raises(ConfigError):
        load(RunDirectory(Path(config.run_dir)).config)


def test_a_directory_in_which_another_process_runs_is_occupied(tmp_path):
    directory = RunDirectory(tmp_path)
    assert occupied(directory) == []
    directory.write_controller({"host": socket.gethostname(), "pid": os.getppid()})
    (problem,) = occupied(directory)
    assert problem.where == "run_dir"
    assert str(os.getppid()) in problem.what
    directory.write_controller({"host": socket.gethostname(), "pid": os.getpid()})
    assert occupied(directory) == []
    directory.write_controller({"host": "elsewhere", "pid": os.getppid()})
    assert occupied(directory) == []
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    directory.write_controller({"host": socket.gethostname(), "pid": gone.pid})
    assert occupied(directory) == []


def test_data_sets_of_a_blend_and_to_validate_on_get_absolute_places(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blend = [{"dataset": "web", "weight": 0.5}, {"dataset": "/code", "weight": 0.5}]
    held = [{"name": "held", "dataset": "held"}, {"name": "none"}]
    settled, _ = settle(config.replace(**{"data.blend": blend, "data.validation": held}))
    assert [source.dataset for source in settled.data.blend] == [str(tmp_path / "web"), "/code"]
    assert [each.dataset for each in settled.data.validation] == [str(tmp_path / "held"), ""]


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({"data.validation": [{"name": "a", "dataset": "a"}]}, []),
        ({"data.blend": [{"dataset": "a"}], "data.blend_block": 64}, []),  # the recipe of the checkpoint tells
        ({"data.blend": [{"dataset": "a"}], "data.document_mask": True}, ["data.document_mask"]),
        ({"data.dataset": "a"}, ["data.dataset"]),
    ],
    ids=str,
)
def test_which_samples_a_blend_names_is_not_told_key_by_key(begun, overrides, told):
    assert changed(begun, **overrides) == told
