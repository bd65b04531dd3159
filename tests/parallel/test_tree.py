"""A sum in fixed brackets: the same bits however its terms are shared out, in whatever order they come."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raytron.deal import Deal
from raytron.parallel.tree import Node, TreeSum, from_digits, largest, nodes_of, square_digits
from raytron.plan.memory import partial_sums

CPU = torch.device("cpu")


def by_brackets(terms, first, size):
    """The definition: halves of a power of two, what lies beyond the last term being left out."""
    if size == 1:
        return terms[first].clone()
    left = by_brackets(terms, first, size // 2)
    if first + size // 2 >= len(terms):
        return left
    return left + by_brackets(terms, first + size // 2, size // 2)


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 2**32))
def test_the_tree_is_the_same_for_every_sharing(count, parts, seed):
    rng = random.Random(seed)
    terms = [torch.tensor([rng.gauss(0, 1) * 10 ** rng.randint(-4, 4) for _ in range(3)]) for _ in range(count)]
    truth = by_brackets(terms, 0, 1 << (count - 1).bit_length())
    cuts = sorted(rng.randint(0, count) for _ in range(parts - 1))
    joined = TreeSum(count)
    for start, stop in zip([0, *cuts], [*cuts, count], strict=True):
        mine = TreeSum(count)
        for term in rng.sample(range(start, stop), stop - start):
            mine.add(Node(0, term), terms[term].clone())
        assert set(mine.held) == set(nodes_of(range(start, stop), count))
        assert len(mine.held) <= max(1, 2 * math.ceil(math.log2(count + 1)))
        for node, value in mine.held.items():
            joined.add(node, value)
    assert torch.equal(joined.total, truth)


def test_terms_in_order_leave_one_partial_sum_for_each_level():
    tree = TreeSum(64)
    for term in range(63):
        tree.add(Node(0, term), torch.zeros(1))
        assert len(tree.held) <= 6


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(-30, 30), st.integers(0, 2**32))
def test_digits_add_exactly_in_any_order(count, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, generator=generator) * 10.0**scale
    top = largest([x], CPU).item()
    whole = square_digits([x], top, CPU)
    shuffled = x[torch.randperm(count, generator=generator)]
    pieces = [square_digits([piece], top, CPU) for piece in shuffled.split(7)]
    assert torch.equal(sum(pieces), whole)
    assert from_digits(whole.tolist(), top) == pytest.approx(x.double().square().sum().item(), rel=1e-12)


def test_nothing_and_infinity_have_a_largest_magnitude():
    assert largest([], CPU).item() == 0
    assert square_digits([torch.zeros(3)], 0.0, CPU).tolist() == [0] * 4
    assert not math.isfinite(largest([torch.tensor([1.0, math.inf])], CPU).item())
    assert not math.isfinite(largest([torch.tensor([1.0, math.nan]), torch.zeros(2)], CPU).item())


@given(st.integers(1, 40), st.integers(1, 9))
def test_the_plan_counts_the_sums_that_a_rank_holds(count, ranks):
    deal, most = Deal(count, min(count, ranks)), 0
    for rank in range(deal.ranks):
        tree = TreeSum(count)
        for term in deal.of(rank):
            most = max(most, len(tree.held) + 1)  # with the one that comes
            tree.add(Node(0, term), torch.zeros(()))
    assert partial_sums(deal) == most
