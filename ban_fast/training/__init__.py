"""Training: born-again generations from a configuration, and the figures of a finished run computed anew."""

from .distributed import RankLost
from .evaluate import evaluate_run
from .generations import run
from .observer import Interrupted, Observer, Plan
from .results import Results
from .together import run_together

__all__ = ["Interrupted", "Observer", "Plan", "RankLost", "Results", "evaluate_run", "run", "run_together"]
