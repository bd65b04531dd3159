from raytron.actors.adoption import outstanding
from raytron.actors.moves import AS_ASKED
from raytron.actors.worker import Request


def asked(step, **facts):
    return {"event": "asked", "step": step, **facts}


def test_nothing_is_outstanding_where_nothing_was_asked_for():
    assert outstanding([{"event": "workers", "step": 0}, {"event": "checkpoint", "step": 4}]) == (False, {}, False, 0)


def test_the_last_word_on_a_pause_counts():
    assert outstanding([asked(3, paused=True)]).paused
    assert not outstanding([asked(3, paused=True), {"event": "paused", "step": 4}, asked(4, paused=False)]).paused


def test_rates_hold_until_they_were_set_or_refused():
    first, second = asked(3, rates={"peak": 1e-3}), asked(4, rates={"final": 1e-5})
    assert outstanding([first, second]).rates == {"peak": 1e-3, "final": 1e-5}
    assert outstanding([first, {"event": "lr", "step": 4}, second]).rates == {"final": 1e-5}
    assert outstanding([first, {"event": "lr_refused", "step": 4}]).rates == {}


def test_a_mesh_is_asked_for_until_the_run_takes_it():
    remesh = asked(3, mesh="PP1·DP1·CP1·TP2")
    assert outstanding([remesh, {"event": "mesh", "why": "a node will leave", "step": 4}]).remesh
    assert not outstanding([remesh, {"event": "mesh", "why": AS_ASKED, "step": 4}]).remesh


def test_a_checkpoint_is_asked_for_until_there_is_one_of_that_step_or_later_and_the_end_for_good():
    wanted = asked(6, request=int(Request.CHECKPOINT))
    early, late = ({"event": "checkpoint", "step": step} for step in (4, 7))
    assert outstanding([wanted, early]).requests == Request.CHECKPOINT
    assert outstanding([wanted, late]).requests == Request.NONE
    assert outstanding([asked(6, request=int(Request.STOP)), late]).requests == Request.STOP
