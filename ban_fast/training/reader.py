"""How a network is shown the batches of an epoch: each by itself, or with the state that the one before left behind."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import UserError
from .distributed import ALONE, Ranks


class Reader(Protocol):
    """A network in use, with what it remembers of the batches before."""

    def __call__(self, inputs: Tensor) -> Tensor:  # [B, ...] -> [R, C]
        """Logits of the next batch: a row for each of its labels."""
        ...

    def begin(self) -> None:
        """An epoch begins: nothing is remembered."""
        ...

    def state(self) -> Any:
        """What is remembered: tensors in tuples or dictionaries, or None."""
        ...

    def restore(self, state: Any) -> None:
        """Take up a `state`."""
        ...


class Forward:
    """A network that remembers nothing: images go in as they come."""

    def __init__(self, forward: Callable[[Tensor], Tensor]) -> None:
        self._forward = forward

    def __call__(self, inputs: Tensor) -> Tensor:
        """[B, ...] -> [B, C]."""
        return self._forward(inputs)

    def begin(self) -> None:
        """There is nothing to forget."""

    def state(self) -> None:
        """Nothing."""

    def restore(self, state: Any) -> None:
        """There is nothing to take up."""


class Carried:
    """A recurrent network, `network(tokens [T, B], state) -> (logits [T, B, V], state)`, along a text.

    The state goes from each window to the next and no gradient goes with it; None, the start of a text, at first. Its
    tensors have the streams as their second dimension, of which each of several ranks has as many.
    """

    def __init__(self, network: nn.Module, ranks: Ranks = ALONE) -> None:
        self._network, self._ranks = network, ranks
        self._state: Any = None

    def __call__(self, inputs: Tensor) -> Tensor:
        """int64 [T, B] -> [T * B, V], in the order of the window's targets."""
        logits, state = _pair(self._network(inputs, self._state))
        self._state = _each(state, Tensor.detach)
        return logits.flatten(0, 1)

    def begin(self) -> None:
        """The next window is a text's first."""
        self._state = None

    def state(self) -> Any:
        """The state after the last window, of all ranks' streams side by side. All ranks ask."""
        if self._ranks.is_alone or self._state is None:
            return self._state
        return _together(self._ranks.gather(_each(self._state, Tensor.cpu)))

    def restore(self, state: Any) -> None:
        """Go on from a `state`, of however many ranks, with this one's streams, moved to where the network is."""
        device, ranks = next(self._network.parameters()).device, self._ranks

        def own(tensor: Tensor) -> Tensor:
            if not ranks.is_alone:
                tensor = tensor[:, ranks.shard.cut(slice(0, tensor.shape[1]))].contiguous()
            return tensor.to(device)

        self._state = _each(state, own)


def _pair(output: Any) -> tuple[Tensor, Any]:
    """Logits [T, B, V] and a state. UserError for anything else, which a network may return in training alone."""
    if isinstance(output, (tuple, list)) and len(output) == 2 and isinstance(output[0], Tensor) and output[0].ndim == 3:
        return output[0], output[1]
    raise UserError(f"the network must return (logits [T, B, V], state) in training too, got {type(output).__name__}")


def _each(state: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`state` with every tensor in its tuples and dictionaries changed."""
    if isinstance(state, (tuple, list)):
        return tuple(_each(part, change) for part in state)
    if isinstance(state, dict):
        return {name: _each(part, change) for name, part in state.items()}
    return change(state) if isinstance(state, Tensor) else state


def _together(states: list[Any]) -> Any:
    """Of states alike but for their streams, all of these."""
    first = states[0]
    if isinstance(first, tuple):
        return tuple(_together(list(parts)) for parts in zip(*states, strict=True))
    if isinstance(first, dict):
        return {name: _together([state[name] for state in states]) for name in first}
    return torch.cat(states, 1) if isinstance(first, Tensor) else first
