"""What only a GPU can show of folded teachers: what "auto" comes to, by which kernels. `pytest -m gpu`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import but_for_teachers, digits, footprint
from torch.profiler import ProfilerActivity, profile

from ban_fast import models
from ban_fast.config import ModelConfig, TeacherConfig
from ban_fast.models.folding import fold
from ban_fast.training import run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("deterministic_kernels"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


@pytest.fixture
def unrounded_convolutions() -> Iterator[None]:
    convolutions: Any = torch.backends.cudnn.conv  # monkeypatch can't put back what answers by __getattr__
    before, convolutions.fp32_precision = convolutions.fp32_precision, "ieee"
    yield
    convolutions.fp32_precision = before


@pytest.mark.usefixtures("unrounded_convolutions")
@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("channels_last", [False, True])
@torch.no_grad()
def test_the_same_logits(amp: str, channels_last: bool) -> None:
    """To fp32's rounding, 1e-5 of the largest as on the CPU; in bf16 to its 2^-8, a few times."""
    torch.manual_seed(0)
    network = models.create("wrn-16-2", 10).cuda().eval()
    x = torch.randn(8, 3, 32, 32, device="cuda")
    if channels_last:
        network, x = network.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    folded = fold(network, into_convolutions=False)
    with torch.autocast("cuda", torch.bfloat16, enabled=amp == "bf16"):
        own, found = network(x), folded(x)
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            folded(x)
            torch.cuda.synchronize()
    assert own.dtype == found.dtype
    assert (own - found).abs().max() <= (1e-5 if amp == "off" else 4 * 2**-8) * own.abs().max()
    kernels = [event.name for event in profiled.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert kernels.count("scale_shift_kernel") == 13  # and neither a norm nor a ReLU beside them


def test_live_cached_and_recorded(tmp_path: Path) -> None:
    for mode, step in (("live", "eager"), ("live", "graph"), ("cache", "graph")):
        out, settings = tmp_path / f"{mode} {step}", TeacherConfig(mode=mode)
        model = ModelConfig(name="wrn-10-1")
        results = run(digits(epochs=6, model=model, teacher=settings, step=step, device="cuda"), out=out)
        assert results.generations[1]["teacher"]["batch_norm"] == "folded"
    eager, recorded = (but_for_teachers(footprint(tmp_path / f"live {step}")) for step in ("eager", "graph"))
    for found in (eager, recorded):
        for record in found["results"]["generations"]:
            del record["step"]
    assert eager == recorded
