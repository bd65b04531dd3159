"""What may be asked of a run, and what not, where it stands: without a run."""

from __future__ import annotations

import pytest

from raytron.actors.desk import Desk
from raytron.actors.worker import Request
from raytron.config import load
from raytron.errors import ClusterError, ConfigError


@pytest.fixture
def desk(tmp_path):
    keys = {"name": "small", "run_dir": str(tmp_path / "run"), "steps": 100, "lr": {"peak": 1e-3, "final": 1e-5}}
    made = Desk(load({**keys, "observe": {"ray_metrics": False}}))
    yield made
    made.lines.close()


def test_a_rate_is_asked_for_in_keys_of_lr(desk):
    desk.set_lr({"peak": "1e-4"})
    desk.set_lr({"final": 1e-6})
    assert desk._asked == Request.PAUSE
    config = desk._with_rates(desk._rates, 40)
    assert config.lr.at(39) == config.lr
    assert (config.lr.at(40).peak, config.lr.at(40).final) == (1e-4, 1e-6)
    desk.config = config
    again = desk._with_rates({"peak": 2e-4}, 40)
    assert [each.given for each in again.lr.changes] == [{"peak": 2e-4, "final": 1e-6}]
    earlier = desk._with_rates({"peak": 5e-4}, 20)
    assert [each.start_step for each in earlier.lr.changes] == [20, 40]


@pytest.mark.parametrize(
    ("keys", "where", "what"),
    [
        ({"peak": -1e-4}, "lr.peak", "-0.0001 is too small"),
        ({"peak": float("nan")}, "lr.peak", "nan"),
        ({"peak": "fast"}, "lr.peak", "'fast' is not a finite number or null"),
        ({"pek": 1e-4}, "lr.pek", "did you mean lr.peak?"),
        ({"peak": 1e-6}, "lr.peak", "below the final rate 1e-05"),
        ({"stable_fraction": 0.5}, "lr.stable_fraction", "other decays than wsd"),
        ({"warmup_steps": 5}, "lr.warmup_steps", "unknown key"),
        ({"start_step": 7, "peak": 1e-4}, "lr.start_step", "is the next step"),
        ({}, "lr", "changes nothing"),
    ],
)
def test_a_rate_that_can_not_be_is_refused_and_nothing_changes(desk, keys, where, what):
    with pytest.raises(ConfigError) as caught:
        desk.set_lr(keys)
    assert caught.value.problems[0].where == where
    assert what in str(caught.value)
    assert "changes[" not in str(caught.value)
    assert not desk._rates
    assert desk._asked == Request.NONE


def test_only_a_paused_run_is_resumed(desk):
    with pytest.raises(ClusterError, match=r"small is not paused \(starting\)"):
        desk.resume()
    assert desk.pause() == "starting"
    desk.resume()
    with pytest.raises(ClusterError, match="is not paused"):
        desk.resume()


@pytest.mark.parametrize(
    "ask", [lambda desk: desk.pause(), lambda desk: desk.resume(), lambda desk: desk.set_lr({"peak": 1})]
)
def test_nothing_is_asked_of_a_run_that_takes_no_step_any_more(desk, ask):
    desk._step, desk._phase = 100, "continuing the prompt"
    with pytest.raises(ClusterError, match=r"small can't .*: its last step is done \(continuing the prompt\)"):
        ask(desk)
    desk._step = 50
    desk.request(int(Request.STOP))
    with pytest.raises(ClusterError, match="it is about to stop"):
        ask(desk)
    desk._asked, desk._outcome, desk._phase = Request.NONE, ClusterError("broken"), "over"
    with pytest.raises(ClusterError, match=r"its last step is done \(over\)"):
        ask(desk)
