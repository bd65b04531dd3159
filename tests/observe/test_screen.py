"""A run on the screen, in a terminal and elsewhere."""

import io
from typing import NamedTuple

import pytest

from raytron.observe import progress
from raytron.observe.progress import Screen, clock
from raytron.observe.records import event


class News(NamedTuple):
    events: list
    metrics: list


class Terminal(io.StringIO):
    def isatty(self):
        return True


def metric(step, loss=4.0):
    return {"step": step, "loss": loss, "tokens": 1000, "step_time_s": 0.5}


def shown(steps, *news, file=None):
    file = file or io.StringIO()
    with Screen(steps, file) as screen:
        for item in news:
            screen.news(item)
    return file.getvalue()


def test_plain_lines_say_step_loss_speed_and_what_is_left():
    text = shown(100, News([], [metric(1, 4.25)]))
    assert text == "step     1/100  loss 4.250  2,000 tokens/s  500 ms/step  0:00:50 left\n"


def test_skipped_steps_are_counted():
    assert "left  2 skipped\n" in shown(100, News([], [{**metric(3), "skipped_steps": 2}]))


def test_plain_lines_come_now_and_then_and_at_the_end():
    text = shown(50, News([], [metric(step) for step in range(1, 51)]))
    assert [line.split()[1] for line in text.splitlines()] == ["1/50", "50/50"]


def test_what_is_not_shown_yet_comes_before_an_event():
    text = shown(9, News([], [metric(1), metric(2)]), News([event("checkpoint", "checkpoint of step 2")], []))
    assert [line[:10] for line in text.splitlines()] == ["step     1", "step     2", "checkpoint"]


def test_a_page_is_printed_whole_instead_of_its_message():
    text = shown(9, News([event("plan", "plan: PP2", page="a page\nof [two] lines")], []))
    assert text == "\na page\nof [two] lines\n\n"


def test_preparation_is_told_now_and_then(monkeypatch):
    lines = [event("preparing", f"tokenized {n} MiB", fraction=n / 10) for n in range(10)]
    assert shown(9, News(lines, [])) == "preparing data: tokenized 0 MiB\n"
    monkeypatch.setattr(progress, "PREPARING_EVERY_S", 0.0)
    assert shown(9, News(lines, [])).count("\n") == 10


def test_a_loss_that_is_not_finite_is_said():
    assert "loss not finite" in shown(9, News([], [metric(1, None)]))


@pytest.mark.parametrize("loss", [4.25, None])
def test_a_terminal_gets_a_bar(loss, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    text = shown(10, News([], [metric(10, loss)]), file=Terminal())
    assert "step   10/10" in text
    assert "━" in text
    assert "2,000 tokens/s" in text


def test_clock():
    assert [clock(seconds) for seconds in (0, 59.6, 3723)] == ["0:00:00", "0:01:00", "1:02:03"]
