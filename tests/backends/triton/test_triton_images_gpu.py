"""What only a GPU can show of images: a loader's batches are the CPU's, and one kernel makes each. `pytest -m gpu`."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from ban_fast.data import Augmentation, MemoryLoader, Split
from ban_fast.data.cifar import MEAN, STD

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


def loader(device: str, channels_last: bool, fill: str) -> MemoryLoader:
    pixels = torch.randint(0, 256, (300, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return MemoryLoader(
        Split(pixels, torch.arange(300) % 10, torch.arange(300)),
        batch_size=64,
        mean=MEAN,
        std=STD,
        device=device,
        augmentation=Augmentation(fill=fill),  # type: ignore[arg-type]
        channels_last=channels_last,
    )


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("fill", ["reflect", "zero"])
def test_batches_are_the_cpus(channels_last: bool, fill: str) -> None:
    for ours, theirs in zip(
        loader("cuda", channels_last, fill).epoch(1), loader("cpu", channels_last, fill).epoch(1), strict=True
    ):
        assert ours.images.device.type == "cuda"
        assert torch.equal(ours.images.cpu(), theirs.images)
        assert ours.images.stride() == theirs.images.stride()


def test_one_kernel() -> None:
    memory = loader("cuda", True, "reflect")
    plan = memory.plan(0)
    memory.gather(plan.order[:64], plan.views[:64])
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        memory.gather(plan.order[:64], plan.views[:64])
        torch.cuda.synchronize()
    kernels = [event.name for event in profiled.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert [name for name in kernels if "Mem" not in name] == ["show_kernel"]
