"""Who is wrong, told from fingerprints: by majority, else by running the steps again."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytron.observe.replicas import Check, by_key, compare, verdict


def held(*values, key="a"):
    return {key: dict(enumerate(values))}


def check_of(fingerprints, trails=None, step=100):
    ranks = {rank for by in fingerprints.values() for rank in by}
    return compare(step, fingerprints, trails or dict.fromkeys(ranks, (5, 6, 7)))


def test_equal_fingerprints_agree():
    check = check_of(held(7, 7, 7))
    assert check.agrees
    assert str(check) == "all replicas agree after step 100"


def test_a_majority_names_who_differs():
    check = check_of(held(7, 7, 9, 7))
    assert (check.faulty, check.suspects) == ((2,), ())
    assert str(check) == "replicas hold different parameters after step 100: rank 2 differs from the majority"
    assert verdict(check, check_of(held(7, 7, 7, 7))).ranks == (2,)


def test_of_two_both_are_suspects():
    check = check_of(held(7, 9))
    assert (check.faulty, check.suspects) == ((), (0, 1))
    assert str(check).endswith("ranks 0, 1 can't be told apart")


def test_whom_a_majority_names_is_no_suspect_elsewhere():
    check = check_of({**held(7, 7, 9), "b": {2: 1, 3: 4}})
    assert (check.faulty, check.suspects) == ((2,), (3,))


@pytest.mark.parametrize(
    ("first", "second", "named"),
    [
        ({0: (5, 6, 7), 1: (5, 6, 7)}, {0: (5, 6, 7), 1: (5, 6, 8)}, (1,)),
        ({0: (5, 6, 7), 1: (5, 6, 7)}, {0: (5, 9, 9), 1: (5, 6, 8)}, (0,)),  # the first step that differs counts
        (
            {0: (0, 6, 7), 1: (0, 6, 7)},
            {0: (4, 6, 7), 1: (4, 6, 8)},
            (1,),
        ),  # of a step that is not known nothing is said
        ({0: (5, 6, 7), 1: (5, 6, 7)}, {0: (5, 6, 8), 1: (5, 6, 8)}, ()),
    ],
)
def test_the_first_step_that_was_otherwise_names_the_rank(first, second, named):
    """Whatever the parameters are in the end: wrong gradients have reached all."""
    assert verdict(check_of(held(7, 9), first), check_of(held(5, 5), second)).ranks == named


def test_a_fault_that_passed_through_a_pipeline_is_looked_for_where_the_difference_is():
    trails = dict.fromkeys(range(4), (5, 6))
    first = check_of({"a": {0: 1, 1: 1}, "b": {2: 3, 3: 4}}, trails)
    second = check_of({"a": {0: 0, 1: 0}, "b": {2: 0, 3: 0}}, {**trails, 1: (5, 9), 3: (5, 9)})
    assert verdict(first, second).ranks == (3,)


@pytest.mark.parametrize(("second", "named"), [((7, 7), (1,)), ((9, 9), (0,)), ((7, 8), (1,)), ((6, 9), (0,))])
def test_whoever_changes_in_the_second_run_was_wrong(second, named):
    found = verdict(check_of(held(7, 9)), check_of(held(*second)))
    assert found.ranks == named
    assert f"rank {named[0]}" in found.why


def test_a_difference_that_comes_back_is_the_programs():
    found = verdict(check_of(held(7, 9)), check_of(held(7, 9)))
    assert found.ranks == ()
    assert "fault of the program" in found.why


def test_where_everything_changes_nobody_is_named():
    found = verdict(check_of(held(7, 9)), check_of(held(5, 5)))
    assert found.ranks == ()
    assert "not deterministic" in found.why


def test_checks_of_different_steps_are_not_compared():
    with pytest.raises(ValueError, match="step 100"):
        verdict(check_of(held(7, 9)), check_of(held(7, 7), step=200))


def test_rows_of_ranks_become_fingerprints_by_key():
    rows = [[(5, 70), (0, 0)], [(5, 71), (-6, 8)]]
    assert by_key(enumerate(rows)) == {"0000000000000005": {0: 70, 1: 71}, "fffffffffffffffa": {1: 8}}


@given(
    st.dictionaries(
        st.sampled_from("abc"), st.dictionaries(st.integers(0, 7), st.integers(-(2**63), 2**63 - 1), min_size=1)
    )
)
def test_checks_travel_as_json(fingerprints):
    check = check_of(fingerprints)
    assert Check.read(json.loads(json.dumps(check.record(trails=True)))) == check
    short = Check.read(json.loads(json.dumps(check.record(trails=False))))
    assert short == (check._replace(trails={}) if check.agrees else check)


@given(st.lists(st.integers(0, 3), min_size=3, max_size=9), st.data())
def test_one_wrong_rank_of_three_or_more_is_always_named(extra, data):
    ranks = len(extra)
    wrong = data.draw(st.integers(0, ranks - 1))
    check = check_of(held(*(8 if rank == wrong else 7 for rank in range(ranks))))
    assert check.faulty == (wrong,)
