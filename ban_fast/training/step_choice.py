"""How steps are made: as they are, compiled, or recorded as a CUDA graph; which of them a run can have, and takes."""

from typing import NamedTuple

import torch

from ..config import Config
from ..data import Loader, MemoryLoader, TensorLoader, TextLoader
from ..errors import OptionError

EAGER, COMPILE, GRAPH = "eager", "compile", "graph"


class StepChoice(NamedTuple):
    """How the steps of a generation are made, and why so."""

    mode: str
    """"eager", "compile" or "graph"."""
    reason: str
    a_replay: int | None = None
    """Steps in a replay of a CUDA graph, where the quickest number of them was measured; before that, and where epochs
    are too short to measure it, one."""

    def sentence(self, config: Config, device: torch.device) -> str | None:
        """What to say of it: where there was a choice, or it is not what was asked for."""
        if self.reason == "asked for" or (config.steps == "auto" and device.type != "cuda"):
            return None
        return f"steps: {self.mode}, as {self.reason}"

    def record(self) -> dict[str, str | int]:
        """What results.json says of it."""
        record: dict[str, str | int] = {"mode": self.mode, "reason": self.reason}
        return record if self.mode != GRAPH else record | {"a_replay": self.a_replay or 1}


def replays_sentence(seconds: dict[int, float]) -> str:
    """ "steps: 4 a replay, 0.412 ms each (1: 0.455 ms, 8: 0.41 ms)", of times by steps a replay, the chosen first."""
    times = {size: f"{1000 * each:.3g} ms" for size, each in seconds.items()}
    best = next(iter(times))
    others = ", ".join(f"{size}: {each}" for size, each in times.items() if size != best)
    return f"steps: {best} a replay, {times[best]} each" + (f" ({others})" if others else "")


def check_step(config: Config, device: torch.device, loader: Loader) -> None:
    """OptionError, before anything is trained or written, where the steps that `config` asks for can't be."""
    if config.steps == GRAPH and (problem := _problem(device, loader)):
        others = "auto or eager" if isinstance(loader, TextLoader) else "auto, eager or compile"
        raise OptionError("step", f"{problem}; use {others}")


def choose_step(config: Config, device: torch.device, loader: Loader) -> StepChoice:
    """What a generation's steps are."""
    if config.steps in (EAGER, COMPILE):
        return StepChoice(config.steps, "asked for")
    problem = _problem(device, loader)
    if problem is not None:
        return StepChoice(EAGER, problem)
    return StepChoice(GRAPH, "asked for" if config.steps == GRAPH else "all parts of a step are on the device")


def _problem(device: torch.device, loader: Loader) -> str | None:
    """Why a step can't be recorded, if so."""
    if device.type != "cuda":
        return "a CUDA graph needs a GPU, and this run is on the CPU"
    if isinstance(loader, TextLoader):
        return "the state that a text carries from step to step is not recorded"
    if not isinstance(loader, (MemoryLoader, TensorLoader)):
        return "a CUDA graph gathers images from the device's memory, and this loader's come from elsewhere"
    if loader.shard.of > 1:
        return "what several processes exchange in a step is not recorded"
    return None
