"""How good a network, or a vote of several, is; and the reading side of a run directory."""

from .ensembles import AVERAGES, ensemble
from .metrics import ECE_BINS, classification_metrics, reliability
from .perplexity import joint_log_probabilities, perplexity_metrics
from .run_directory import RunDirectory

__all__ = [
    "AVERAGES",
    "ECE_BINS",
    "RunDirectory",
    "classification_metrics",
    "ensemble",
    "joint_log_probabilities",
    "perplexity_metrics",
    "reliability",
]
