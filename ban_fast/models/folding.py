"""A network for inference alone, its batch norms folded into what is beside them. The network itself stays as it is."""

import functools
import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..errors import first_line
from . import checks
from .classifier import Classifier
from .densenet import DenseNet


class NotFolded(ValueError):
    """A network's batch norms can't be folded; the message is the reason, in a few words."""


class ScaleShift(nn.Module):
    """Batch norm in eval mode as what it is, x * scale + shift by channel, with the ReLU after it if there is one.

    On a GPU with Triton both are one pass over x. Exact in mathematics; rounded otherwise than (x - mean) / deviation.
    """

    def __init__(self, norm: _BatchNorm, relu: bool) -> None:
        super().__init__()
        assert norm.running_mean is not None
        assert norm.running_var is not None
        mean, variance = norm.running_mean.double(), norm.running_var.double()
        scale = (variance + norm.eps).rsqrt() * (1.0 if norm.weight is None else norm.weight.double())
        shift = (0.0 if norm.bias is None else norm.bias.double()) - mean * scale
        kept = norm.running_mean.dtype
        for name, value in {
            "scale": scale.to(kept),
            "shift": shift.to(kept),
            "zeros": torch.zeros_like(norm.running_mean),
            "ones": torch.ones_like(norm.running_mean),
        }.items():
            self.register_buffer(name, value.detach())
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:  # [B, C, ...] -> the same
        scale, shift = self.get_buffer("scale"), self.get_buffer("shift")
        if x.device.type == "cuda" and not torch.compiler.is_compiling() and (kernel := _kernel()) is not None:
            return kernel(x, scale, shift, relu=self.relu)
        # The operation for numbers of one dtype by scales of another: by 1 and 0 it adds no rounding to its own.
        y = F.batch_norm(x, self.get_buffer("zeros"), self.get_buffer("ones"), scale, shift, eps=0.0)
        return F.relu(y, inplace=True) if self.relu else y


@functools.cache
def _kernel() -> Callable[..., Tensor] | None:
    try:
        if importlib.import_module("ban_fast.backends.triton").problem("cuda") is not None:
            return None
        found = importlib.import_module("ban_fast.backends.triton.scale_shift")
    except ImportError:
        return None
    kernel: Callable[..., Tensor] = found.scale_shift
    return kernel


def fold(network: nn.Module, *, into_convolutions: bool) -> nn.Module:
    """What `network`, in eval mode, gives for images, by fewer operations; it shares all that stays the same with it.

    A batch norm becomes a `ScaleShift`, together with the ReLU that alone reads it. With `into_convolutions` it first
    goes into the convolution before it where nothing else reads that: nothing is left of it but a bias, which a CPU's
    convolutions add as they write, and a GPU's in another pass.

    NotFolded where the network's operations can't be told from its code alone, or there is nothing to fold.
    """
    assert not network.training
    if isinstance(network, DenseNet) and network.memory == "shared":
        raise NotFolded("its dense blocks apply batch norm as they read their features")
    if not any(isinstance(module, _BatchNorm) for module in network.modules()):
        raise NotFolded("it has no batch norm")
    modules: Any = (math, checks)  # torch's types know of one module alone
    tracer = _Tracer(autowrap_modules=modules)
    tracer.proxy_buffer_attributes = True  # what a layer does to a buffer it shall go on doing
    try:
        with torch.no_grad():
            graph = tracer.trace(network)
    except Exception as error:  # whatever a network's own code makes of a value that isn't there
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise NotFolded(f"its operations can't be followed ({reason})") from error
    traced = fx.GraphModule(network, graph)
    count = 0
    for node in list(graph.nodes):
        norm = _module(traced, node)
        if not isinstance(norm, _BatchNorm) or norm.running_mean is None or norm.training:
            continue
        count += 1
        (source,) = node.all_input_nodes
        conv = _module(traced, source)
        if into_convolutions and isinstance(conv, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and len(source.users) == 1:
            _put(traced, source, f"folded{count}", fuse_conv_bn_eval(conv, norm))
            _drop(graph, node, source)
            continue
        reader = next(iter(node.users)) if len(node.users) == 1 else None
        has_relu = reader is not None and _is_relu(traced, reader)
        _put(traced, node, f"folded{count}", ScaleShift(norm, has_relu))
        if reader is not None and has_relu:
            _drop(graph, reader, node)
    if not count:
        raise NotFolded("its batch norms normalise by the batch")
    graph.lint()
    traced.recompile()
    traced.delete_all_unused_submodules()
    return traced.eval()


class _Tracer(fx.Tracer):
    """What asks whether autocast is on asks it each time that it is called."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Classifier) or super().is_leaf_module(m, module_qualified_name)


def _module(traced: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """What a node calls, if that is a module."""
    return traced.get_submodule(str(node.target)) if node.op == "call_module" else None


def _is_relu(traced: fx.GraphModule, node: fx.Node) -> bool:
    relus: tuple[Any, ...] = (F.relu, torch.relu, torch.relu_)
    return (
        isinstance(_module(traced, node), nn.ReLU)
        or (node.op == "call_function" and node.target in relus)
        or (node.op == "call_method" and node.target in ("relu", "relu_"))
    )


def _put(traced: fx.GraphModule, node: fx.Node, name: str, module: nn.Module) -> None:
    """Let a node call another module."""
    traced.add_submodule(name, module)
    node.target = name


def _drop(graph: fx.Graph, node: fx.Node, source: fx.Node) -> None:
    """Let the readers of a node read its source."""
    node.replace_all_uses_with(source)
    graph.erase_node(node)
