"""The benchmark of the dense block's kernels: what it tries, and that nothing of it ends the others."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (it comes with torch where torch is built for CUDA)")

from ban_fast.backends.triton.dense import config
from benchmarks import cuda, dense_kernels
from benchmarks.dense_kernels import TILES, Work


def product(chooser: str, asked: list[config.Tile]) -> Work:
    """What asks for its tile, and does nothing."""
    arguments: dict[str, Any] = {
        "project_tile": (4096, 320, torch.bfloat16, config.IEEE),
        "unproject_tile": (4096, torch.bfloat16, config.IEEE),
        "weight_tile": (torch.bfloat16, config.IEEE),
    }
    return Work(lambda: asked.append(getattr(config, chooser)(*arguments[chooser])), 1)


def places(asked: list[config.Tile]) -> dict[str, dict[str, Work]]:
    return {"here": {name: product(chooser, asked) for name, chooser in dense_kernels.CHOOSERS.items()}}


def clock_of(asked: list[config.Tile], seconds: Callable[[config.Tile], float]) -> dense_kernels.Clock:
    def clock(call: Callable[[], object]) -> float:
        call()
        return seconds(asked[-1])

    return clock


def test_the_present_tile_comes_first_then_those_near_it() -> None:
    order = dense_kernels.nearest(TILES[30], TILES)
    assert order[0] == TILES[30]
    assert sorted(order) == sorted(TILES)
    changed = [sum(a != b for a, b in zip(tile, TILES[30], strict=True)) for tile in order]
    assert changed[1] == 1
    assert changed[-1] > 2
    assert dense_kernels.nearest(config.Tile(16, 16, 16, 1, 1), TILES)[0] not in TILES


def test_tuning_ends_in_time_and_keeps_what_it_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that each trial turns by a second: time for 3 products' present tiles and two more."""
    asked: list[config.Tile] = []
    saved: list[int] = []
    found: dict[str, list[Any]] = {}
    now = iter(range(1000))
    monkeypatch.setattr(dense_kernels, "time", SimpleNamespace(monotonic=lambda: next(now)))
    clock = clock_of(asked, lambda tile: 1.0 / tile.rows)
    save = lambda: saved.append(sum(map(len, found.values())))  # noqa: E731
    assert not dense_kernels.tune(places(asked), clock, 4.5, found, save)
    assert sum(map(len, found.values())) == 5
    assert saved == [3]
    assert found["here: project"] == sorted(found["here: project"])
    assert config.project_tile(4096, 320, torch.bfloat16, config.IEEE) in [tile for _, tile in found["here: project"]]


def test_a_tile_that_no_compiler_makes_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[config.Tile] = []

    def seconds(tile: config.Tile) -> float:
        if tile.depth == 64:
            raise RuntimeError("PassManager::run failed")
        return float(tile.rows)

    monkeypatch.setattr(dense_kernels, "TILES", TILES[:12])
    found: dict[str, list[Any]] = {}
    assert dense_kernels.tune(places(asked), clock_of(asked, seconds), float("inf"), found, lambda: None)
    assert {len(each) for each in found.values()} == {7}  # the present one, and six of depth 32
    monkeypatch.setattr(cuda, "usable", lambda: False)
    with pytest.raises(cuda.Lost, match="PassManager"):
        dense_kernels.tuned(product("weight_tile", asked), "weight_tile", clock_of(asked, seconds), TILES)


def test_maps_and_weights_are_random_and_stay_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros would flatter tensor cores, and so would a map that a hundred replays have made one."""
    given: list[torch.Tensor] = []

    def noted(*tensors: Any, **_: Any) -> None:
        given.extend(each for each in tensors if isinstance(each, torch.Tensor) and each.dim() > 1)

    for module, names in (
        (dense_kernels.products, ("project", "unproject", "weight_gradient")),
        (dense_kernels.passes, ("activate", "place", "correct", "deposit")),
        (dense_kernels.statistics, ("finish", "settle")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, noted)
    work = dense_kernels.kernels(dense_kernels.Unit(64, 24, 16, 5), torch.float32, "cpu")
    for name, each in work.items():
        given.clear()
        each.call()
        assert all(float(tensor.std()) > 0 for tensor in given if name != "finish"), name
    given.clear()
    work["correct between"].call()
    assert len({tensor.data_ptr() for tensor in given[:2]} | {given[-1].data_ptr()}) == 3
