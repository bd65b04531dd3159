"""The command line, as far as it goes without Ray: plans, problems, exit codes, what is imported."""

import json
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from raytron import cli, presets
from raytron.checkpoint import catalog
from raytron.checkpoint.record import Records
from raytron.config import load
from raytron.observe.records import Metrics
from raytron.training.run_directory import RunDirectory, settle

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart.yaml"
COMMANDS = (
    "train",
    "plan",
    "tokenize",
    "inspect",
    "generate",
    "upcycle",
    "status",
    "stop",
    "pause",
    "resume",
    "set-lr",
    "remesh",
)
NO_RAY = "import sys\nsys.modules['ray'] = None\nfrom raytron.cli import main\nsys.exit(main(sys.argv[1:]))"
SMALL = {
    "name": "small",
    "steps": 10,
    "global_batch_size": 4,
    "sequence_length": 32,
    "model": {"layers": 2, "hidden": 32, "heads": 2, "ffn": 48, "vocab": 300},
    "data": {"tokenizer": {"vocab": 300}},
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """No test sees, or leaves, files of the checkout."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def no_ray(monkeypatch):
    """Fails a test in which a command would start or join Ray."""

    def refuse(*arguments, **options):
        raise AssertionError("Ray was started")

    monkeypatch.setattr("ray.init", refuse)
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # other tests of this process may hold a Ray


@pytest.fixture
def run(capsys):
    """Runs a command; its exit code, output and errors."""

    def call(*arguments):
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as left:  # argparse
            code = left.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def small(tmp_path):
    """A configuration file of a small run."""
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps({**SMALL, "run_dir": str(tmp_path / "runs" / "small")}))
    return path


@pytest.fixture
def complete(small):
    """The run of `small`, committed to its end; its run directory."""
    settled, _ = settle(load(small))
    directory = RunDirectory(Path(settled.run_dir))
    directory.write_config(settled)
    metrics = Metrics(directory.metrics)
    for step in range(1, 11):
        metrics.append({"step": step, "loss": 6.0 - step / 4})
    catalog.commit(catalog.create(directory.checkpoints, 10), 10, 2, {"step": 10}, Records({}, {}))
    return directory.path


# ---- plan


def test_a_plan_is_one_page(run):
    code, out, err = run("plan", QUICKSTART)
    assert (code, err) == (0, "")
    for text in ("quickstart: ", "million parameters", "PP2·DP1·CP1·TP2: 4 workers", "rank 1 │", "expected bubble"):
        assert text in out
    assert 10 < len(out.splitlines()) < 60


def test_an_elastic_plan_tells_what_follows_a_loss(run):
    out = run("plan", QUICKSTART, "elastic.min_workers=1")[1]
    assert "at least 1 worker; where some are lost:" in out
    assert "where some are lost" not in run("plan", QUICKSTART)[1]


def test_overrides_change_the_plan(run):
    out = run("plan", QUICKSTART, "mesh.tp=1", "mesh.dp=2", "pipeline.schedule=zb-h1")[1]
    assert "PP2·DP2·CP1·TP1" in out
    assert "zb-h1" in out


def test_a_preset_is_planned_by_its_name(run):
    code, out, _ = run("plan", "llama3_70b_64xh100", "steps=700")
    assert code == 0
    assert "70.55 billion parameters, 700 steps" in out


@pytest.mark.parametrize("arguments", [("--svg", "a.svg", "mesh.tp=1"), ("mesh.tp=1", "--svg", "a.svg")])
def test_a_schedule_is_drawn_into_a_file(run, arguments, tmp_path):
    code, out, _ = run("plan", QUICKSTART, *arguments)
    assert code == 0
    assert "TP1" in out
    assert ElementTree.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")


def test_a_file_that_can_not_be_written_is_said(run):
    code, _, err = run("plan", QUICKSTART, "--svg", "no/such/folder/a.svg")
    assert code == 1
    assert "no/such/folder/a.svg can't be written" in err


def test_a_plan_imports_neither_torch_nor_ray_and_answers_in_about_a_second():
    code = (
        "import sys\nfrom raytron.cli import main\nassert main(sys.argv[1:]) == 0\n"
        "heavy = sorted({'torch', 'ray', 'numpy', 'pyarrow', 'tokenizers', 'rich'} & set(sys.modules))\n"
        "assert not heavy, heavy"
    )
    best = min(_seconds(code, "plan", str(QUICKSTART)) for _ in range(2))
    assert best < 3.0, f"{best:.1f} s"  # 0.2 s on an idle core


def _seconds(code, *arguments):
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return time.monotonic() - start


# ---- problems


@pytest.mark.parametrize("command", ["plan", "train"])
def test_all_problems_are_told_at_once_before_ray(run, no_ray, command):
    code, out, err = run(command, QUICKSTART, "mesh.tp=3", "lr.peak=-1", "model.layers=0")
    assert (code, out) == (2, "")
    for where in ("mesh.tp", "lr.peak", "model.layers"):
        assert f"  {where}: " in err
    assert err.count("remedy: ") >= 3
    assert "Traceback" not in err


@pytest.mark.parametrize("command", ["plan", "train", "tokenize"])
def test_unknown_keys_are_refused_with_the_nearest_name(run, no_ray, command):
    code, _, err = run(command, QUICKSTART, "model.layer=3", "mesh.tq=2")
    assert code == 2
    assert "did you mean model.layers?" in err
    assert "did you mean mesh.tp?" in err


@pytest.mark.parametrize("command", ["train", "tokenize"])
def test_missing_data_is_told_before_ray(run, no_ray, command):
    code, _, err = run(command, QUICKSTART, "data.sources=[no/such/text]", "run_dir=here")
    assert code == 2
    assert "no/such/text does not exist" in err
    assert not Path("here").exists()


def test_problems_of_data_stand_beside_the_others(run, no_ray):
    err = run("train", QUICKSTART, "data.sources=[no/such/text]", "mesh.tp=3", "run_dir=here")[2]
    assert "no/such/text" in err
    assert "mesh.tp" in err


def test_another_configuration_in_a_run_directory_is_refused_before_ray(run, no_ray, small, complete):
    code, _, err = run("train", small, "seed=4", "model.ffn=64", "steps=20")
    assert code == 2
    assert err.startswith("2 problems")
    assert "was begun with 0" in err
    assert "resume.allow=model.ffn" in err


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ("no_such.yaml", "No such file"),
        ("quickstart", "did you mean quickstart_4xcpu?"),
        (QUICKSTART.parent, "Is a directory"),
    ],
    ids=["no file", "no preset", "a folder"],
)
def test_a_configuration_that_is_not_there(run, config, text):
    code, _, err = run("plan", config)
    assert code == 2
    assert text in err


def test_an_override_is_a_key_and_a_value(run):
    code, _, err = run("plan", QUICKSTART, "mesh.tp")
    assert code == 2
    assert "not of the form key=value" in err


@pytest.mark.parametrize("arguments", [(), ("trian",), ("plan",), ("plan", "a", "--fast"), ("stop",)], ids=" ".join)
def test_a_wrong_command_shows_the_usage(run, arguments):
    code, _, err = run(*arguments)
    assert code == 2
    assert "usage: raytron" in err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert f"usage: raytron {command}" in out


# ---- a run that is complete


def test_a_complete_run_says_so_without_ray(run, no_ray, small, complete):
    code, out, err = run("train", small)
    assert (code, err) == (0, "")
    assert "small is complete: step 10 of 10" in out
    assert "loss             3.5000" in out


def test_fewer_steps_than_were_run_are_complete_too(run, no_ray, small, complete):
    code, out, _ = run("train", small, "steps=3", "mesh.tp=2", "mesh.pp=2")
    assert code == 0
    assert "complete" in out


def test_the_status_of_a_run_at_rest_is_read_from_its_directory(run, no_ray, complete):
    code, out, _ = run("status", "small")  # a name below runs/
    assert code == 0
    assert dict(line.split() for line in out.splitlines())["phase"] == "complete"
    facts = json.loads(run("status", complete, "--json")[1])
    assert (facts["name"], facts["step"], facts["steps"], facts["loss"]) == ("small", 10, 10, 3.5)


def test_a_run_whose_cluster_is_gone_is_not_at_work(run, no_ray, complete):
    RunDirectory(complete).write_controller({"address": "127.0.0.1:1", "name": "small"})
    code, out, _ = run("status", complete, "--json")
    assert code == 0
    assert json.loads(out)["phase"] == "complete"
    code, _, err = run("stop", complete)
    assert code == 1
    assert "no Ray cluster answers at 127.0.0.1:1" in err


class Asked:
    """A run that remembers what it was asked."""

    name = "small"

    def __init__(self):
        self.calls = []

    def __getattr__(self, method):
        return lambda *arguments, **keys: self.calls.append((method, *arguments, keys))


def test_a_run_at_work_is_paused_resumed_and_given_another_rate(run, monkeypatch):
    asked = Asked()
    monkeypatch.setitem(cli.LAZY, "attach", (__name__, "attach"))
    monkeypatch.setattr(sys.modules[__name__], "attach", lambda name, address: asked, raising=False)
    for command, overrides, says in (
        ("pause", (), "small pauses after the step"),
        ("resume", (), "small goes on"),
        ("set-lr", ("peak=0.0001", "final=1e-5"), "small has another learning rate"),
    ):
        code, out, err = run(command, "small", *overrides)
        assert (code, err) == (0, ""), command
        assert says in out
    told = [call for call in asked.calls if call[0] != "close"]
    assert told == [("pause", {}), ("resume", {}), ("set_lr", {"peak": 1e-4, "final": "1e-5"})]
    assert len(asked.calls) == 6
    code, _, err = run("set-lr", "small", "peak")
    assert code == 2
    assert "is not of the form key=value" in err


def test_a_mesh_larger_than_this_machine_is_refused_before_ray(run, no_ray, tmp_path):
    code, _, err = run("train", QUICKSTART, "mesh.dp=64", "global_batch_size=256", f"run_dir={tmp_path / 'run'}")
    assert code == 2
    assert "PP2·DP64·CP1·TP2 needs 256 workers" in err
    assert "has room for" in err


# ---- inspect, generate


def test_a_checkpoint_is_shown_by_any_of_its_paths(run, complete):
    for path in (complete, complete / "checkpoints", next((complete / "checkpoints").iterdir())):
        code, out, _ = run("inspect", path, "--verify")
        assert code == 0
        assert "step        10, committed" in out


def test_a_data_set_is_told_from_a_checkpoint(run, tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    code, _, err = run("inspect", tmp_path)
    assert code == 1
    assert "is not the manifest of a data set" in err


@pytest.mark.parametrize("arguments", [("inspect",), ("generate", "--prompt", "a")], ids=" ".join)
def test_where_there_is_nothing_that_is_said(run, arguments):
    code, _, err = run(*arguments, "nowhere")
    assert code == 1
    assert err.startswith("raytron: nowhere")
    assert "Traceback" not in err


# ---- the process


def test_commands_without_ray_run_where_there_is_no_ray(complete):
    for arguments in (("plan", "gpt2_124m_1xcpu"), ("inspect", str(complete))):
        done = subprocess.run([sys.executable, "-c", NO_RAY, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_a_reader_that_leaves_is_no_error():
    command = f"'{sys.executable}' -m raytron.cli plan '{QUICKSTART}' | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


def test_every_lazy_name_exists():
    for name in cli.LAZY:
        assert callable(cli.lazy(name)), name


def test_a_configuration_is_read_from_any_kind_of_source(small):
    config = load(small)
    for source in (config, small, str(small), {**SMALL, "run_dir": config.run_dir}):
        assert presets.read(source) == config
        assert presets.read(source, ["steps=3"]).steps == 3
    assert presets.read("quickstart_4xcpu") == presets.quickstart_4xcpu()
