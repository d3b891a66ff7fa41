"""Every loss of every backend for GPUs on a few small shapes, for compute-sanitizer to watch.

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m benchmarks.sanitize
"""

import torch

from benchmarks.cases import TITLE, Case, Dtype
from benchmarks.gate import gradient
from benchmarks.inputs import make_inputs
from benchmarks.providers import providers

# A warp and less a row, tails for every vector width, a row on chip and one that is read twice or shared by a cluster.
SHAPES = ((5, 3), (128, 10), (33, 101), (4, 4099), (2, 70001))


def main() -> None:
    device = torch.device("cuda")
    dtypes: tuple[Dtype, ...] = ("fp32", "bf16")
    for objective in TITLE:
        for dtype in dtypes:
            for provider in providers(objective, dtype, "cuda", autotune=False):
                if provider.kind != "ban_fast" or provider.absent is not None or provider.name.endswith("reference"):
                    continue
                step = provider.build()
                for rows, classes in SHAPES:
                    case = Case(objective=objective, rows=rows, classes=classes, dtype=dtype)
                    loss, grad, _ = gradient(step, make_inputs(case, "random", device, seed=0))
                    torch.cuda.synchronize()
                    assert torch.cat([loss.reshape(1), grad.reshape(-1)]).isfinite().all(), (provider.name, case)
                print(f"{provider.name}: {objective} {dtype}")


if __name__ == "__main__":
    main()
