"""How a network is shown the batches of an epoch: each by itself, or with the state that the one before left behind."""

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn


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

    The state goes from each window to the next and no gradient goes with it; None, the start of a text, at first.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._state: Any = None

    def __call__(self, inputs: Tensor) -> Tensor:
        """int64 [T, B] -> [T * B, V], in the order of the window's targets."""
        logits, state = self._network(inputs, self._state)
        self._state = _each(state, Tensor.detach)
        rows: Tensor = logits.flatten(0, 1)
        return rows

    def begin(self) -> None:
        """The next window is a text's first."""
        self._state = None

    def state(self) -> Any:
        """The state after the last window."""
        return self._state

    def restore(self, state: Any) -> None:
        """Go on from a `state`, moved to where the network is."""
        device = next(self._network.parameters()).device
        self._state = _each(state, lambda tensor: tensor.to(device))


def _each(state: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`state` with every tensor in its tuples and dictionaries changed."""
    if isinstance(state, (tuple, list)):
        return tuple(_each(part, change) for part in state)
    if isinstance(state, dict):
        return {name: _each(part, change) for name, part in state.items()}
    return change(state) if isinstance(state, Tensor) else state
