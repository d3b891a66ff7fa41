import pytest
import torch

from ban_fast.backends import triton


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 128), (2, 4097), (40, 1024)])
def test_the_gradient_is_scaled_in_place_with_one_rounding(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    by_row = torch.linspace(-3, 3, shape[0], dtype=acc)
    for grad_output in (torch.tensor(0.3, dtype=acc), by_row, torch.stack([by_row, by_row], 1)[:, 0]):
        for scale in (None, torch.tensor(0.25, dtype=acc)):
            factor = grad_output if scale is None else grad_output * scale
            wanted = (grad.to(acc) * (factor.unsqueeze(1) if factor.dim() else factor)).to(dtype)
            given = grad.to(device, copy=True)
            result = triton.scale_grad_(given, grad_output.to(device), None if scale is None else scale.to(device))
            assert result is given
            if (
                dtype == torch.bfloat16 and device.type == "cpu"
            ):  # the interpreter cuts off where a GPU rounds to nearest
                assert ((result.float() - wanted.float()).abs() <= 2**-7 * wanted.float().abs()).all()
            else:
                assert torch.equal(result.cpu(), wanted)


def test_times_one_nothing_is_touched(device: torch.device) -> None:
    """A NaN whose bits a multiplication would change stays as it is, in the rows whose factor is 1."""
    bits = torch.tensor([[0x7F800001, 0x3F800000], [0x7F800001, 0x3F800000]], dtype=torch.int32, device=device)
    for output, scale in ((torch.ones(()), None), (torch.tensor(4.0), torch.tensor(0.25)), (torch.ones(2), None)):
        grad = bits.clone().view(torch.float32)
        triton.scale_grad_(grad, output.to(device), None if scale is None else scale.to(device))
        assert torch.equal(grad.view(torch.int32), bits)
    grad = bits.clone().view(torch.float32)
    triton.scale_grad_(grad, torch.tensor([1.0, 2.0], device=device), None)
    assert torch.equal(grad[0].view(torch.int32), bits[0])
    assert grad[1, 1] == 2


def test_no_gradient_is_scaled_in_an_empty_batch(device: torch.device) -> None:
    grad = torch.empty(0, 5, device=device)
    assert triton.scale_grad_(grad, torch.tensor(2.0, device=device), None) is grad
