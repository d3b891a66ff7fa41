"""A run in several processes (ranks), one a GPU: who they are, which part of a batch is whose, and how they agree.

`torchrun` starts them and says so in the environment, or a scheduler that sets RANK, WORLD_SIZE, MASTER_ADDR and
MASTER_PORT; a process group that is there already is used as it is, if gloo is among its backends. Whatever decides
what happens next - a signal, the clock, a loss that is not finite, an error - is agreed on by all: a rank that went its
own way would leave the others waiting. Such words go over gloo, between the hosts: no GPU is waited for.
"""

import gc
import itertools
import os
import pickle
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from ..data import Shard
from ..errors import OptionError, UserError

T = TypeVar("T")

_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LOCALLY = ("LOCAL_RANK", "LOCAL_WORLD_SIZE")
_BACKENDS = ("gloo", "nccl")
"""What their errors name, with a line of their source or as who could not reach another rank."""


_joins = itertools.count()


class RankLost(Exception):
    """Another process of the run has ended, or can't be reached any more. The last checkpoint stands."""


class Ranks:
    """The processes of one run, seen from one of them. One that is alone waits for nobody."""

    def __init__(self, rank: int = 0, size: int = 1, *, local_rank: int = 0, local_size: int = 1) -> None:
        self.rank, self.size = rank, size
        self._local_rank, self._local_size = local_rank, local_size

    @property
    def is_first(self) -> bool:
        """Whether this one writes and speaks."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        """Whether there is no other."""
        return self.size == 1

    @property
    def shard(self) -> Shard:
        """The part of every batch that is this rank's."""
        return Shard(self.rank, self.size, self._local_size)

    def device(self, device: torch.device) -> torch.device:
        """This rank's own of the devices of a kind. OptionError if its machine has fewer than ranks."""
        if self.is_alone or device.type != "cuda":
            return device
        count = torch.cuda.device_count()
        if self._local_size > count:
            raise OptionError(
                "device",
                f"{self._local_size} processes were started on a machine with {count} GPU{'s' * (count > 1)}, and each "
                f"needs its own: use --nproc-per-node {count}, or cpu",
            )
        torch.cuda.set_device(self._local_rank)
        return torch.device("cuda", self._local_rank)

    def sum(self, tensor: Tensor) -> Tensor:
        """`tensor`, now the sum over all ranks."""
        if not self.is_alone:
            dist.all_reduce(tensor)
        return tensor

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Which of the flags any rank has."""
        if self.is_alone:
            return flags
        word = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(word, dist.ReduceOp.MAX)
        return tuple(map(bool, word.tolist()))

    def agreed(self, flag: Callable[[], bool]) -> Callable[[], bool]:
        """Whether any rank's is true: to be asked by all of them."""
        return lambda: self.any(flag())[0]

    def gather(self, value: T) -> list[T]:
        """Every rank's value, by rank."""
        if self.is_alone:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def in_turns(self, own: list[Tensor]) -> list[Tensor]:
        """What the ranks made of items that they took in turns, rank 0 the first: in the items' order, on the CPU."""
        if self.is_alone:
            return own
        every = self.gather([tensor.cpu() for tensor in own])
        return [every[number % self.size][number // self.size] for number in range(sum(map(len, every)))]

    def own(self, purpose: str) -> str:
        """The purpose of a seed that is each rank's own; rank 0 draws what one process would."""
        return purpose if self.is_first else f"{purpose}, rank {self.rank}"

    def first(self, work: Callable[[], T]) -> T:
        """What rank 0, which alone does the work, gets from it: for all. What it raises, all raise."""
        if self.is_alone:
            return work()
        said: list[Any] = [None, None]
        if self.is_first:
            try:
                said[0] = work()
            except Exception as error:
                said[1] = packed(error)
                dist.broadcast_object_list(said)
                raise
        dist.broadcast_object_list(said)
        if said[1] is not None:
            met, cause = said[1]
            raise met from cause
        return said[0]  # type: ignore[no-any-return]

    @contextmanager
    def alike(self) -> Iterator[None]:
        """What one rank raises inside, all raise afterwards. Inside, nothing may be exchanged."""
        if self.is_alone:
            yield
            return
        own: Exception | None = None
        try:
            yield
        except Exception as error:
            own = error
        problems = self.gather(None if own is None else packed(own))
        if own is not None:
            raise own
        for problem in problems:
            if problem is not None:
                met, cause = problem
                raise met from cause

    def broadcast(self, tensor: Tensor, rank: int) -> Tensor:
        """Overwrite `tensor` on every rank with that of `rank`, and return it; shapes and dtypes must agree."""
        if not self.is_alone:
            dist.broadcast(tensor, rank)
        return tensor

    def copy(self, network: nn.Module) -> None:
        """Give every rank's network the parameters and buffers of rank 0's."""
        if self.is_alone:
            return
        with torch.no_grad():
            for tensor in network.state_dict().values():
                if isinstance(tensor, Tensor):
                    held = tensor.contiguous()
                    dist.broadcast(held, 0)
                    tensor.copy_(held)

    def leave(self) -> None:
        """From now on this rank is alone: what is asked of it, it does by itself."""
        self.rank, self.size = 0, 1


ALONE = Ranks()


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """The ranks of this run: the default process group, torchrun's processes, or this process alone.

    `device` is a configuration's. RankLost where another of them ends before this one.
    """
    if not dist.is_available():
        yield Ranks()
        return
    is_ours = not dist.is_initialized()
    if is_ours:
        _refuse_half_launched()
        if not was_launched() or _launched_size() == 1:
            yield Ranks()
            return
        _join(device != "cpu" and torch.cuda.is_available())
    elif dist.get_world_size() > 1 and torch.device("cpu") not in _device_types():
        raise UserError(
            'the process group has no backend for CPU tensors: make it with init_process_group("cpu:gloo,cuda:nccl")'
        )
    ranks = _of_default_group()
    may_destroy = dist.get_backend() == "gloo"  # NCCL waits for kernels, and they for a rank that may have gone
    try:
        yield ranks
        if not ranks.is_alone:
            dist.barrier()  # nobody leaves while another is still at work: torchrun would end that one
        may_destroy = True
    except RuntimeError as error:
        if ranks.is_alone or not _is_loss(error):
            raise
        raise RankLost("another process of this run has ended, or can't be reached") from error
    finally:
        ranks.leave()
        if is_ours and may_destroy:
            dist.destroy_process_group()
            # DistributedDataParallel, in a cycle with its learner, holds the group too. When nobody does, the threads
            # of gloo's end: one that has a tensor left to release aborts, where Python has been torn down by then.
            gc.collect()


def _join(uses_gpu: bool) -> None:
    """Make the process group. OptionError where some of the processes have a GPU, and some have not."""
    # DistributedDataParallel imports it, and its functions' default arguments would hold the group for good.
    import torch.distributed.nn.functional  # noqa: F401

    try:
        found, rank, size = next(rendezvous("env://"))
        # torchrun may keep one store through all its restarts, and in it the addresses of processes that are no more.
        # So has a script of several runs, one after the other, all of which join anew.
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = PrefixStore(f"ban_fast/{restart}/{next(_joins)}", found)
        store.set(f"gpu/{rank}", str(uses_gpu))
        have_gpu = {store.get(f"gpu/{other}") for other in range(size)}
        if len(have_gpu) == 1:
            backend = "cpu:gloo,cuda:nccl" if uses_gpu else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=size)
            return
    except RuntimeError as error:
        raise RankLost("the other processes of this run can't be reached") from error
    raise OptionError("device", "some of the processes have a GPU, and some have none: use cpu for all")


def _device_types() -> list[torch.device]:
    """Whose tensors the default group can exchange."""
    group = dist.group.WORLD
    assert group is not None
    return group._device_types


def was_launched() -> bool:
    """Whether this process is one of torchrun's, or of a scheduler's that says as much."""
    return all(name in os.environ for name in _LAUNCHED)


def _refuse_half_launched() -> None:
    """UserError where others were started too, and how to reach them is not said: each would train all by itself."""
    size, missing = os.environ.get("WORLD_SIZE", ""), [name for name in _LAUNCHED if name not in os.environ]
    if "RANK" in os.environ and size.isdecimal() and int(size) > 1 and missing:
        are, them = ("are", "them") if len(missing) > 1 else ("is", "it")
        raise UserError(
            f"RANK and WORLD_SIZE say that this is one of {size} processes, but {' and '.join(missing)} {are} not set: "
            f"set {them} to where rank 0 listens, start them with torchrun, or unset RANK"
        )


def _launched_size() -> int:
    """How many processes were started. UserError for numbers of theirs that can't be."""
    size = _number("WORLD_SIZE", 1)
    if size > 1:
        _number("RANK", 0, size - 1)
        _number("MASTER_PORT", 0, 2**16 - 1)
        if all(name in os.environ for name in _LOCALLY):
            _number("LOCAL_RANK", 0, _number("LOCAL_WORLD_SIZE", 1, size) - 1)
    return size


def _number(name: str, least: int, most: int | None = None) -> int:
    text = os.environ[name]
    if not text.isdecimal() or int(text) < least or (most is not None and int(text) > most):
        bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise UserError(
            f"{name} must be a whole number {bounds}, got {text!r}: start processes with torchrun, which sets it, or "
            "unset it"
        )
    return int(text)


def _of_default_group() -> Ranks:
    rank, size = dist.get_rank(), dist.get_world_size()
    if was_launched() and all(name in os.environ for name in _LOCALLY):
        local_rank, local_size = (int(os.environ[name]) for name in _LOCALLY)
    elif was_launched():
        local_rank, local_size = _found_locally(rank, size)
    else:  # by whoever made the group: on one machine, for all we know
        local_rank, local_size = rank, size
    return Ranks(rank, size, local_rank=local_rank, local_size=local_size)


def _found_locally(rank: int, size: int) -> tuple[int, int]:
    """This rank's place among those that share its GPUs, and how many they are: on its machine, and shown the same."""
    own = socket.gethostname(), os.environ.get("CUDA_VISIBLE_DEVICES")
    every: list[Any] = [None] * size
    dist.all_gather_object(every, own)
    return every[:rank].count(own), every.count(own)


def _is_loss(error: RuntimeError) -> bool:
    text = f"{type(error).__name__} {error}".lower()
    return isinstance(error, dist.DistError) or any(backend in text for backend in _BACKENDS)


def packed(error: Exception) -> tuple[Exception, Exception | None]:
    """The error as it can travel, and what it was raised from: of a full disk, say, that knows the remedy."""
    cause = error.__cause__
    return portable(error), portable(cause) if isinstance(cause, Exception) else None


def portable(error: Exception) -> Exception:
    """The error as it can travel: itself, or its text where it can't be pickled and made anew."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
