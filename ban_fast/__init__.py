"""Born-Again Neural Networks, fast and exact: fused distillation losses and the born-again generation loop."""

__version__ = "0.1.0"
