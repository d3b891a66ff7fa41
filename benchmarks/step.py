"""`python -m benchmarks.step`: whole born-again training steps, from stored images to updated weights.

- the naive loop: fp32, eager, torchvision's transforms in a DataLoader, the textbook's loss, the teacher live;
- the best composed: data on the device, channels_last, torch.compile of student, teacher and loss, fused SGD; on a GPU
  bf16 autocast and max-autotune with CUDA graphs; the teacher live;
- ours, with the teacher live, cached (every row is known, as in most of a long run), and supervised, without one.

A lap is an epoch of a few batches, beginning and end of the loader included; trainers take turns, lap by lap, in one
process of its own for each case. CIFAR-100 where BAN_FAST_DATA says where it lies, else random images of that shape.
Shares are of laps apart, in which the loop is cut into its parts and each is waited for.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from ban_fast import data
from ban_fast.data import Split
from ban_fast.errors import first_line
from benchmarks import machine, targets
from benchmarks.harness import TookTooLong, interleave, quantiles, rounds_for, time_limit
from benchmarks.step_figures import (
    CACHED,
    COMPILED,
    COMPOSED,
    EAGER,
    LIVE,
    NAIVE,
    PARTS,
    SUPERVISED,
    Case,
    Record,
    table,
)
from benchmarks.trainers import CLASSES, Trainer, networks, trainers

LAP_STEPS = {"cpu": {"wrn-16-1": 16, "densenet-bc-100-12": 2}, "cuda": {}}
GPU_STEPS = 40
WARM_UPS = {"cpu": 2, "cuda": 5}
ROUNDS = (7, 41)
ROUND_SECONDS = {"cpu": 60.0, "cuda": 0.0}
"""Of all rounds, within `ROUNDS`. On a CPU seven of wrn-16-1's 0.4 s laps leave a ratio to within 5 %, its target."""
LEAST_ROUNDS = 3
"""Of a measurement whose time ends."""
WIND_UP = 5.0
"""Seconds that a measuring process is ready before its time is over."""
SHARE_ROUNDS = 3
BUILT = (CACHED, SUPERVISED, LIVE, NAIVE, EAGER, COMPOSED, COMPILED)
"""In this order: what targets ask of every case first, what is compiled last."""
# Off the gradient of the plain fp32 network and loss, in the 2-norm: bf16, or fp32 rounded otherwise through a hundred
# layers, whose ReLUs flip (7.6e-3 between DenseNet-BC-100-12 and itself in channels_last, on noise).
LIMITS = {"cpu": 2e-2, "cuda": 0.3}


def cases(device: str) -> list[Case]:
    """The usual ones: those that targets are set for, and on a GPU three more networks."""
    if device == "cpu":
        return judged(device)
    return [*judged(device), Case("wrn-28-2", 128), Case("densenet-bc-100-12", 128), Case("densenet-112-33", 128)]


def judged(device: str) -> list[Case]:
    """Those that targets are set for, on a GPU the ones with most of them first."""
    if device == "cpu":
        return [Case("wrn-16-1", 32), Case("densenet-bc-100-12", 32)]
    return [Case("densenet-bc-100-12", 64), Case("densenet-80-80", 128), Case("wrn-28-10", 128)]


def steps_a_lap(case: Case, device: str) -> int:
    return GPU_STEPS if device == "cuda" else LAP_STEPS[device].get(case.network, 4)


def images(count: int) -> tuple[Split, str]:
    """So many training images, and what they are."""
    place = os.environ.get("BAN_FAST_DATA")
    if place:
        split = data.load("cifar100", directory=place, limit_train=count).train
        return Split(split.images, split.labels, torch.arange(count)), "CIFAR-100"
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8, generator=generator)
    return Split(pixels, torch.arange(count) % CLASSES, torch.arange(count)), "random images"


def measure(
    case: Case,
    device: str,
    rounds: int | None = None,
    names: tuple[str, ...] | None = None,
    *,
    seconds: float | None = None,
    ends: float | None = None,
) -> Record:
    """Every trainer's seconds a step, round by round in turn, and the shares of a step's parts.

    As many `rounds`, or as fit into `seconds` (the device's usual ones). Compiled trainers are built last: one that is
    not ready when the others need what is left until `ends`, a time.monotonic(), says so, and costs them nothing.
    """
    where, steps = torch.device(device), steps_a_lap(case, device)
    torch.backends.cudnn.benchmark = True  # for all alike
    split, what = images(steps * case.batch)
    makers = {name: make for name, make in trainers(where).items() if names is None or name in names}
    entries: dict[str, Record] = {name: {"off": None, "failed": None, "laps_s": [], "shares": None} for name in makers}
    ready: dict[str, Trainer] = {}
    epochs: dict[str, float] = {}
    """Seconds of everyone's last epoch of the warm-up."""
    for name in sorted(makers, key=lambda name: BUILT.index(name) if name in BUILT else -1):
        least = (LEAST_ROUNDS + 2 * SHARE_ROUNDS) * (sum(epochs.values()) + max(epochs.values(), default=0.0))
        left = None if ends is None else max(0.1, ends - time.monotonic() - least)
        make = partial(makers[name], case, split, where)
        trainer = _ready(make, entries[name], device, left, taught=name != SUPERVISED)
        if trainer is not None:
            ready[name], epochs[name] = trainer, entries[name]["epoch_s"]
    count = rounds or rounds_for(sum(epochs.values()), ROUND_SECONDS[device] if seconds is None else seconds, ROUNDS)
    if ends is not None:
        left = ends - time.monotonic() - 2 * SHARE_ROUNDS * sum(epochs.values())
        count = rounds_for(sum(epochs.values()), left, (min(LEAST_ROUNDS, count), count))
    running = {name: ready[name] for name in makers if name in ready}
    laps, failures = interleave({name: _lap(trainer, steps) for name, trainer in running.items()}, count)
    for name, each in laps.items():
        entries[name]["laps_s"] = each
    for name, error in failures.items():
        entries[name]["failed"] = f"{type(error).__name__}: {error}"
    spent = {name: [parts(ready[name]) for _ in range(SHARE_ROUNDS)] for name in laps}
    for name, several in spent.items():
        entries[name]["shares"] = _shares(several)
    return {"case": asdict(case), "device": device, "images": what, "steps_a_lap": steps, "trainers": entries}


def _ready(
    make: Callable[[], Trainer], entry: Record, device: str, most: float | None, *, taught: bool
) -> Trainer | None:
    """A warm trainer with the right gradient; what there is to say of it, or why there is none, goes into `entry`."""
    begin = time.perf_counter()
    try:
        with time_limit(most):
            trainer = make()
            entry["off"] = gradient_off(trainer) if taught else None
            for _ in range(WARM_UPS[device]):  # compiles, fills the cache, records graphs, tries how many steps each
                start = time.perf_counter()
                trainer.epoch()
                _wait(trainer)
                entry["epoch_s"] = time.perf_counter() - start
    except TookTooLong:
        entry["failed"] = f"left out: not ready within {most:.0f} s"
        return None
    except Exception as error:
        entry["failed"] = f"{type(error).__name__}: {first_line(error)}"
        return None
    entry["first_s"] = time.perf_counter() - begin
    return trainer if entry["off"] is None or entry["off"] <= LIMITS[device] else None


def gradient_off(trainer: Trainer) -> float:
    """How far its gradient of a batch is from that of the plain network in fp32, relative, in the 2-norm."""
    batch = next(iter(trainer.batches()))
    trainer.loss(trainer.forward(batch.images), trainer.teach(batch), batch).backward()
    student, teacher = networks(trainer.case, trainer.device)
    with torch.no_grad():
        target = teacher(batch.images.contiguous()).softmax(1)
    torch.nn.functional.cross_entropy(student(batch.images.contiguous()), target).backward()
    found, truth = (
        torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
        for network in (trainer.network, student)
    )
    trainer.network.zero_grad()
    return float((found - truth).norm() / truth.norm())


def parts(trainer: Trainer) -> dict[str, float]:
    """Seconds of each of `PARTS` in an epoch that waits for the device after every one."""
    spent = dict.fromkeys(PARTS, 0.0)

    @contextmanager
    def clock(part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        _wait(trainer)
        spent[part] += time.perf_counter() - start

    batches = iter(trainer.batches())
    while True:
        with clock("loader"):
            batch = next(batches, None)
        if batch is None:
            return spent
        with clock("teacher"):
            taught = trainer.teach(batch)
        with clock("student"):
            logits = trainer.forward(batch.images)
        leaf = logits.detach().requires_grad_()
        with clock("loss"):
            trainer.loss(leaf, taught, batch).backward()
        with clock("student"):
            logits.backward(leaf.grad)
            trainer.update()


def _shares(several: list[dict[str, float]]) -> dict[str, float]:
    medians = {part: quantiles([spent[part] for spent in several])[1] for part in PARTS}
    whole = sum(medians.values())
    return {part: medians[part] / whole for part in PARTS}


def _lap(trainer: Trainer, steps: int) -> Callable[[], float]:
    def lap() -> float:
        _wait(trainer)
        start = time.perf_counter()
        trainer.epoch()
        _wait(trainer)
        return (time.perf_counter() - start) / steps

    return lap


def _wait(trainer: Trainer) -> None:
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()


def measure_apart(
    case: Case,
    device: str,
    rounds: int | None = None,
    *,
    seconds: float | None = None,
    timeout: float | None = None,
) -> Record:
    """`measure` in a process of its own. subprocess.SubprocessError where it fails, or takes too long."""
    ends = None if timeout is None else time.monotonic() + timeout - WIND_UP  # all processes have that clock
    request = json.dumps({"case": asdict(case), "device": device, "rounds": rounds, "seconds": seconds, "ends": ends})
    command = [sys.executable, "-m", "benchmarks.step", "--answer", request]
    # The workers of compilers and of loaders go with the process that started them.
    done = subprocess.run(command, cwd=machine.ROOT, stdout=subprocess.PIPE, text=True, check=True, timeout=timeout)
    record: Record = json.loads(done.stdout.splitlines()[-1])
    return record


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.add_argument("--network", action="append", help="instead of this device's usual ones")
    parser.add_argument("--batch", type=int, default=32, help="with --network")
    parser.add_argument(
        "--rounds", type=int, help="default: 7 on a GPU, on a CPU as many as fit into a minute, 41 at most"
    )
    parser.add_argument("--json", type=Path, help="write machine, versions and every lap there")
    parser.add_argument("--answer", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.answer is not None:
        request = json.loads(options.answer)
        print(json.dumps(measure(**request | {"case": Case(**request["case"])})))
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = [Case(network, options.batch) for network in options.network or ()] or cases(device)
    results = machine.describe(device) | {"steps": []}
    for case in chosen:
        record = measure_apart(case, device, options.rounds)
        results["steps"].append(record)
        print(f"{table(record)}\n", flush=True)
        if options.json is not None:  # after each: a run may be killed in the next
            machine.write(options.json, json.dumps(results, indent=1) + "\n")
    targets.print_measured(results)


if __name__ == "__main__":
    main()
