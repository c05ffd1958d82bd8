"""Weighted gather against a loop."""

import pytest
import torch

from dynamic_detr.ops.plain import gather
from dynamic_detr.ops.plain.gather import add_table_gradient, weight_gradient, weighted_gather


class TestWeightedGather:
    def test_is_the_sum(self):
        table = torch.randn(6, 3, dtype=torch.float64)
        index = torch.randint(0, 6, (5, 4), dtype=torch.int32)
        weight = torch.randn(5, 4, dtype=torch.float64)
        expected = torch.zeros(5, 3, dtype=torch.float64)
        for m in range(5):
            for j in range(4):
                expected[m] += weight[m, j] * table[index[m, j]]
        torch.testing.assert_close(weighted_gather(table, index, weight), expected)

    def test_autograd(self):
        index = torch.randint(0, 6, (5, 4))
        tensors = (
            torch.randn(6, 3, dtype=torch.float64, requires_grad=True),
            torch.randn(5, 4, dtype=torch.float64, requires_grad=True),
        )
        assert torch.autograd.gradcheck(lambda t, w: weighted_gather(t, index, w), tensors)

    @pytest.mark.parametrize("rows", [(0, 60), (20, 31), (59, 60)])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("channels", [3, gather.NARROW + 1])
    def test_gradients(self, rows, dtype, channels, monkeypatch):
        """For indices in all rows of the table, or in a range; the gradient of the table is added
        to. Narrow rows are copied in several parts."""
        monkeypatch.setattr(gather, "GATHERED", 100)
        index = torch.randint(*rows, (50, 4), dtype=torch.int32)
        table = torch.randn(60, channels).to(dtype).double().requires_grad_()
        weight = torch.randn(50, 4, dtype=torch.float64, requires_grad=True)
        grad_out = torch.randn(50, channels).to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        expected = torch.autograd.grad(
            weighted_gather(table, index, weight), (table, weight), grad_out.double()
        )
        grad_table = torch.ones(60, channels, dtype=wide)
        add_table_gradient(grad_table, grad_out, index, weight.detach().to(wide))
        grad_weight = weight_gradient(grad_out, table.detach().to(dtype), index)
        assert grad_weight.dtype == wide
        torch.testing.assert_close(grad_table, (1 + expected[0]).to(wide), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(grad_weight, expected[1].to(wide), rtol=1e-5, atol=1e-5)
