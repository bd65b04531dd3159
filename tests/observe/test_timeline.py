from raytron.observe.timeline import WIDTH, draw, epochs


def said(time, event, **facts):
    return {"time": float(time), "event": event, "message": event, **facts}


STORY = [
    said(100, "plan"),
    said(110, "workers", epoch=1, step=0, mesh="DP2"),
    said(130, "lost", step=12, why="rank 1: the process died"),
    said(132, "workers", epoch=2, step=11, mesh="DP1"),
    said(150, "complete", step=20),
]


def test_each_epoch_has_its_time_its_steps_and_its_reason():
    one, two = epochs(STORY)
    assert (one.begin, one.end, one.first, one.last) == (110, 130, 1, 11)
    assert (two.begin, two.end, two.first, two.last) == (132, 150, 12, 20)
    assert (two.pause_s, two.why) == (2, "rank 1: the process died")


def test_the_drawing_has_a_line_for_each_epoch_to_scale():
    first, second = draw(STORY).splitlines()
    assert first.count("━") == WIDTH // 2
    assert second.index("━") > first.rindex("━")
    assert second.endswith("steps 12 to 20   rank 1: the process died; 2.0 s")


def test_an_earlier_launch_is_left_out_and_an_empty_log_draws_nothing():
    assert draw([]) == ""
    assert len(epochs([*STORY, said(200, "plan"), said(210, "workers", epoch=1, step=20, mesh="DP4")])) == 1
