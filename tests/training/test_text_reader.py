"""What a recurrent network remembers between windows: no gradient, whatever it keeps it in, however many share it."""

from typing import Any

import torch
from torch import Tensor, nn

from ban_fast.training.distributed import Ranks
from ban_fast.training.reader import Carried, Forward


class Sums(nn.Module):
    """Remembers the sum of all tokens of each stream, [1, B], beside a count that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        before, windows = (torch.zeros(1, tokens.shape[1]), 0) if state is None else (state["sum"][0], state["windows"])
        after = before + self.weight * tokens.sum(0, keepdim=True)
        return after.expand_as(tokens)[..., None], {"sum": (after,), "windows": windows + 1}


class OneOfTwo(Ranks):
    """A rank whose neighbour's values are known."""

    def __init__(self, rank: int, other: Any) -> None:
        super().__init__(rank, 2)
        self.other = other

    def gather(self, value: Any) -> list[Any]:
        return [value, self.other] if self.rank == 0 else [self.other, value]


def window(*streams: int) -> Tensor:
    return torch.tensor(streams).expand(3, -1)


def test_carried_without_a_gradient_until_the_next_epoch() -> None:
    reader = Carried(Sums())
    assert reader.state() is None
    rows = reader(window(1, 2))
    assert rows.shape == (6, 1)
    assert rows[0].requires_grad
    state = reader.state()
    assert not state["sum"][0].requires_grad
    assert state["windows"] == 1
    assert reader(window(1, 1)).view(3, 2)[0].tolist() == [6, 9]
    reader.begin()
    assert reader(window(1, 1)).view(3, 2)[0].tolist() == [3, 3]
    reader.restore(state)
    assert reader(window(1, 1)).view(3, 2)[0].tolist() == [6, 9]


def test_ranks_put_their_streams_side_by_side() -> None:
    """A checkpoint of two ranks is one process's, and one of one process is cut for two."""
    network = Sums()
    alone = Carried(network)
    alone(window(1, 2, 3, 4))
    halves = [Carried(network), Carried(network)]
    halves[0](window(1, 2))
    halves[1](window(3, 4))
    left = Carried(network, OneOfTwo(0, halves[1].state()))
    right = Carried(network, OneOfTwo(1, halves[0].state()))
    assert left.state() is None
    left(window(1, 2))
    right(window(3, 4))
    for reader in (left, right):
        assert torch.equal(reader.state()["sum"][0], alone.state()["sum"][0])
        reader.begin()
        reader.restore(alone.state())
    assert left(window(0, 0)).view(3, 2)[0].tolist() == [3, 6]
    assert right(window(0, 0)).view(3, 2)[0].tolist() == [9, 12]


def test_images_leave_nothing_behind() -> None:
    reader = Forward(nn.Flatten())
    reader(torch.ones(2, 3, 1))
    reader.restore({"anything": 1})
    reader.begin()
    assert reader.state() is None
