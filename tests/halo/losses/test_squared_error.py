"""Stage 1's error in plain torch: the mean square and its gradient. tests/gpu/test_fused_gpu.py runs the kernel."""

import pytest
import torch
import torch.nn.functional as F

from halo.losses.squared_error import squared_error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_error_and_its_gradient_are_those_of_the_mean_square(dtype):
    torch.manual_seed(0)
    output, target = (torch.randn(2, 7, 24).to(dtype) for _ in range(2))
    exact = output.double().requires_grad_()
    expected = F.mse_loss(exact, target.double())
    (3 * expected).backward()
    error, square = squared_error(output.requires_grad_(), target)
    (3 * error).backward()
    torch.testing.assert_close(error.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(square.double(), target.double().square().mean(), rtol=1e-5, atol=0)
    assert error.dtype == torch.promote_types(dtype, torch.float32) and not square.requires_grad
    assert (output.grad.double() - exact.grad).norm() < 0.006 * exact.grad.norm()


def test_the_gradient_is_given_away_once():
    output = torch.randn(3, 16, requires_grad=True)
    error, _ = squared_error(output, torch.randn(3, 16))
    error.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="no second backward"):
        error.backward()
