"""`python -m benchmarks.densenet`: training steps of DenseNets in every memory, beside torch.compile and torchvision.

Forward, cross-entropy and backward, without the optimizer. For time all providers take turns, A, B, C, A, B, C: on a
CPU each in a process of its own, since malloc would serve one with pages that another has had, on a GPU all in one.
For memory each has a fresh process: what autograd saved (bytes of storages), what the process (on a GPU: the
allocator) held between forward and backward beyond what it held before, and the most that it held at once. At the end
stand the targets that what was measured is judged by (targets.py).
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ban_fast import models
from ban_fast.errors import first_line
from benchmarks import cuda, machine, targets
from benchmarks.densenet_figures import (
    AUTOTUNED,
    CHANNELS_LAST,
    CHECKPOINT,
    COMPILED,
    GRAPHED,
    PLAIN,
    SHARED,
    Case,
    Record,
    table,
)
from benchmarks.densenet_turns import ROUNDS, Entry, Processes, Turns
from benchmarks.harness import TIME_OVER, TookTooLong, time_limit

NETWORKS = ("densenet-bc-100-12", "densenet-112-33", "densenet-90-60", "densenet-80-80")
PROVIDERS = (PLAIN, CHANNELS_LAST, "compile", CHECKPOINT, SHARED, "torchvision memory_efficient")
ON_GPUS = (AUTOTUNED, *(provider + GRAPHED for provider in (CHANNELS_LAST, SHARED)))
"""A GPU's beside these: what a training loop reaches that leaves no work to the host. No GPU has run them yet."""
# Off plain's gradient of all parameters, in the 2-norm: fp32 rounded otherwise through a hundred layers, whose ReLUs
# flip (7.6e-3 between plain and itself in channels_last), or bf16's 8 bits: on the CPU 0.29 between those two at
# 100-12, 0.37 at 80-80, and up to 0.43 between plain and fp32, which what rounds less is closer to. A gradient that has
# nothing to do with plain's is 1.4 off it.
LIMITS = {False: 2e-2, True: 0.6}


def cases(device: str) -> list[Case]:
    """The CPU's target and the same under autocast, or everything at two batches on a GPU."""
    if device == "cpu":
        return [Case(NETWORKS[0], 32), Case(NETWORKS[0], 32, True)]
    return [Case(network, batch, amp) for network in NETWORKS for batch in (64, 128) for amp in (False, True)]


def reported(device: str) -> list[Case]:
    """Those of a report: all of a CPU's, and of a GPU's the one with targets."""
    return cases(device) if device == "cpu" else [Case("densenet-80-80", 128, True)]


class Step:
    """One provider's training step, on the same images and from the same seed as every other's."""

    def __init__(self, provider: str, case: Case, device: str) -> None:
        self.case, self.device = case, device
        self.graph: torch.cuda.CUDAGraph | None = None
        graphed, provider = provider.endswith(GRAPHED), provider.removesuffix(GRAPHED)
        memory = provider if provider in (CHECKPOINT, SHARED) else PLAIN
        torch.manual_seed(0)
        self.network = models.create(case.network, memory=memory).to(device)
        self.images = torch.randn(case.batch, 3, 32, 32, device=device)
        self.labels = torch.randint(100, (case.batch,), device=device)
        if provider == CHANNELS_LAST or (device == "cuda" and provider != PLAIN):
            self.network.to(memory_format=torch.channels_last)
            self.images = self.images.to(memory_format=torch.channels_last)
        self.run: Callable[[Tensor], Tensor] = self.network
        if provider.startswith("compile"):
            mode = provider.removeprefix("compile").strip() or None
            self.run = torch.compile(self.network, dynamic=False, mode=mode)
        elif provider.startswith("torchvision"):
            self.run = torchvision_network(self.network)
        if graphed:
            self._capture()

    def forward(self) -> Tensor:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.case.amp):
            return F.cross_entropy(self.run(self.images).float(), self.labels)

    def gradient(self) -> Tensor:
        """Of every parameter, flat."""
        self.lap()
        grads = (parameter.grad for parameter in self.network.parameters())
        return torch.cat([grad.flatten() for grad in grads if grad is not None])

    def lap(self) -> float:
        """Seconds of a step. Gradients are made anew in each, not added."""
        if self.graph is None:
            self.network.zero_grad(set_to_none=True)
        self._wait()
        start = time.perf_counter()
        if self.graph is None:
            self.forward().backward()
        else:
            self.graph.replay()
        self._wait()
        return time.perf_counter() - start

    def _capture(self) -> None:
        """One graph of a step, in whose memory every replay makes the gradients anew."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # kernels are compiled, and algorithms chosen, before the capture
            for _ in range(3):
                self.lap()
        torch.cuda.current_stream().wait_stream(stream)
        self.network.zero_grad(set_to_none=True)
        with cuda.recording() as graph:
            self.forward().backward()
        self.graph = graph

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def torchvision_network(ours: models.DenseNet) -> nn.Module:
    """torchvision's DenseNet of our widths, with the weights of `ours` and blocks in its memory_efficient form."""
    from torchvision.models import DenseNet

    growth = ours.blocks[0][0].grow.conv.out_channels
    units = tuple(len(block) for block in ours.blocks)
    theirs = DenseNet(
        growth, units, ours.stem.out_channels, num_classes=ours.classifier.out_features, memory_efficient=True
    )
    theirs.features.conv0 = ours.stem  # theirs is for ImageNet: 7x7, and pooling
    for name in ("norm0", "relu0", "pool0"):
        setattr(theirs.features, name, nn.Identity())
    for i, block in enumerate(ours.blocks):
        for layer, unit in zip(getattr(theirs.features, f"denseblock{i + 1}").children(), block, strict=True):
            layer.norm1, layer.conv1 = unit.reduce.norm, unit.reduce.conv
            layer.norm2, layer.conv2 = unit.grow.norm, unit.grow.conv
    for i, transition in enumerate(ours.transitions):
        if i + 1 < len(units):
            theirs.features.get_submodule(f"transition{i + 1}").norm = transition.norm
            theirs.features.get_submodule(f"transition{i + 1}").conv = transition.conv
    last = ours.norm
    if len(ours.transitions) == len(units):  # a third one, that does not pool
        last = nn.Sequential(ours.transitions[-1].norm, nn.ReLU(inplace=True), ours.transitions[-1].conv, ours.norm)
    theirs.features.norm5, theirs.classifier = last, ours.classifier
    return theirs.to(ours.stem.weight.device)


def saved_bytes(step: Step) -> int:
    """Bytes that autograd holds after a step's forward: every storage once, parameters, buffers and images not."""
    return held_after(step.forward, (*step.network.parameters(), *step.network.buffers(), step.images))


def held_after(forward: Callable[[], Tensor], known: Iterable[Tensor]) -> int:
    """Bytes that autograd holds after `forward`: every storage once, those of the `known` tensors not at all."""
    own = {tensor.untyped_storage().data_ptr() for tensor in known}
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    assert output.requires_grad  # alive until here: no storage was freed and its address counted once for two
    return sum(held.values())


def memory(provider: str, case: Case, device: str) -> Entry:
    """Bytes held between forward and backward, and at most; in a fresh process, after a step that builds its caches.

    On a CPU that one is small: little of what it frees can be used again. A GPU's allocator knows what is held, and the
    same step is not compiled twice.
    """
    step = Step(provider, case if device == "cuda" else Case(case.network, 2, case.amp), device)
    step.lap()
    if device == "cuda":
        step.network.zero_grad(set_to_none=True)
        torch.cuda.reset_peak_memory_stats()
    else:
        step = Step(provider, case, device)
    before = _held(device)
    loss = step.forward()
    held = _held(device) - before
    loss.backward()
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else _peak()
    return {"held_bytes": held, "peak_bytes": peak - before, "saved_bytes": saved_bytes(step)}


def _held(device: str) -> int:
    if device == "cuda":
        return torch.cuda.memory_allocated()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def off(step: Step, truth: Step) -> float:
    """How far a step's gradient is from another's, relative."""
    gradient, expected = step.gradient(), truth.gradient()
    return float((gradient - expected).norm() / expected.norm())


def serve(providers: Sequence[str], case: Case, device: str) -> None:
    """Each line of standard input names a provider: answered are its seconds of a step, or how far off its gradient is,
    or why there is no answer. Whatever else is printed goes to standard error.
    """
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    steps: dict[str, Step] = {}
    for line in sys.stdin:
        request = json.loads(line)
        provider = request["provider"]
        try:
            with time_limit(request["most"]):
                if provider not in steps:
                    steps[provider] = Step(provider, case, device)
                if request["what"] == "lap":
                    reply: Entry = {"seconds": steps[provider].lap()}
                else:
                    reply = {"off": off(steps[provider], steps.get(PLAIN) or Step(PLAIN, case, device))}
        except TookTooLong:
            reply = {"failed": f"left out: not built within {request['most']:.0f} s"}
        except Exception as error:
            reply = {"failed": f"{type(error).__name__}: {first_line(error)}"}
        if "failed" in reply:
            steps.pop(provider, None)
        print(json.dumps(reply), file=replies, flush=True)


def times(
    providers: Sequence[str], case: Case, device: str, rounds: int, ends: float | None = None
) -> dict[str, Entry]:
    """Laps of all providers, in turns after three to warm up; one that fails, or whose gradient is off, has none.

    On a GPU compiled ones join later, one after the other: they take minutes, and the others have their laps by then.
    """
    groups = [(provider,) for provider in providers] if device == "cpu" else [tuple(providers)]
    phases: list[list[str]] = [list(providers)]
    if device == "cuda":
        compiled = [provider for provider in providers if provider.startswith("compile")]
        phases = [[p for p in providers if p not in compiled], *([provider] for provider in compiled)]
    with Processes(groups, partial(_command, "laps", case, device), ends) as processes:
        found = Turns(processes, rounds, LIMITS[case.amp], early=device == "cuda").run(phases)
    return {provider: found[provider] for provider in providers}


def measure(
    case: Case,
    device: str,
    rounds: int = ROUNDS,
    providers: tuple[str, ...] | None = None,
    timeout: float | None = None,
) -> Record:
    """Everything about a case: times by turns, and memory in a fresh process each.

    `providers` are the device's usual ones. What is not there after `timeout` seconds, or failed, says so. On a GPU
    the memory that targets ask for comes first, all at once: its kernels are then compiled for the clock too.
    """
    ends = None if timeout is None else time.monotonic() + timeout
    chosen = usual(device) if providers is None else providers
    kept = [provider for provider in chosen if not provider.endswith(GRAPHED) and provider != AUTOTUNED]
    sizes: dict[str, Entry] = {}
    if device == "cuda":
        first = [provider for provider in kept if provider in (PLAIN, CHECKPOINT, SHARED)]
        with ThreadPoolExecutor(max(1, len(first))) as pool:
            sizes |= zip(first, pool.map(lambda provider: _memory(provider, case, device, ends), first), strict=True)
    entries = times(chosen, case, device, rounds, ends)
    for provider in kept:
        if provider not in sizes and entries[provider]["failed"] is None:
            sizes[provider] = _memory(provider, case, device, ends)
    for provider in chosen:
        entries[provider] |= sizes.get(provider.removesuffix(GRAPHED), {})
    return {"case": asdict(case), "providers": entries}


def _memory(provider: str, case: Case, device: str, ends: float | None) -> Entry:
    """`memory_apart`, or why there is none."""
    if ends is not None and ends - time.monotonic() < 1:
        return {"memory_failed": TIME_OVER}
    try:
        return memory_apart(provider, case, device, ends)
    except subprocess.TimeoutExpired:
        return {"memory_failed": TIME_OVER}
    except subprocess.CalledProcessError as error:
        return {"memory_failed": f"its process ended with status {error.returncode}"}


def usual(device: str) -> tuple[str, ...]:
    """The providers of "cpu" or "cuda", there those that targets ask for first."""
    if device == "cpu":
        return PROVIDERS
    first = (PLAIN, SHARED, SHARED + GRAPHED, CHANNELS_LAST, CHECKPOINT, *COMPILED)
    return first + tuple(provider for provider in PROVIDERS + ON_GPUS if provider not in first)


def memory_apart(provider: str, case: Case, device: str, ends: float | None = None) -> Entry:
    """`memory` in a process of its own."""
    command = _command("memory", case, device, (provider,))
    left = None if ends is None else max(0.0, ends - time.monotonic())
    done = subprocess.run(command, cwd=machine.ROOT, stdout=subprocess.PIPE, text=True, check=True, timeout=left)
    entry: Entry = json.loads(done.stdout.splitlines()[-1])
    return entry


def _command(what: str, case: Case, device: str, providers: Sequence[str]) -> list[str]:
    request = {"what": what, "case": asdict(case), "device": device, "providers": providers}
    return [sys.executable, "-m", "benchmarks.densenet", "--answer", json.dumps(request)]


def answer(what: str, case: Entry, device: str, providers: list[str]) -> None:
    """In the process that `_command` starts."""
    if what == "laps":
        serve(providers, Case(**case), device)
    else:
        print(json.dumps(memory(providers[0], Case(**case), device)))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.densenet", description=__doc__)
    parser.add_argument("--network", action="append", help=f"instead of this device's usual ones, of {NETWORKS}")
    parser.add_argument("--batch", type=int, default=32, help="with --network")
    parser.add_argument("--amp", action="store_true", help="with --network: bf16 autocast")
    parser.add_argument(
        "--provider", action="append", choices=(PROVIDERS + ON_GPUS)[1:], help="beside plain; default: all"
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--seconds", type=float, help="for each case; what is not there by then says so")
    parser.add_argument("--json", type=Path, help="write machine, versions and every lap there")
    parser.add_argument("--answer", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.answer is not None:
        answer(**json.loads(options.answer))
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = [Case(network, options.batch, options.amp) for network in options.network or ()] or cases(device)
    providers = (PLAIN, *options.provider) if options.provider else usual(device)
    if device == "cpu" and (absent := [provider for provider in providers if provider.endswith(GRAPHED)]):
        parser.error(f"--provider {absent[0]!r} needs a CUDA device")
    results = machine.describe(device) | {"densenets": []}
    for case in chosen:
        record = measure(case, device, options.rounds, providers, options.seconds)
        results["densenets"].append(record)
        print(f"{table(record)}\n", flush=True)
        if options.json is not None:  # after each: a run may be killed in the next
            machine.write(options.json, json.dumps(results, indent=1) + "\n")
    targets.print_measured(results)


if __name__ == "__main__":
    main()
