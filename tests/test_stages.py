"""Stages as text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytron.errors import ConfigError
from raytron.stages import read_stages, write_stages

TEXTS = {
    "Et|tt|tt|tL": (1, 2, 2, 1),
    "E|(tt|)*3L": (0, 2, 2, 2, 0),
    "Et*4 || t*4L": (4, 0, 4),
    "E((t|)*2tt|)*2L": (1, 1, 2, 1, 1, 2, 0),
    "E(t|)L": (1, 0),
    "EL": (0,),
}


@pytest.mark.parametrize(("text", "sizes"), TEXTS.items())
def test_a_layout_is_read(text, sizes):
    assert read_stages(text) == sizes


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12))
def test_what_is_written_is_read(sizes):
    assert read_stages(write_stages(tuple(sizes))) == tuple(sizes)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "is empty"),
        ("tt|L", "the embedding (E) does not stand once, as the first"),
        ("Ett|", "the loss head (L)"),
        ("Et|L|t", "the loss head (L)"),
        ("EtE|L", "the embedding (E)"),
        ("Ex|L", "'x' can't be read"),
        ("E(t|L", "'(' can't be read"),
        ("Et*L", "'*' can't be read"),
        ("E(t*9999)*9999L", "more than 100000 symbols"),
    ],
)
def test_what_cannot_be_read_says_why(text, what):
    with pytest.raises(ConfigError) as caught:
        read_stages(text)
    (problem,) = caught.value.problems
    assert problem.where == "pipeline.layout"
    assert what in problem.what
