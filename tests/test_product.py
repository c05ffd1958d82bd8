"""Matrix products in all dtypes, with each library."""

import pytest
import torch

from dynamic_detr.ops.plain import product


@pytest.mark.parametrize("mkl_is_slow", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [0, 1, 37])
def test_products_and_gradients(mkl_is_slow, dtype, rows, monkeypatch):
    monkeypatch.setattr(product, "mkl_is_slow", lambda: mkl_is_slow)
    a, weight, grad = (torch.randn(*s) for s in ((rows, 24), (10, 24), (rows, 10)))
    out = torch.empty(rows, 10, dtype=dtype)
    product.product(a.to(dtype), weight.to(dtype), out)
    results = {
        "product": (out, a @ weight.T),
        "rows": (product.row_gradient(grad.to(dtype), weight.to(dtype)), grad @ weight),
        "weight": (product.weight_gradient(grad.to(dtype), a.to(dtype)), grad.T @ a),
        "groups": (product.grouped_product(a[None].to(dtype), weight.T[None].to(dtype))[0],
                   a @ weight.T),
    }  # fmt: skip
    tolerance = {torch.bfloat16: 5e-2, torch.float16: 1e-2}.get(dtype, 1e-5)
    for name, (ours, expected) in results.items():
        assert ours.dtype == dtype, name
        torch.testing.assert_close(ours.float(), expected, rtol=tolerance, atol=10 * tolerance)
