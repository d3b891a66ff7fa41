import os

import torch

# The contract of the kernels runs on a GPU, or in Triton's interpreter: in a process of its own, by
# test_triton_interpreted.py, since Triton reads TRITON_INTERPRET when it is imported, and torch.compile could not use
# it afterwards.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available() else ["contract"]
