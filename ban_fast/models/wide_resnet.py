"""Wide residual networks, after Zagoruyko and Komodakis's own code (wide-resnet.lua)."""

import torch
import torch.nn.functional as F
from torch import nn

from . import checks, init
from .classifier import Classifier


class Unit(nn.Module):
    """Pre-activation residual unit: BN-ReLU-3x3-BN-ReLU-(dropout)-3x3, plus its input.

    Where the width changes, the shortcut is a 1x1 convolution of the activated input, not of the input itself.
    """

    def __init__(self, in_width: int, out_width: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_width)
        self.conv1 = nn.Conv2d(in_width, out_width, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_width)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.conv2 = nn.Conv2d(out_width, out_width, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(in_width, out_width, 1, stride, bias=False) if in_width != out_width else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [B, in, H, W] -> [B, out, H / stride, W / stride]
        active = F.relu(self.norm1(x), inplace=True)
        y = self.conv2(self.dropout(F.relu(self.norm2(self.conv1(active)), inplace=True)))
        skip = x if self.shortcut is None else self.shortcut(active)
        return torch.add(y, skip)


class WideResNet(nn.Module):
    """WRN-depth-width: three stages of (depth - 4) / 6 units, 16, 32 and 64 times `width` channels wide.

    [B, in_channels, H, W] -> logits [B, num_classes]; stages two and three halve H and W. `dropout` is the
    probability, in [0, 1), between the two 3x3 convolutions of each unit (the authors use 0.3, or none). UserError
    for a depth that is not 6n+4. Convolutions start from N(0, 2 / fan_in), as in the authors' final code.
    """

    def __init__(
        self, depth: int, width: int, *, num_classes: int = 100, in_channels: int = 3, dropout: float = 0.0
    ) -> None:
        super().__init__()
        units = checks.units_of_depth("a wide residual network", checks.whole("depth", depth, 0))
        checks.whole("width", width)
        checks.whole("num_classes", num_classes)
        checks.whole("in_channels", in_channels)
        dropout = checks.share("dropout", dropout)
        self.stem = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        stages, channels = [], 16
        for out, stride in ((16 * width, 1), (32 * width, 2), (64 * width, 2)):
            first = Unit(channels, out, stride, dropout)
            stages.append(nn.Sequential(first, *(Unit(out, out, 1, dropout) for _ in range(units - 1))))
            channels = out
        self.stages = nn.Sequential(*stages)
        self.norm = nn.BatchNorm2d(channels)
        self.classifier = Classifier(channels, num_classes)
        init.he_(self, "fan_in")

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [B, in_channels, H, W] -> [B, num_classes]
        checks.image(x, self.stem.weight, 1)
        x = F.relu(self.norm(self.stages(self.stem(x))), inplace=True)
        logits: torch.Tensor = self.classifier(x.mean((2, 3)))
        return logits
