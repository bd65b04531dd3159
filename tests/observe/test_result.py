"""The result of a run, as its directory tells it."""

import pytest

from raytron.observe.records import JsonLines, Metrics, event
from raytron.observe.result import Result, read_result


@pytest.fixture
def run_dir(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    for step in range(1, 7):
        metrics.append({"step": step, "loss": 6.0 - step / 2, "step_time_s": 0.1})
    events = JsonLines(tmp_path / "events.jsonl")
    for record in (
        event("data", "data", unigram_entropy=5.25),
        event("restart", "restart 1"),
        event("evaluate", "early", validation_loss=5.0),
        event("evaluate", "late", validation_loss=3.5),
        event("continuation", "text", text=" return <None>"),
    ):
        events.append(record)
    return tmp_path


def test_a_result_gathers_what_the_files_say(run_dir):
    result = read_result("mine", run_dir, 6, "step-6", 6)
    assert result.status == "complete"
    assert result.losses == [5.5, 5.0, 4.5, 4.0, 3.5, 3.0]
    assert (result.final_loss, result.validation_loss, result.unigram_entropy) == (3.0, 3.5, 5.25)
    assert (result.continuation, result.restarts) == (" return <None>", 1)


def test_a_run_short_of_its_steps_is_stopped_and_later_records_do_not_count(run_dir):
    result = read_result("mine", run_dir, 10, "step-4", 4)
    assert result.status == "stopped"
    assert result.metrics.column("step") == [1, 2, 3, 4]


def test_a_result_prints_itself(run_dir):
    result = read_result("mine", run_dir, 6, "step-6", 6)
    assert str(result) == repr(result)
    assert str(result).splitlines() == [
        "mine: complete",
        "  steps            6 of 6",
        "  loss             3.0000",
        "  validation loss  3.5000",
        "  unigram entropy  5.2500",
        "  checkpoint       step-6",
        "  restarts         1",
    ]
    drawn = result._repr_html_()
    assert "<svg" in drawn
    assert "unigram entropy" in drawn


def test_a_run_without_a_step_has_a_result_too(tmp_path):
    result = read_result("mine", tmp_path, 6, None, 0)
    assert isinstance(result, Result)
    assert (result.final_loss, result.losses, len(result.metrics)) == (None, [], 0)
    assert "6" in result._repr_html_()
