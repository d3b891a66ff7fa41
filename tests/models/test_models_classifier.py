"""Logits that autocast does not round."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ban_fast import models
from ban_fast.losses import kd_loss
from ban_fast.models.classifier import Classifier

NETWORKS = ["wrn-10-1", "densenet-bc-16-4", "convnet-8", "mlp-16"]


def network(name: str, **options: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return models.create(name, 10, **({"image_size": 8} if name.startswith("mlp") else {}), **options).eval()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NETWORKS)
def test_logits_are_fp32_under_autocast(name: str, dtype: torch.dtype) -> None:
    with torch.autocast("cpu", dtype):
        assert network(name)(torch.randn(2, 3, 8, 8)).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_without_autocast_it_is_torch_s(dtype: torch.dtype) -> None:
    layer, x = Classifier(5, 3).to(dtype), torch.randn(4, 5).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert torch.equal(y, F.linear(x, layer.weight, layer.bias))


def test_other_dtypes_are_still_refused() -> None:
    with pytest.raises(RuntimeError, match="same dtype"):
        Classifier(5, 3)(torch.randn(4, 5, dtype=torch.float64))


@pytest.mark.parametrize("name", NETWORKS[:2])
@pytest.mark.parametrize("noise", [0.003, 0.03])
def test_a_student_near_its_teacher_learns_from_what_differs(name: str, noise: float) -> None:
    """In bf16, against float64 from the same features: rounded logits were 13 to 140 % off."""
    student = network(name)
    with torch.no_grad():
        student.classifier.weight.mul_(10)
    teacher = copy.deepcopy(student)
    with torch.no_grad():
        teacher.classifier.weight.add_(noise * student.classifier.weight.std() * torch.randn(10, 1))
    features: list[Tensor] = []
    student.classifier.register_forward_hook(lambda module, inputs, output: features.append(inputs[0]))
    images = torch.randn(16, 3, 16, 16)

    def gradient(logits: Callable[[], tuple[Tensor, Tensor]]) -> Tensor:
        student.zero_grad()
        kd_loss(*logits()).backward()
        return student.classifier.weight.grad.double().clone()

    def ours() -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return student(images), teacher(images).detach()

    def exact() -> tuple[Tensor, Tensor]:
        z, y = (
            F.linear(features[0].detach().double(), *(parameter.double() for parameter in each.classifier.parameters()))
            for each in (student, teacher)
        )
        return z, y.detach()

    found, expected = gradient(ours), gradient(exact)
    assert (found - expected).norm() < 1e-3 * expected.norm()  # logits of 10 are off by 1e-6, and differ by 3e-3
