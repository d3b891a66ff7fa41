"""He initialisation as the authors of wide residual networks and of DenseNet have it."""

from typing import Literal

from torch import nn


def he_(network: nn.Module, fan: Literal["fan_in", "fan_out"]) -> None:
    """Draw every convolution's weights from N(0, 2 / fan), and set biases of linear layers to zero, in place.

    Linear weights keep torch's (and Lua Torch's) own U(+-1/sqrt(in_features)); batch norm starts at scale 1, bias 0.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode=fan, nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
