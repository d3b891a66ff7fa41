"""Which cases there are, the bytes they count, and that a run says what it leaves out."""

import pytest

from benchmarks import cases, targets
from benchmarks.cases import Case
from benchmarks.figures import Figures


@pytest.mark.parametrize(
    ("objective", "rows", "classes", "dtype", "size"),
    [
        ("kd", 1120, 10000, "fp32", 134_400_000),
        ("kd_labels", 1120, 10000, "fp32", 134_400_000),
        ("kd", 8192, 128256, "bf16", 6_304_038_912),
        ("cwtm", 128, 100, "fp32", 153_600),
        ("cwtm_confidence", 128, 100, "fp32", 102_400),
        ("dkpp", 128, 100, "bf16", 76_800),
    ],
)
def test_the_byte_model(objective: str, rows: int, classes: int, dtype: str, size: int) -> None:
    """3 B V size, and 2 B V size where CWTM's confidence is known."""
    case = Case(objective=objective, rows=rows, classes=classes, dtype=dtype)
    assert case.bytes == size
    assert f"{rows} x {classes}" in case.byte_count


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_usual_run_is_part_of_everything_and_the_rest_is_named(device: str) -> None:
    everything, usual = cases.everything(device), cases.usual(device)
    assert len(set(everything)) == len(everything)
    assert set(usual) <= set(everything)
    named = "\n".join(cases.left_out(usual, device))
    for case in everything:
        line = f"{cases.TITLE[case.objective]} {case.dtype}, {case.regime} logits: "
        lines = [each for each in named.splitlines() if each.startswith(line)]
        assert (case in usual) != any(f"[{case.rows}, {case.classes}]" in each for each in lines)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_shape_objective_and_dtype_is_there(device: str) -> None:
    shapes = {(128, 10), (128, 100), (512, 100), (1120, 10000), (512, 32000)}
    shapes |= {(4096, 32000), (8192, 128256)} if device == "cuda" else set()
    there = {(c.objective, (c.rows, c.classes), c.dtype) for c in cases.everything(device) if c.regime == "random"}
    assert there == {(o, shape, dtype) for o in cases.TITLE for shape in shapes for dtype in ("fp32", "bf16")}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_targets_are_judged_by_cases_that_a_usual_run_begins_with(device: str) -> None:
    first = cases.usual(device)[: len(cases.targets(device))]
    asked: list[Case] = []

    class Recorder(Figures):
        def find(self, case: Case, setting: str) -> None:
            asked.append(case)

    for target in targets.targets(device):
        assert target.quantity(Recorder([])) is None
    assert asked
    assert set(asked) <= set(first)
