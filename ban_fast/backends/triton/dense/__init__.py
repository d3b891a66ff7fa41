"""A dense block in Triton: on CUDA devices, and on the CPU where TRITON_INTERPRET=1 was set before Triton's import.

fp32, bf16 and fp16 features with sums in fp32; fp32 is multiplied as torch's convolutions are, in TF32 or in IEEE
arithmetic (`torch.backends.cudnn.conv.fp32_precision`). No host sync, no atomics: the same bits at every call, and all
of it can be captured in a CUDA graph. `ban_fast.backends.triton.problem` says where it cannot be used.
"""

from ban_fast.backends.triton.dense.block import backward, forward

__all__ = ["backward", "forward"]
