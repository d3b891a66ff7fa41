"""torch.compile, with its failures as one line."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from ..errors import OptionError, first_line

P = ParamSpec("P")
R = TypeVar("R")


def check_compiler(device: torch.device) -> None:
    """OptionError if nothing can be compiled for the device, for want of a C++ compiler say."""
    _told(torch.compile(lambda x: x + 1))(torch.zeros(1, device=device))


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """A network or a function of networks, compiled when first called; parameters and modes stay the networks' own."""
    return _told(torch.compile(function))


def _told(function: Callable[P, R]) -> Callable[P, R]:
    from torch._dynamo.exc import BackendCompilerFailed

    def call(*arguments: P.args, **named: P.kwargs) -> R:
        try:
            return function(*arguments, **named)
        except BackendCompilerFailed as error:
            reason = first_line(error.inner_exception)
            raise OptionError("step", f"torch.compile failed ({reason}); use eager, and no --compile") from error

    return call
