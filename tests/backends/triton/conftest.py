import importlib.util
import os

import torch

# The contract of the kernels runs on a GPU, or in Triton's interpreter: in a process of its own, by
# test_triton_interpreted.py, since Triton reads TRITON_INTERPRET when it is imported, and torch.compile could not use
# it afterwards. What compiles kernels cannot be done there.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore = [] if INTERPRETED or torch.cuda.is_available() else ["contract"]
if INTERPRETED:
    collect_ignore += [
        f"test_triton_{name}.py" for name in ("aot", "dense_aot", "images_aot", "scale_shift_aot", "problem")
    ]
    if os.environ.get("BAN_FAST_EMULATED_GPU") != "1":
        collect_ignore += ["test_triton_gpu.py", "test_triton_dense_gpu.py", "test_triton_images_gpu.py"]
if importlib.util.find_spec("triton") is None:  # it comes with torch where that is built for CUDA
    collect_ignore_glob = ["*"]
