"""Which records rank 0 keeps beside its state: those that the driver may not know, the newest where there are too many."""

import json
import math

from raytron.training.journal import Journal


def steps(lines):
    return [json.loads(line)["step"] for line in lines]


def record(step, **more):
    return {"step": step, "loss": 0.5 * step, "request": 3, **more}


def test_what_the_driver_knows_is_left_out():
    known = 0
    journal = Journal(lambda: known, 10_000)
    for step in (1, 2, 3):
        journal.add(record(step))
    assert steps(journal.lines(3)) == [1, 2, 3]
    known = 2
    assert steps(journal.lines(3)) == [3]
    journal.add(record(4))
    assert steps(journal.lines(9)) == [3, 4]
    assert steps(journal.lines(3)) == [3], "of the step that is parked"


def test_the_step_at_hand_is_told_before_it_is_added():
    journal = Journal(lambda: 0, 10_000)
    journal.add(record(1))
    assert steps(journal.lines(2, record(2))) == [1, 2]
    assert steps(journal.lines(2)) == [1]


def test_of_too_many_the_newest_stay():
    one = len(Journal(lambda: 0, 1000).lines(1, record(11))[0]) + 1
    journal = Journal(lambda: 0, 3 * one)
    for step in range(11, 19):
        journal.add(record(step))
    assert steps(journal.lines(99)) == [16, 17, 18]
    assert steps(journal.lines(99, record(19))) == [17, 18, 19]
    assert sum(len(line) + 1 for line in journal.lines(99)) <= 3 * one


def test_numbers_come_back_to_the_bit():
    journal = Journal(lambda: 0, 10_000)
    journal.add(record(1, loss=1 / 3, grad_norm=math.nan))
    (line,) = journal.lines(1)
    assert b"\n" not in line
    told = json.loads(line)
    assert told["loss"] == 1 / 3
    assert math.isnan(told["grad_norm"])
    assert "request" not in told
