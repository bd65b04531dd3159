"""Shares of parameters, packed for a collective and unpacked again."""

from __future__ import annotations

import pytest
import torch

from raytron.parallel.layout import Layout
from raytron.parallel.parameter import Param
from raytron.parallel.shares import Shares

SHAPES = [(12, 4), (5,), (4, 24), (3, 2, 8), (28,), (7, 7)]


@pytest.mark.parametrize("owners", [1, 2, 3, 4, 7, 12])
def test_what_belongs_to_an_owner_lies_side_by_side(owners):
    params = [Param(torch.empty(shape), str(shape), Layout(shape), False) for shape in SHAPES]
    shares = Shares(params, owners, 0)
    tensors = [torch.randn(shape) for shape in SHAPES]
    packed = shares.pack(tensors, torch.float32)
    for owner in range(owners):
        for number, tensor in enumerate(tensors):
            assert torch.equal(shares.piece(packed[owner], number, owner), shares.part(tensor, number, owner))
    back = [torch.zeros(shape) for shape in SHAPES]
    shares.unpack(packed, back)
    assert all(map(torch.equal, back, tensors))
    assert torch.equal(shares.pack(tensors, torch.bfloat16), packed.bfloat16())
