"""What a run returns."""

import functools
from collections.abc import Callable
from typing import Any

from torch import nn


class Results:
    """A run's figures, as results.json has them, and its networks."""

    def __init__(self, results: dict[str, Any], load_models: Callable[[], list[nn.Module]]) -> None:
        self._results = results
        self._load_models = load_models

    @property
    def generations(self) -> list[dict[str, Any]]:
        """A record for each generation, the teacher (0) first."""
        return self._results["generations"]  # type: ignore[no-any-return]

    @property
    def ensembles(self) -> list[dict[str, Any]]:
        """A record for every prefix of two students or more, and for each of the two averages."""
        return self._results["ensembles"]  # type: ignore[no-any-return]

    @functools.cached_property
    def models(self) -> list[nn.Module]:
        """The trained network of each generation, in eval mode; those of an earlier session are read when asked for."""
        return self._load_models()

    def to_dict(self) -> dict[str, Any]:
        """What results.json holds."""
        return self._results
