"""Grouped matrix products equal one product for each expert, with experts that have no rows."""

import pytest
import torch

from raytron.kernels.grouped import add_grouped_product, grouped_matmul, grouped_product

COUNTS = [[3, 0, 5, 1], [0, 0, 0, 9], [0, 0, 0, 0]]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_grouped_products_equal_a_product_for_each_expert(counts):
    torch.manual_seed(0)
    rows = sum(counts)
    x, dy, weight = torch.randn(rows, 6), torch.randn(rows, 5), torch.randn(4, 5, 6)
    parts = list(zip(x.split(counts), dy.split(counts), weight, strict=True))
    expected = torch.cat([a @ w.t() for a, _, w in parts])
    torch.testing.assert_close(grouped_matmul(x, weight.transpose(1, 2), counts), expected)
    torch.testing.assert_close(grouped_matmul(dy, weight, counts), torch.cat([b @ w for _, b, w in parts]))
    products = torch.stack([b.t() @ a for a, b, _ in parts])
    torch.testing.assert_close(grouped_product(dy, x, counts), products)
    out = torch.full((4, 5, 6), torch.nan)
    add_grouped_product(out, dy, x, counts, fresh=True)
    torch.testing.assert_close(out, products)
    add_grouped_product(out, dy, x, counts, fresh=False)
    torch.testing.assert_close(out, 2 * products)


def test_bf16_products_add_up_in_fp32():
    x, dy = torch.randn(4, 8).bfloat16(), torch.randn(4, 16).bfloat16()
    out = torch.zeros(2, 16, 8)
    for _ in range(2):
        add_grouped_product(out, dy, x, [1, 3], fresh=False)
    torch.testing.assert_close(out, 2 * grouped_product(dy, x, [1, 3]).float())


@pytest.mark.gpu
@pytest.mark.parametrize("counts", COUNTS[:2], ids=str)
def test_one_launch_equals_the_loop(counts):
    torch.manual_seed(0)
    rows = sum(counts)
    x, dy, weight = (torch.randn(*shape).bfloat16() for shape in ((rows, 64), (rows, 128), (4, 128, 64)))
    for one, loop in (
        (grouped_matmul(x.cuda(), weight.cuda().transpose(1, 2), counts), grouped_matmul(x, weight.mT, counts)),
        (grouped_product(dy.cuda(), x.cuda(), counts), grouped_product(dy, x, counts)),
    ):
        assert (one.cpu() - loop).norm() <= 1e-2 * loop.norm()
