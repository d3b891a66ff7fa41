"""The teacher: the generation before, frozen. What it says of a batch, and the one that says it live."""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..data import Batch, hashing
from ..errors import UserError
from .reader import Forward, Reader


class Taught(NamedTuple):
    """What a teacher says of one batch, as the losses take it; CWTM takes the confidence if it is there."""

    logits: Tensor | None
    """[B, C]; with `rows`, [M, C]. None: the confidence is all there is."""
    rows: Tensor | None = None
    """int64 [B]: sample i is taught by row `rows[i]`. None: by row i."""
    confidence: Tensor | None = None
    """The largest softmax output, fp32 [B]; with `rows`, [M]."""
    total: Tensor | None = None
    """Its sum over the whole batch, fp64 0-d, where this is a part of one."""


class Teacher(Protocol):
    """What the training loop needs of a teacher; several students may share one."""

    def begin(self) -> None:
        """The next batch is an epoch's first."""
        ...

    def ahead(self, batch: Batch) -> int:
        """How many batches like this one it would like to `prepare` at a time; 1 or more."""
        ...

    def prepare(self, batches: Sequence[Batch]) -> None:
        """See batches that are about to be taught, in order."""
        ...

    def lacks(self, sample_ids: Tensor, views: Tensor) -> Tensor:  # [n], [n] -> bool [n]
        """Which of these it is to be prepared for before it is called for them: it does not know them yet, or keeps
        them elsewhere."""
        ...

    def addresses(self) -> Sequence[int]:
        """Data pointers of tensors that may be reallocated later; a recorded step is void when one changes."""
        ...

    def __call__(self, batch: Batch) -> Taught:
        """What it says of a batch that it was prepared for. Detached."""
        ...

    def record(self, rows: int, unit: str = "images", objective: str = "") -> dict[str, Any]:
        """What results.json says of the teacher of a student that was trained on so many images or tokens."""
        ...

    def state(self) -> dict[str, Any]:
        """Its part of a student's checkpoint."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Take up a `state`. UserError if it was another teacher's."""
        ...

    def check(self) -> None:
        """UserError if the network is not what it was when this teacher was made."""
        ...

    def sync(self) -> None:
        """Put on disk what checkpoints are about to rely on."""
        ...

    def close(self) -> None:
        """Let go of files."""
        ...

    def dismiss(self) -> None:
        """`close`, its students being trained: what was kept for them alone is removed."""
        ...


class Frozen:
    """A finished network in eval mode and without gradients, whose every parameter and buffer is watched."""

    def __init__(self, network: nn.Module, reader: Reader | None = None, *, is_folded: bool = False) -> None:
        """`reader` shows the network its batches; None: each by itself, as it comes.

        `is_folded`: whether it shows them to a folded copy, which has all that could change in common with the network.
        """
        self.network, self.is_folded = network.eval().requires_grad_(False), is_folded
        self.fingerprint = fingerprint(network)
        self.reader = Forward(network) if reader is None else reader

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:  # [B, ...] -> [R, C]
        """The network's outputs, detached."""
        return self.reader(images).detach()

    def check(self) -> None:
        """UserError if the network is not what it was when this was made."""
        if fingerprint(self.network) != self.fingerprint:
            raise UserError(
                "the teacher changed while it taught: a layer updates its parameters or buffers in eval mode, or "
                "shares them with the student; let it do neither"
            )

    def manner(self) -> dict[str, Any]:
        """What results.json says of how it computes, where that is not as it was trained."""
        return {"batch_norm": "folded"} if self.is_folded else {}


class LiveTeacher(Frozen):
    """A teacher that gives its logits for each batch as it comes: the very images that the student sees."""

    def __init__(self, network: nn.Module, reader: Reader | None = None, *, is_folded: bool = False) -> None:
        super().__init__(network, reader, is_folded=is_folded)
        self._dtype: torch.dtype | None = None
        self._asked = 0  # batches
        self._restored: int | None = None

    def begin(self) -> None:
        """Forget what was carried."""
        self.reader.begin()

    def ahead(self, batch: Batch) -> int:
        """One batch at a time."""
        return 1

    def prepare(self, batches: Sequence[Batch]) -> None:
        """Nothing can be done before the batch is there."""

    def lacks(self, sample_ids: Tensor, views: Tensor) -> Tensor:
        """It learns nothing."""
        return torch.zeros_like(sample_ids, dtype=torch.bool)

    def addresses(self) -> Sequence[int]:
        """Its weights stay where they are."""
        return ()

    def __call__(self, batch: Batch) -> Taught:
        """One forward pass."""
        logits = self.logits(batch.images)
        self._dtype = logits.dtype
        self._asked += 1
        return Taught(logits)

    def record(self, rows: int, unit: str = "images", objective: str = "") -> dict[str, Any]:
        """A forward pass for all that the student was trained on."""
        return {"mode": "live", "dtype": dtype_name(self._dtype), f"forward_{unit}": rows} | self.manner()

    def state(self) -> dict[str, Any]:
        """Which teacher it is."""
        state = {"mode": "live", "fingerprint": self.fingerprint, "dtype": self._dtype}
        return state | {"asked": self._asked, "carried": self.reader.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up a `state`; of several students', the earliest. UserError if it was another teacher's."""
        check_fingerprint(state, self.fingerprint)
        self._dtype = state.get("dtype")
        asked = state.get("asked", 0)  # a student's checkpoint that was begun with a cache has none
        if self._restored is None or asked < self._restored:
            self._asked = self._restored = asked
            self.reader.restore(state.get("carried"))

    def sync(self) -> None:
        """There are no files."""

    def close(self) -> None:
        """There are no files."""

    def dismiss(self) -> None:
        """There are no files."""


def fingerprint(network: nn.Module) -> str:
    """A hash of every parameter and buffer, by name, shape, type and bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        digest.update(f"{name} ".encode())
        hashing.add(digest, tensor)
    return digest.hexdigest()


def check_fingerprint(state: dict[str, Any], expected: str) -> None:
    """UserError if the state of a checkpoint is of another teacher."""
    if state["fingerprint"] != expected:
        raise UserError("this checkpoint's student had another teacher: the generation before it was replaced")


def dtype_name(dtype: torch.dtype | None) -> str | None:
    """ "float32" of torch.float32."""
    return None if dtype is None else str(dtype).removeprefix("torch.")
