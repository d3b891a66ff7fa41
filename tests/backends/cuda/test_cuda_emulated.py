"""The CUDA kernels' contract in the emulator, where there is no GPU."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cuda_contract import CWTM, TEACHER_ROWS, Contract, labels_of, logits
from cuda_emulated import Device, Emulated, build, installed
from reference_truth import KD
from torch import Tensor

from ban_fast.backends import native_cuda

SMALL = 6 << 10
"""Bytes of shared memory a block, so that rows of a few thousand classes take clusters."""


@pytest.fixture(scope="session")
def emulated(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    options = os.environ.get("BAN_FAST_EMULATOR_FLAGS", "-O1").split()
    cache = getattr(pytestconfig, "cache", None)  # None with -p no:cacheprovider
    directory = tmp_path_factory.mktemp("emulated") if cache is None else cache.mkdir("cuda_emulated")
    return Emulated(build(directory, *options))


@pytest.fixture
def device(emulated: Emulated) -> Iterator[torch.device]:
    emulated.configure(Device())
    with installed(emulated):
        yield torch.device("cpu")


class TestInTheEmulator(Contract):
    """On a device with the limits of an H100."""

    @pytest.mark.parametrize("types", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)])
    @pytest.mark.parametrize("classes", [1026, 2049, 4104])
    @pytest.mark.parametrize("blocks", [2, 8, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 4, 16))])
    def test_rows_in_clusters(
        self,
        emulated: Emulated,
        device: torch.device,
        blocks: int,
        classes: int,
        types: tuple[torch.dtype, torch.dtype],
    ) -> None:
        """Of up to `blocks` blocks: fewer where the row fits, and it is read twice where none is large enough."""
        emulated.configure(Device(SMALL, 2 * SMALL, blocks, seed=blocks))
        student, teacher = (x.to(dtype) for x, dtype in zip(logits(classes, "random"), types, strict=True))
        labels, rows = labels_of(classes), torch.tensor(TEACHER_ROWS)
        options = {**KD, "temperature": 3.5, "label_weight": 0.3, "divergence": "ce"}
        self.check("kd", device, student, teacher, labels, rows, **options)
        self.check("dkpp", device, student, teacher, labels, None, 5, rows, seed=2, **options)
        self.check("cwtm", device, student, teacher, labels, None, None, rows, **CWTM)

    @pytest.mark.parametrize("regime", ["near", "shifted", "outlier", "dropped", "leaping", "far"])
    @pytest.mark.parametrize("classes", [1025, 4000])
    def test_rows_read_twice(self, emulated: Emulated, device: torch.device, classes: int, regime: str) -> None:
        """Where the class first guessed for the peak is a bad one they are read a third time."""
        emulated.configure(Device(2 << 10, 2 << 10, 1))
        student, teacher = logits(classes, regime)
        teacher[:, -1] = teacher.amax(1) + torch.linspace(0, 3, len(teacher))  # the peak is found last
        student[:, -1] += 2
        options = {**KD, "label_weight": 0.3, "divergence": "ce"}
        tensors = (student, teacher, labels_of(classes), torch.tensor(TEACHER_ROWS))
        error = 1e-5 if regime == "far" else 2e-6
        self.check("kd", device, *tensors, **options, value=error, gradient=error)

    @pytest.mark.parametrize("types", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)])
    @pytest.mark.parametrize("classes", [1025, 4000])
    def test_rows_read_twice_whose_peak_comes_first(
        self, emulated: Emulated, device: torch.device, classes: int, types: tuple[torch.dtype, torch.dtype]
    ) -> None:
        """The guess is right, and classes that leap come before most threads' tops are as high as it."""
        emulated.configure(Device(2 << 10, 2 << 10, 1))
        student, teacher = (x.to(dtype) for x, dtype in zip(logits(classes, "late"), types, strict=True))
        labels, rows = labels_of(classes), torch.tensor(TEACHER_ROWS)
        for temperature in (0.8, 1.0):
            options = {**KD, "temperature": temperature, "label_weight": 0.3, "divergence": "ce"}
            self.check("kd", device, student, teacher, labels, rows, **options)
            self.check("dkpp", device, student, teacher, labels, None, 5, rows, seed=2, **options)

    @pytest.mark.parametrize(("classes", "dimension"), [(4, 0), (4, 1), (1500, 0)])
    def test_strides_of_more_elements_than_32_bits_count(
        self,
        emulated: Emulated,
        device: torch.device,
        far_apart: Callable[[Tensor, int], Tensor],
        classes: int,
        dimension: int,
    ) -> None:
        if classes > 1024:
            emulated.configure(Device(2 << 10, 2 << 10, 1))  # they are read twice
        student, cache = (x.half() for x in logits(classes, "random", rows=3))
        labels, rows = labels_of(classes, 3), torch.tensor([4, 0, 3])
        for s, t in ((far_apart(student, dimension), cache), (student, far_apart(cache, dimension))):
            self.check("kd", device, s, t, labels, rows, **KD)
            self.check("dkpp", device, s, t, labels, None, 5, rows, seed=2, **KD)
            self.check("cwtm", device, s, t, labels, None, None, rows, **CWTM)

    @pytest.mark.usefixtures("device")
    def test_a_gradient_of_more_elements_than_32_bits_count(self, sparse: Callable[[int, torch.dtype], Tensor]) -> None:
        """Rows whose factor is 1 are not touched: of 4 GiB, a row is."""
        rows, classes = 17_000, 128_256
        grad = sparse(rows * classes, torch.bfloat16).view(rows, classes)
        grad[-1], factors = 3, torch.ones(rows)
        factors[-1] = 0.5
        native_cuda.scale_grad_(grad, factors, None)
        assert (grad[-1] == 1.5).all()

    def test_any_order_of_threads_gives_the_same_bits(self, emulated: Emulated, device: torch.device) -> None:
        """Threads and blocks run in random order, so a barrier that is missing shows."""
        for classes, limits in (
            (10, (227 << 10, 16)),
            (100, (227 << 10, 16)),
            (700, (227 << 10, 16)),
            (3000, (SMALL, 8)),
        ):
            student, teacher = logits(classes, "random")
            outputs = []
            for seed in range(4):
                emulated.configure(Device(limits[0], 2 * limits[0], limits[1], seed))
                keyed: tuple[Any, ...] = (labels_of(classes), None, 7, torch.tensor(TEACHER_ROWS))
                options = {**KD, "label_weight": 0.5}
                outputs.append(self.found("dkpp", device, student.half(), teacher, *keyed, seed=1, **options))
            for other in outputs[1:]:
                assert all(torch.equal(a, b) for a, b in zip(outputs[0], other, strict=True))  # type: ignore[arg-type]

    def test_an_error_is_a_runtime_error(self, emulated: Emulated, device: torch.device) -> None:
        emulated.configure(Device(1 << 10, 1 << 10, 1))
        student, teacher = logits(100, "random")
        with pytest.raises(RuntimeError, match="more shared memory"):
            native_cuda.kd(student, teacher[:5], None, None, **KD)


class TestTheEmulator:
    """Finds what it is there to find."""

    @pytest.fixture(autouse=True)
    def _order(self, emulated: Emulated) -> None:
        emulated.configure(Device())

    def test_nothing_where_there_is_no_mistake(self, emulated: Emulated) -> None:
        assert emulated.mistake(0) == sum(range(64))

    def test_a_missing_barrier(self, emulated: Emulated) -> None:
        sums = set()
        for seed in range(1, 5):
            emulated.configure(Device(seed=seed))
            sums.add(emulated.mistake(1))
        assert sums != {sum(range(64))}

    @pytest.mark.parametrize(
        ("number", "message"),
        [
            (2, "threads wait for others that never come, 1 have ended"),
            (3, "a lane takes the value of one that is not named"),
            (4, "lanes wait for each other at different places"),
            (5, "not aligned"),
            (6, "a block that has ended"),
        ],
    )
    def test_a_mistake(self, emulated: Emulated, number: int, message: str) -> None:
        with pytest.raises(RuntimeError, match=message):
            emulated.mistake(number)


def runtime(name: str) -> str:
    """The path of one of the compiler's libraries."""
    found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return found.stdout.strip()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the address sanitizer is preloaded as g++ has it")
def test_no_access_out_of_bounds() -> None:
    """The contract again, in a process of its own, under the address and undefined-behaviour sanitizers.

    They know where every tensor ends, and every block's shared memory."""
    environment = {
        **os.environ,
        "BAN_FAST_EMULATOR_FLAGS": "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all",
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libubsan.so')}",
        # Python and torch keep memory until the process ends, and throw across what has no frames.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
    }
    chosen = (
        "InTheEmulator and not near and (kd or dkpp or cwtm or alignment or strides or clusters or range or scaling)"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", "-k", chosen]
    done = subprocess.run([*command, str(__file__)], env=environment, capture_output=True, text=True)
    print(done.stdout[-1500:])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
