"""What only a GPU can show of language models: cuDNN's LSTM under autocast, cuBLAS's products. `pytest -m gpu`."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from ban_fast import models
from ban_fast.losses import fused_linear_kd
from ban_fast.ops.wide_linear import wide_linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]

GPU = torch.device("cuda")
HALVES = [torch.bfloat16, torch.float16]


def relative(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm())


def gradients(model: models.LanguageModel, tokens: Tensor, labels: Tensor, **autocast: Any) -> dict[str, Tensor]:
    """Of a loss as small as the mean over a large batch's tokens makes a single one's."""
    model.zero_grad()
    state = None
    with torch.autocast("cuda", **autocast):
        for window in tokens.split(5):
            logits, state = model(window, state)
            state = tuple(each.detach() for each in state)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), labels[-5:].flatten())
    (loss * 1e-3).backward()
    return {name: parameter.grad.double() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("name", ["lstm-64", "cnn-lstm-64"])
def test_bf16_s_gradients_are_fp32_s_to_rounding(name: str) -> None:
    """In cuDNN's fp16, which autocast chooses, they would lie among its subnormal numbers."""
    torch.manual_seed(0)
    table = torch.randint(3, 30, (200, 8))
    options = {"characters": 30, "window": 8, "table": table} if name.startswith("cnn") else {"layers": 2}
    model = models.create(name, 200, dropout=0.0, **options).to(GPU)
    assert isinstance(model, models.LanguageModel)
    tokens, labels = (torch.randint(200, (20, 16), device=GPU) for _ in range(2))
    truth = gradients(model, tokens, labels, enabled=False)
    rounded = gradients(model, tokens, labels, dtype=torch.bfloat16)
    for key in truth:
        # A maximum over a word's places that is rounded is often another place's, or several's: as in bf16 on a CPU,
        # where these were 0.03 to 0.16 off, and the others 0.03 at most.
        picks = key.startswith("cnn.embedding") or (key.startswith("cnn.convs") and key.endswith("weight"))
        assert relative(rounded[key], truth[key]) < (0.4 if picks else 0.05), key


def test_the_lstm_is_cudnns() -> None:
    model = models.create("lstm-64", 200).to(GPU)
    tokens = torch.randint(200, (20, 16), device=GPU)
    with profile(activities=[ProfilerActivity.CPU]) as record:
        model(tokens)[0].sum().backward()
    assert {event.name for event in record.events()} >= {"aten::_cudnn_rnn", "aten::_cudnn_rnn_backward"}


@pytest.mark.parametrize("dtype", HALVES)
def test_wide_linear(dtype: torch.dtype) -> None:
    """Operands are rounded, and nothing else is: logits are fp32, gradients those of the rounded operands."""
    generator = torch.Generator(GPU).manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, device=GPU, generator=generator).requires_grad_() for shape in ((70, 33), (101, 33), (101,))
    )
    grad = torch.randn(70, 101, device=GPU, generator=generator)
    with torch.autocast("cuda", dtype=dtype):
        logits = wide_linear(hidden, weight, bias)
    logits.backward(grad)
    assert logits.dtype == torch.float32
    exact = [each.detach().to(dtype).double().requires_grad_() for each in (hidden, weight, bias)]
    truth = F.linear(*exact)
    truth.backward(grad.double())
    assert relative(logits, truth.detach()) < 1e-3  # the bias is rounded too
    for each, wanted in zip((hidden, weight, bias), exact, strict=True):
        assert relative(each.grad, wanted.grad) < 5e-3  # dtype's rounding of the gradient that is multiplied


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("chunk_bytes", [None, 2**14])
def test_fused_linear_kd(dtype: torch.dtype, chunk_bytes: int | None) -> None:
    """Loss and gradients in one go or in many chunks, against float64 from the same operands."""
    generator = torch.Generator(GPU).manual_seed(0)
    student, teacher = (torch.randn(90, 40, device=GPU, generator=generator).to(dtype) for _ in range(2))
    weights = [(0.3 * torch.randn(130, 40, device=GPU, generator=generator)).to(dtype) for _ in range(2)]
    labels = torch.randint(130, (90,), device=GPU, generator=generator)
    labels[::7] = -100

    def run(*operands: Tensor, **options: Any) -> tuple[Tensor, ...]:
        student, weight, teacher, teacher_weight = operands
        student, weight = (each.detach().requires_grad_() for each in (student, weight))
        loss = fused_linear_kd(
            student, weight, labels, teacher_hidden=teacher, teacher_weight=teacher_weight, label_weight=1.0, **options
        )
        loss.backward()
        assert student.grad is not None
        assert weight.grad is not None
        return loss.detach(), student.grad, weight.grad

    operands = student, weights[0], teacher, weights[1]
    found = run(*operands, chunk_bytes=chunk_bytes)
    truth = run(*(each.double() for each in operands))
    bounds = {torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 2e-3}
    assert all(relative(value, wanted) < bounds[dtype] for value, wanted in zip(found, truth, strict=True))


def test_state_goes_on_between_modes() -> None:
    """What bf16's windows leave is taken up by fp32's evaluation, and the other way round."""
    model = models.create("lstm-8", 30, dropout=0.0).to(GPU)
    tokens = torch.randint(30, (5, 3), device=GPU)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        _, state = model(tokens)
    logits, state = model(tokens, state)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        again, _ = model(tokens, state)
    assert logits.isfinite().all()
    assert again.isfinite().all()
    assert isinstance(model.lstm, nn.LSTM)
