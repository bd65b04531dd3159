"""Loss curves and pages for notebooks."""

import xml.etree.ElementTree as ElementTree

from raytron.observe.draw import loss_curve, page

SVG = "{http://www.w3.org/2000/svg}"


def curve(losses, floor=None):
    return loss_curve([{"step": step, "loss": loss} for step, loss in enumerate(losses, start=1)], floor)


def points_of(svg):
    line = ElementTree.fromstring(svg).find(f"{SVG}polyline")
    return [tuple(map(float, pair.split(","))) for pair in line.get("points").split()]


def test_a_falling_loss_is_drawn_falling_from_left_to_right():
    points = points_of(curve([4.0, 3.0, 2.0]))
    assert points == sorted(points)
    assert [y for _, y in points] == sorted(y for _, y in points)  # y grows downwards


def test_long_runs_are_thinned_out():
    assert 2 <= len(points_of(curve([1.0] * 5000))) <= 400


def test_losses_that_are_not_finite_leave_a_gap():
    assert len(points_of(curve([4.0, None, 2.0]))) == 2


def test_fewer_than_two_points_make_no_picture():
    assert curve([4.0]) == ""
    assert curve([None, None, 1.0]) == ""


def test_the_floor_is_a_line_with_a_name():
    assert "unigram entropy" in curve([4.0, 2.0], floor=3.0)
    assert "unigram entropy" not in curve([4.0, 2.0])


def test_a_page_escapes_what_it_shows_and_leaves_out_what_is_unknown():
    made = page("<run>", [("loss", 1.5), ("mfu", None), ("prompt", "a<b")])
    assert "&lt;run&gt;" in made
    assert "a&lt;b" in made
    assert "mfu" not in made
