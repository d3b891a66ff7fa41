"""The loaders' benchmark: who takes part, what is told of them, and that what is compared is the same work."""

import importlib.util

import pytest

from benchmarks import loaders, targets


@pytest.fixture(scope="module")
def record() -> loaders.Record:
    return loaders.measure(images=2 * loaders.BATCH, rounds=1)


@pytest.mark.slow  # FFCV compiles for ten seconds and more
def test_all_that_are_there_take_part(record: loaders.Record) -> None:
    there = {*loaders.OURS, loaders.TORCHVISION, loaders.FFCV}
    if importlib.util.find_spec("ffcv") is None:
        there -= {"ffcv", loaders.FFCV}
        assert set(record["absent"]) == {"ffcv", loaders.FFCV}
        assert all("not installed" in reason for reason in record["absent"].values())
    assert set(record["images_per_s"]) == set(record["seconds_per_image"]) == there
    assert all(rate > 0 for rate in record["images_per_s"].values())


def test_the_table_tells_who_is_faster_and_whether_that_is_enough() -> None:
    rates = {"memory": 3000, "torch": 1000, loaders.TORCHVISION: 500}
    record: loaders.Record = {"images_per_s": rates, "absent": {"ffcv": "not installed", loaders.FFCV: "not installed"}}
    record["targets"] = loaders.targets(record)
    text = loaders.table(record)
    assert "| ours, `--loader memory` | 3,000 | 1.0 x |\n| ours, `--loader torch` | 1,000 | 3.0 x |" in text
    assert "| FFCV's own pipeline | absent: not installed | |" in text
    assert "memory at least 5 x torchvision + DataLoader: 6.0 x, met" in text
    assert "memory at least 1.5 x FFCV's own pipeline: not measured" in text


def test_targets_are_judged_with_the_others() -> None:
    rates = {"memory": 3000, loaders.TORCHVISION: 500}
    results = {"device": "cpu", "records": [], "loaders": {"images_per_s": rates}}
    found = {
        verdict.target.what: verdict for verdict in targets.judge(results) if "loader in memory" in verdict.target.what
    }
    met, unknown = found.values()
    assert (met.value, met.met) == (6.0, True)
    assert (unknown.value, unknown.met) == (None, None)
