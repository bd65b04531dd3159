"""The table of what goes with what is what the rules say."""

from itertools import combinations
from pathlib import Path

import pytest

from raytron.plan.compatibility import CHOICES, answer, markdown, together
from raytron.plan.plan import make_plan

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"


def test_the_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == markdown(), (
        "run: python -m raytron.plan.compatibility > docs/compatibility.md"
    )


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: choice.name)
def test_each_choice_alone_is_legal_and_has_a_plan(choice):
    config = together((choice,))
    assert config is not None
    make_plan(config, None)


def test_an_illegal_pair_has_a_reason_and_a_remedy():
    found = [answer(first, second) for first, second in combinations(CHOICES, 2)]
    refused = [each for each in found if not each.legal and not each.alternatives]
    assert refused
    assert all(problem.what and problem.remedy for each in refused for problem in each.problems)


def test_two_values_of_one_key_are_alternatives():
    by_name = {choice.name: choice for choice in CHOICES}
    assert answer(by_name["ZeRO 0"], by_name["ZeRO 2"]).alternatives
    assert answer(by_name["tensor parallel"], by_name["data parallel"]).legal
