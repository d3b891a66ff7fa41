"""What a run came to: a table for the terminal and plots as PNG, beside the paper's figures where they compare."""

from .plots import plots
from .table import table

__all__ = ["plots", "table"]
