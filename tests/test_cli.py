"""The command line: what is answered without Ray, and how problems come out."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

import raytron
from raytron import cli
from raytron.config import load
from raytron.training.run_directory import RunDirectory, differences, settle

QUICKSTART = str(Path(__file__).parents[1] / "examples" / "quickstart.yaml")


@pytest.fixture
def no_ray(monkeypatch):
    """Fails a test that starts or joins a Ray."""
    from raytron.actors import cluster

    def started(*_arguments, **_options):
        raise AssertionError("Ray was started")

    monkeypatch.setattr(cluster.ray, "init", started)


def said(capsys, *arguments):
    code = cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_plan_is_made_without_torch_and_ray_in_about_a_second():
    text = (
        "import sys; from raytron import cli; code = cli.main(['plan', sys.argv[1], 'mesh.tp=1']); "
        "print(sorted({'torch', 'ray', 'numpy', 'pyarrow'} & set(sys.modules)), code)"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", text, QUICKSTART], capture_output=True, text=True, timeout=30)
    assert done.stdout.splitlines()[-1] == "[] 0", done.stdout + done.stderr
    assert "PP2·DP1·CP1·TP1" in done.stdout
    assert time.perf_counter() - start < 5  # about 0.2 s on an idle core


def test_a_preset_is_as_good_as_a_file(capsys):
    code, out, _ = said(capsys, "plan", "llama3_8b_8xh100", "steps=777")
    assert code == 0
    assert "777 steps" in out


def test_all_problems_of_a_configuration_come_at_once_before_ray(capsys, no_ray, tmp_path):
    changes = ["model.heads=7", "global_batch_size=15", "lr.warmup_steps=200", f"run_dir={tmp_path}"]
    code, _, err = said(capsys, "train", QUICKSTART, *changes)
    assert code == 2
    assert all(where in err for where in ("model.heads", "mesh.tp", "global_batch_size", "lr.warmup_steps", "remedy"))
    assert "Traceback" not in err


def test_unknown_keys_are_named_with_the_nearest_one(capsys, no_ray):
    code, _, err = said(capsys, "train", QUICKSTART, "mesh.pt=2", "stepz=3")
    assert code == 2
    assert "did you mean mesh." in err
    assert "did you mean steps?" in err


def test_a_missing_file_preset_and_source_are_problems(capsys, no_ray, tmp_path):
    assert said(capsys, "train", "nowhere.yaml")[0] == 2
    code, _, err = said(capsys, "train", "quickstart_4xgpu")
    assert code == 2
    assert "quickstart_4xcpu" in err
    code, _, err = said(capsys, "train", QUICKSTART, f"data.sources=[{tmp_path}/none]", f"run_dir={tmp_path}/run")
    assert code == 2
    assert "none" in err


def test_a_run_directory_of_another_configuration_lists_each_difference(tmp_path):
    before, _ = settle(load(QUICKSTART, [f"run_dir={tmp_path}", "steps=50"]))
    assert before.lr.decay_steps == 50  # fixed when the run begins
    now = before.replace(steps=90, seed=3, **{"model.hidden": 128, "mesh.tp": 1, "evaluate.prompt": "x"})
    assert [problem.where for problem in differences(before, now)] == ["seed", "model.hidden"]
    allowed = now.replace(**{"resume.allow": ["seed", "model"]})
    assert differences(before, allowed) == []


def test_a_run_directory_without_a_checkpoint_may_begin_anew(tmp_path):
    before, _ = settle(load(QUICKSTART, [f"run_dir={tmp_path}"]))
    RunDirectory(tmp_path).write_config(before)
    again, found = settle(load(QUICKSTART, [f"run_dir={tmp_path}", "seed=5", "steps=7"]))
    assert found == []
    assert again.lr_horizon == 7


def test_other_errors_are_one_line_and_a_hint(capsys, tmp_path):
    code, _, err = said(capsys, "inspect", tmp_path)
    assert code == 1
    assert err.startswith("raytron: ")
    assert "Traceback" not in err


def test_every_command_has_help(capsys):
    for command in ("train", "plan", "tokenize", "inspect", "generate", "status", "stop"):
        with pytest.raises(SystemExit) as left:
            cli.main([command, "--help"])
        assert left.value.code == 0
        assert command in capsys.readouterr().out


def test_public_names_are_there_and_lazy():
    for name in raytron.__all__:
        assert getattr(raytron, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        raytron.trian  # noqa: B018
