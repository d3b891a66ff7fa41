"""Networks from elsewhere: torchvision's, timm's, and factories of the user's own."""

import importlib
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import UserError, first_line, suggest


def torchvision(name: str, num_classes: int, in_channels: int, options: dict[str, Any]) -> nn.Module:
    """torchvision's classification network `name`. All of them take three channels, and nothing else."""
    import torchvision.models as source

    names = source.list_models(module=source)
    if name not in names:
        raise UserError(f"torchvision has no image classification network {name!r}{suggest(name, names)}")
    if in_channels != 3:
        raise UserError(
            f"torchvision:{name} takes images of 3 channels, got {in_channels}; timm's networks take any number"
        )
    if name in ("googlenet", "inception_v3"):
        if options.get("aux_logits"):
            raise UserError(f"torchvision:{name} with aux_logits returns several outputs; a student learns from one")
        # init_weights=True is what torchvision does by default, after a warning.
        options = {"aux_logits": False, "init_weights": True, **options}
    build = partial(source.get_model, name, num_classes=num_classes, **options)
    return _built(f"torchvision:{name}", build, num_classes)


def timm(name: str, num_classes: int, in_channels: int, options: dict[str, Any]) -> nn.Module:
    """timm's network `name`."""
    try:
        import timm as source
    except ModuleNotFoundError as error:
        raise UserError(f"timm:{name} needs timm; install it with: pip install timm") from error
    if not source.is_model(name):
        raise UserError(f"timm has no network {name!r}{suggest(name, source.list_models())}")
    if in_channels != 3:
        options = {**options, "in_chans": in_channels}
    return _built(f"timm:{name}", partial(source.create_model, name, num_classes=num_classes, **options), num_classes)


def custom(path: str, num_classes: int, in_channels: int, options: dict[str, Any]) -> nn.Module:
    """What `package.module:factory` makes: a network of images, or a language model, whose logits are the first of two.

    An error inside the factory is its own, and is not translated.
    """
    factory = find_factory(path)
    arguments = {"num_classes": num_classes, **options}
    if "in_channels" in parameters(path, factory):
        arguments["in_channels"] = in_channels
    try:
        inspect.signature(factory).bind(**arguments)
    except TypeError as error:
        raise UserError(f"{path} cannot be called with {', '.join(arguments)}: {error}") from error
    network = factory(**arguments)
    if not isinstance(network, nn.Module):
        raise UserError(f"{path} must return a torch.nn.Module, got {type(network).__name__}")
    network.register_forward_hook(partial(_require_outputs, path, num_classes))
    return network


def find_factory(path: str) -> Callable[..., Any]:
    """The callable that `package.module:factory` names; UserError where there is none."""
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(f"{path}: no module named {error.name!r}; install it or set PYTHONPATH") from error
    factory = getattr(module, name, None)
    if not callable(factory):
        callables = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UserError(f"{module_name} has no function or class {name!r}{suggest(name, callables)}")
    return factory  # type: ignore[no-any-return]  # getattr's Any


def parameters(path: str, factory: Callable[..., Any]) -> list[str]:
    """Names of the factory's own parameters; UserError where Python cannot tell them."""
    try:
        return list(inspect.signature(factory).parameters)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} does not tell its parameters; wrap it in a function of your own") from error


def _built(name: str, build: Callable[[], nn.Module], num_classes: int) -> nn.Module:
    try:
        network = build()
    except Exception as error:  # what another library raises for an option it has not: TypeError, ValueError, more
        raise UserError(f"{name} cannot be built: {first_line(error)}") from error
    network.register_forward_hook(partial(_require_logits, name, num_classes))
    return network


def _require_logits(name: str, num_classes: int, _module: nn.Module, _args: Any, output: Any) -> None:
    if not isinstance(output, torch.Tensor):
        raise UserError(f"{name} must return one tensor of logits, got {type(output).__name__}")
    if output.ndim != 2 or output.shape[1] != num_classes:
        raise UserError(f"{name} must return logits [B, {num_classes}], got {list(output.shape)}")


def _require_outputs(name: str, num_classes: int, module: nn.Module, args: Any, output: Any) -> None:
    """`_require_logits`, but for a language model's (logits [T, B, V], state)."""
    if not (isinstance(output, (tuple, list)) and len(output) == 2 and getattr(output[0], "ndim", None) == 3):
        _require_logits(name, num_classes, module, args, output)
    elif output[0].shape[2] != num_classes:
        raise UserError(f"{name} must return logits [T, B, {num_classes}], got {list(output[0].shape)}")
