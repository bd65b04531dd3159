"""Every pair of choices that the table of `docs/compatibility.md` allows trains, and gives what one device gives.

Choices are packed into few cases of up to 8 ranks: a case starts with a pair that no case has yet, and takes in every
further choice that brings new pairs and stays legal. Choices that round (bf16 and the like) have cases of their own, since
what they touch can only be compared roughly.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
from harness import bare, check_equal, run_mesh, run_twin

from raytron.plan.compatibility import CHOICES, Choice, answer, together
from raytron.plan.mesh import MeshShape
from raytron.rules import problems

MAX_RANKS = 8
STEPS = 4
MANY = 21  # a case of fewer choices is for `pytest -m slow`
ROUNDING = {"bf16", "fp16", "bf16 reduction", "bf16 moments", "stochastic rounding"}
Pair = frozenset[str]


def admits(choices: list[Choice], rounding: bool) -> bool:
    """Whether a case may hold these together; a case that rounds begins with a pair that does."""
    if rounding != bool({choice.name for choice in choices} & ROUNDING):
        return False
    config = together(choices)
    return config is not None and not problems(config) and MeshShape.of(config.mesh).world <= MAX_RANKS


@functools.cache
def legal_pairs() -> tuple[tuple[Choice, Choice], ...]:
    pairs = itertools.combinations(CHOICES, 2)
    return tuple(pair for pair in pairs if answer(*pair).legal and MeshShape.of(together(pair).mesh).world <= MAX_RANKS)


@functools.cache
def cases() -> tuple[tuple[Choice, ...], ...]:
    waiting = {frozenset((a.name, b.name)) for a, b in legal_pairs()}
    out = []
    for rounding, (first, second) in itertools.product((False, True), legal_pairs()):
        if frozenset((first.name, second.name)) in waiting and admits([first, second], rounding):
            case = filled([first, second], waiting, rounding)
            waiting -= {frozenset((a.name, b.name)) for a, b in itertools.combinations(case, 2)}
            out.append(tuple(case))
    return tuple(out)


def filled(case: list[Choice], waiting: set[Pair], rounding: bool) -> list[Choice]:
    """The case with every choice that brings new pairs and stays legal, those that bring the most first."""

    def news(choice: Choice) -> int:
        return sum(frozenset((choice.name, member.name)) in waiting for member in case)

    left = [choice for choice in CHOICES if choice not in case]
    while left := [choice for choice in left if news(choice)]:
        best = max(left, key=news)
        left.remove(best)
        if admits([*case, best], rounding):
            case = [*case, best]
    return case


def pytest_generate_tests(metafunc: Any) -> None:
    if "case" in metafunc.fixturenames:
        marked = [
            pytest.param(case, marks=[pytest.mark.slow] * (len(case) < MANY), id=name_of(case)) for case in cases()
        ]
        metafunc.parametrize("case", marked)


def name_of(case: tuple[Choice, ...]) -> str:
    return f"{len(case)}-{case[0].name}-{case[1].name}"


def test_pair(world, case):
    config = together(case)
    assert config is not None
    if not {choice.name for choice in case} & ROUNDING:
        check_equal(world, config, STEPS)
        return
    mine, truth = run_mesh(world, config, STEPS), run_twin(bare(config), STEPS)
    assert max(abs(a - b) for a, b in zip(mine.losses, truth.losses, strict=True)) < 0.02


def test_every_legal_pair_is_covered():
    covered = {frozenset((a.name, b.name)) for case in cases() for a, b in itertools.combinations(case, 2)}
    assert covered >= {frozenset((a.name, b.name)) for a, b in legal_pairs()}
