"""Sums whose result does not depend on who computed which part: a fixed tree, and digits that add exactly.

Floating-point addition is commutative but not associative, so a sum is reproducible to the bit only if its brackets are.
`TreeSum` brackets M numbered terms by one binary tree over their numbers, whoever holds them. For M = 6, a term that does
not exist being left out:

    level 2             (0 … 3)      (4 5)            ranks 0, 1 and 2 with two terms each send
    level 1         (0 1)   (2 3)    (4 5)                (0 1)          (2 3)          (4 5)
    level 0         0   1   2   3    4   5            ranks 0 and 1 with three:  (0 1) 2      3 (4 5)

A rank sums every node that it has all terms of, so it keeps at most 2 · log₂ M partial sums, and one for each level while
terms come in order. Whoever gets the nodes of all ranks goes on by the same rule and ends with the same bits.

A sum of squares over all parameters has too many terms for a tree over their shards, which move with the mesh. `Digits`
cuts each square into whole numbers instead, whose sum is exact in float64 and so has no brackets at all (after Demmel and
Nguyen, "Fast Reproducible Floating-Point Summation", 2013).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

DIGITS = 4  # of a square
BITS = 16  # of a digit; 2 ** (53 - BITS) of them add up exactly


class Node(NamedTuple):
    """The sum of the terms number · 2^level … (number + 1) · 2^level - 1, as far as they exist."""

    level: int
    number: int


class TreeSum:
    """The sum of `terms` tensors by the fixed tree, as far as they were added. Tensors that are added belong to it."""

    def __init__(self, terms: int):
        self.terms = terms
        self.held: dict[Node, Tensor] = {}

    def add(self, node: Node, value: Tensor) -> None:
        """Adds a term (level 0) or the sum of a complete node, and every node that this completes."""
        while (1 << node.level) < self.terms:
            beside = Node(node.level, node.number ^ 1)
            if beside.number << beside.level < self.terms:  # else there is nothing beside it, ever
                if beside not in self.held:
                    break
                value = self.held.pop(beside).add_(value)
            node = Node(node.level + 1, node.number >> 1)
        self.held[node] = value

    @property
    def total(self) -> Tensor:
        """The sum; all terms must have been added."""
        (value,) = self.held.values()
        return value


def nodes_of(terms: range, total: int) -> list[Node]:
    """The nodes that the holder of some of `total` terms ends with, in order of their first terms."""
    tree, nothing = TreeSum(total), torch.zeros(())
    for term in terms:
        tree.add(Node(0, term), nothing)
    return sorted(tree.held, key=lambda node: node.number << node.level)


def largest(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """The largest magnitude in some tensors, float64 scalar; not finite where one of them is not."""
    tops = [tensor.abs().max() for tensor in tensors if tensor.numel()]
    top = torch.stack(tops).max() if tops else torch.zeros(())
    return top.to(device, torch.float64)


def square_digits(tensors: Sequence[Tensor], top: float, device: torch.device) -> Tensor:
    """(DIGITS,) float64 whole numbers: the sums of the digits of all squares, exact, so that ranks may add theirs in any
    order. top: the largest magnitude on any rank, finite."""
    out = torch.zeros(DIGITS, dtype=torch.float64, device=device)
    exponent = math.frexp(top)[1]
    for tensor in tensors:
        rest = (tensor.double() * 2.0**-exponent).square()  # exact: in [0, 1), 48 bits
        for digit in range(DIGITS):
            rest = rest * 2**BITS
            whole = rest.floor()
            rest = rest - whole
            out[digit] += whole.sum().to(device)
    return out


def from_digits(digits: Sequence[float], top: float) -> float:
    """The sum of squares that `square_digits` cut up."""
    exponent = math.frexp(top)[1]
    total = sum(digit * 2.0 ** (-BITS * (place + 1)) for place, digit in enumerate(digits))
    return math.ldexp(total, 2 * exponent)
