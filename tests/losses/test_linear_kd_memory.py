"""What fused_linear_kd holds at once: a chunk's logits, its gradient, and the sums that it hands back."""

import os
import subprocess
import sys

import pytest
import torch

from ban_fast.ops.linear_kd_chunks import Task, bytes_per_row, chunk_size, chunks, layer

ROWS, WIDTH, CLASSES = 2000, 16, 10_000  # whole logits are 80 MB
WATCH = """
import os, sys, torch
import torch.nn.functional as F
from ban_fast.losses import fused_linear_kd, kd_loss

torch.set_num_threads(1)  # products have buffers for every thread

def peak():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024

def step(rows, form):
    hidden, weight = torch.randn(rows, {width}, requires_grad=True), torch.randn({classes}, {width}, requires_grad=True)
    taught, teacher = torch.randn({classes}, {width}), torch.randn(rows, {width})
    def run():
        if form == "whole":
            kd_loss(F.linear(hidden, weight), F.linear(teacher, taught), reduction=reduction).sum().backward()
        else:
            fused_linear_kd(
                hidden, weight, teacher_hidden=teacher, teacher_weight=taught, chunk_bytes=8 << 20, reduction=reduction
            ).sum().backward()
    return run

form, reduction = sys.argv[1:]
step(10, form)()  # libraries' own memory comes with their first call
run = step({rows}, form)
if os.access("/proc/self/clear_refs", os.W_OK):  # the peak is from here on; that of importing torch may be higher
    with open("/proc/self/clear_refs", "w") as forget:
        forget.write("5")
before = peak()
run()
print(peak() - before)
"""
EXACT = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
EXACT["MALLOC_MMAP_THRESHOLD_"] = str(2**16)
"""Every large block goes back to the system when it is freed. Else glibc learns from the first ones to keep them, and
the peak is that of a heap with holes: 9 to 29 MB from one run to the next."""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize("reduction", ["mean", pytest.param("none", marks=pytest.mark.slow)])
def test_peak_memory_is_a_chunk(reduction: str) -> None:
    """240 MB (both logits and a gradient) with whole logits; with chunks of 8 MiB a tenth of it."""

    def megabytes(form: str) -> float:
        code = WATCH.format(width=WIDTH, classes=CLASSES, rows=ROWS)
        out = subprocess.run(
            [sys.executable, "-c", code, form, reduction], env=EXACT, capture_output=True, text=True, check=True
        )
        return float(out.stdout)

    assert megabytes("whole") > 200
    assert megabytes("chunks") < 30  # 8 MiB, the gradients' 1, what products and allocator keep for themselves


@pytest.mark.parametrize(
    ("device", "dtype", "widened", "by_hidden", "need_grad", "expected"),
    [
        ("cpu", torch.float32, True, False, True, 4),
        ("cpu", torch.float32, True, True, True, 4 + 4),
        ("cpu", torch.float64, True, True, True, 8 + 4),
        ("cpu", torch.bfloat16, True, True, True, 4 + 4),
        ("meta", torch.float32, False, False, True, 4 + 4),
        ("meta", torch.float32, False, False, False, 4),
        ("meta", torch.float64, False, True, True, 8 + 8 + 4),
        ("meta", torch.bfloat16, False, True, True, 4 + 4 + 2 + 4),
        ("meta", torch.bfloat16, False, False, False, 4),
    ],
)
def test_bytes_of_a_class(
    device: str,
    dtype: torch.dtype,
    widened: bool,
    by_hidden: bool,
    need_grad: bool,
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Logits, their gradient unless it takes their place, that of half-precision operands, the teacher's from fp32."""
    monkeypatch.setattr("ban_fast.ops.linear_kd_chunks.multiplies_halves", lambda device: not widened)
    hidden, weight = (torch.empty(rows, 2, dtype=dtype, device=device) for rows in (3, 7))
    student = layer(weight, None, hidden, None)
    teacher = layer(weight.float(), None, hidden.float(), None) if by_hidden else None
    task = Task(hidden, student, hidden, teacher, None, 1.0, 1.0, 0.0, True, -100)
    assert bytes_per_row(task, need_grad) == 7 * expected
    assert [(s.start, s.stop) for s in chunks(task, need_grad, 2 * 7 * expected)] == [(0, 2), (2, 3)]
    assert list(chunks(task, need_grad, None)) == [slice(0, 3)]


def test_chunks_are_even_and_of_whole_tiles() -> None:
    assert chunk_size(1120, 40_000, 5 << 20, "cpu") == 128  # 131 fit: nine chunks of 125 or, by whole tiles, 128
    assert chunk_size(1120, 40_000, 6 << 20, "cpu") == 144  # 157 fit: eight, and no small one at the end
    assert chunk_size(1120, 80_000, 7 * 80_000, "cpu") == 7
    assert chunk_size(8192, 1_282_560, 1 << 30, "cuda") == 768  # 837 fit: ten of 820 are not whole tiles, nor fit 896
    assert chunk_size(8192, 1_282_560, 100 << 20, "cuda") == 81
    for device in ("cpu", "cuda", "another"):
        assert chunk_size(1000, 80_000, 1, device) == 1
        assert chunk_size(0, 80_000, 1 << 20, device) >= 1
        for rows in (1, 7, 129, 1000):
            for most in (1, 7, 8, 100, 128, 300, 2000):
                assert 1 <= chunk_size(rows, 10, 10 * most, device) <= most
