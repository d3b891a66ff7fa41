"""torch.compile, with its failures as one line."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..errors import OptionError


def check_compiler(device: torch.device) -> None:
    """OptionError if nothing can be compiled for the device, for want of a C++ compiler say."""
    _told(torch.compile(lambda x: x + 1))(torch.zeros(1, device=device))


def compiled(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """The network's forward, compiled when first called; parameters, buffers and modes stay the network's own."""
    return _told(torch.compile(network))


def _told(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    from torch._dynamo.exc import BackendCompilerFailed

    def call(x: Tensor) -> Tensor:
        try:
            return function(x)
        except BackendCompilerFailed as error:
            reason = str(error.inner_exception).strip().split("\n")[0]
            raise OptionError("compile", f"torch.compile failed ({reason}); leave it out") from error

    return call
