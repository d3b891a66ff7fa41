"""Every random draw of a run, derived from its seed; and the process's generators, left as they were found."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

_BITS = 53  # JSON readers in other languages keep numbers as doubles


def generation_seed(run_seed: int, generation: int) -> int:
    """The seed of one generation, below 2**53; results.json records it."""
    return _hash(run_seed, f"generation {generation}")


def derived_seed(seed: int, purpose: str) -> int:
    """A seed, below 2**53, for one purpose ("init", "order", ...) of whatever `seed` belongs to."""
    return _hash(seed, purpose)


def _hash(seed: int, text: str) -> int:
    digest = hashlib.blake2b(text.encode(), key=seed.to_bytes(8, "little"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> (64 - _BITS)


def seed_everything(seed: int, device: torch.device) -> None:
    """Seed the global generators of torch (CPU and `device`), Python and numpy."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def random_state(device: torch.device) -> dict[str, Any]:
    """The states of those generators, in types that `torch.load(weights_only=True)` admits."""
    version, internal, gauss_next = random.getstate()
    numpy = np.random.get_state(legacy=False)
    assert isinstance(numpy, dict)
    keys, position = numpy["state"]["key"], numpy["state"]["pos"]
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "python": (version, torch.tensor(internal), gauss_next),  # a tensor: 625 integers pickle slowly
        "numpy": (
            str(numpy["bit_generator"]),
            torch.from_numpy(keys.astype(np.int64)),
            int(position),
            int(numpy["has_gauss"]),
            float(numpy["gauss"]),
        ),
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Put back what `random_state` gave."""
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal.tolist()), gauss_next))
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))


@contextmanager
def isolated(device: torch.device, seed: int | None = None) -> Iterator[None]:
    """Whatever is drawn inside, the generators are as before afterwards; `seed` seeds them for the inside."""
    before = random_state(device)
    try:
        if seed is not None:
            seed_everything(seed, device)
        yield
    finally:
        set_random_state(before, device)


class Turns:
    """The generators' states of one of several who draw from them in turn; each draws as if it were alone."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._state = self._now()
        self.drew = False
        """Whether anything was drawn, or seeded, in the last turn."""

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Inside, the generators go on where the last turn left them; outside, they are as found.

        While steps are recorded they stay as they are: a GPU's can't be changed then, and what draws is not recorded.
        """
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            yield
            return
        found = self._now()
        self._put(self._state)
        try:
            yield
        finally:
            state = self._now()
            self.drew = not _are_equal(state, self._state)
            self._state = state
            self._put(found)

    def _now(self) -> tuple[Any, ...]:
        cuda = torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None
        return torch.get_rng_state(), cuda, random.getstate(), np.random.get_state()

    def _put(self, state: tuple[Any, ...]) -> None:
        cpu, cuda, python, numpy = state
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, self._device)
        random.setstate(python)
        np.random.set_state(numpy)


def _are_equal(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Whether two of a turn's states are the same: nothing was drawn between them."""
    (*tensors, python, numpy), (*others, other_python, other_numpy) = one, other
    return (
        all(a is b or torch.equal(a, b) for a, b in zip(tensors, others, strict=True))
        and python == other_python
        and np.array_equal(numpy[1], other_numpy[1])
        and (numpy[0], *numpy[2:]) == (other_numpy[0], *other_numpy[2:])
    )
