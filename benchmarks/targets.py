"""What kernels, whole steps, DenseNets' memories and loaders are held to, judged by a run's figures.

`python -m benchmarks.targets FILE` judges a results file; its status is 1 where a target was missed or not measured.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import cuda, densenet_figures, loaders, step_figures
from benchmarks.cases import HUGE, LARGE, SMALL, Case, Dtype, Objective, Regime, Shape, case_at
from benchmarks.densenet_figures import CHANNELS_LAST, CHECKPOINT, GRAPHED, PLAIN, SHARED
from benchmarks.densenet_figures import Case as DenseCase
from benchmarks.figures import PEERS, Figures, find, our_name, ours, ratio, share
from benchmarks.session import DEFAULT, TUNED
from benchmarks.step_figures import CACHED, COMPOSED, NAIVE, SUPERVISED
from benchmarks.step_figures import Case as StepCase

Quantity = Callable[[Figures], float | None]
NOT_MEASURED = "not measured yet"


@dataclass(frozen=True, kw_only=True)
class Target:
    """One quantity and its bound."""

    what: str
    quantity: Quantity
    at_least: float | None = None
    at_most: float | None = None
    goal: float | None = None
    unit: str = "x"
    of: tuple[tuple[Case, str], ...] = ()
    """The cases of losses, and their settings, that it is of."""

    def met(self, value: float) -> bool:
        if self.at_least is not None:
            return value >= self.at_least
        assert self.at_most is not None
        return value <= self.at_most


@dataclass(frozen=True)
class Verdict:
    """A target and what a run measured, None where it did not."""

    target: Target
    value: float | None
    by: str = ""
    """Whose figure it is where backend="auto" has no measured table to follow."""
    auto: float | None = None
    """What "auto" came to there."""

    @property
    def met(self) -> bool | None:
        return None if self.value is None else self.target.met(self.value)

    @property
    def cells(self) -> list[str]:
        """What, the bound, the goal, the figure, yes or no."""
        target, unit = self.target, self.target.unit
        bound = f">= {target.at_least:.3g}" if target.at_least is not None else f"<= {target.at_most:.3g}"
        goal = "" if target.goal is None else f"{target.goal:.3g}{unit}"
        found = NOT_MEASURED if self.value is None else f"{self.value:.3g}{unit}"
        if self.by:
            auto = NOT_MEASURED if self.auto is None else f"{self.auto:.3g}{unit}"
            found += f" ({self.by})" if self.auto == self.value else f" ({self.by}; auto: {auto})"
        return [target.what, bound + unit, goal, found, {None: "", True: "yes", False: "no"}[self.met]]


def judge(results: dict[str, Any]) -> list[Verdict]:
    """Every target of the device that the results are of."""
    steps, densenets = results.get("steps", []), results.get("densenets", [])
    figures = Figures(results["records"], steps, results.get("loaders"), densenets)
    as_auto, found = figures.as_auto(), []
    for target in targets(results["device"]):
        value, by = target.quantity(figures), _by(target, figures)
        found.append(Verdict(target, value, by, target.quantity(as_auto)) if by else Verdict(target, value))
    return found


def print_measured(results: dict[str, Any]) -> None:
    """The verdicts on what the results of one benchmark measured, without losses, a line each."""
    for verdict in judge(results | {"records": []}):
        if verdict.value is not None:
            what, bound, _, found, met = verdict.cells
            print(f"{met:>3}  {what}: {found} (asked {bound})")


def _by(target: Target, figures: Figures) -> str:
    """The backends that stand for ours where "auto" follows no measured table, the later ones as the divisor."""
    records = [record for where in target.of if (record := figures.find(*where)) is not None]
    if len(records) < len(target.of) or all(record.get("auto_measured", True) for record in records):
        return ""
    return " over ".join(dict.fromkeys(our_name(record).removeprefix("ban_fast ") for record in records))


def targets(device: str) -> list[Target]:
    """Those of "cpu" or "cuda"."""
    return _cpu() if device == "cpu" else _gpu()


def _cpu() -> list[Target]:
    found = []
    regimes: tuple[Regime, ...] = ("random", "near")
    for regime in regimes:
        kd = case_at("kd", LARGE, "fp32", regime)
        for setting, least, goal in ((TUNED, 2.5, 3.5), (DEFAULT, 5.0, 9.0)):
            found.append(_against(kd, setting, ("compile",), "the best torch.compile", least, goal))
    for regime in regimes:
        kd = case_at("kd", SMALL, "fp32", regime)
        found += [_against(kd, each, ("eager",), "the fastest eager form", 1.4, 1.6) for each in (TUNED, DEFAULT)]
    bounds: tuple[tuple[Objective, float, float | None], ...] = (("cwtm", 3.0, None), ("dkpp", 20.0, 40.0))
    for objective, at_least, hoped in bounds:
        for regime in regimes:
            case = case_at(objective, LARGE, "fp32", regime)
            found += [_against(case, each, PEERS, "the best other", at_least, hoped) for each in (TUNED, DEFAULT)]
    found += [_to_kd(case_at("dkpp", LARGE, "fp32"), setting, 4.0) for setting in (TUNED, DEFAULT)]
    small, dense = StepCase("wrn-16-1", 32), StepCase("densenet-bc-100-12", 32)
    found += [_step_over(case, CACHED, SUPERVISED, at_most=1.05) for case in (small, dense)]
    found.append(_loader_and_loss(small, 0.03))
    found += [_loader_over(name, least) for name, least in loaders.TARGETS.items()]
    lean = DenseCase("densenet-bc-100-12", 32)
    found += [
        _dense_time(lean, SHARED, PLAIN, at_most=1.0, goal=0.67),
        _dense_bytes(lean, "held_bytes", PLAIN, 0.25),
        _dense_bytes(lean, "held_bytes", CHECKPOINT, 1.0),
    ]
    return found


def _gpu() -> list[Target]:
    huge, small = case_at("kd", HUGE, "bf16"), case_at("kd", SMALL, "fp32")
    confident = case_at("cwtm_confidence", HUGE, "bf16")
    found = [
        _time(huge, cuda.PLAIN, 1600),
        _share(huge, cuda.PLAIN, 0.92),
        _against(huge, cuda.PLAIN, ("compile",), "the best torch.compile", 2.3),
        _against(huge, cuda.PLAIN, ("triton",), "the best open Triton (speculators, Fast-LLM)", 2.0),
        _against(huge, cuda.PLAIN, ("liger",), "softmaxes and Liger", 6.0),
    ]
    ptb: tuple[tuple[Dtype, float], ...] = (("bf16", 19), ("fp32", 36))
    for dtype, most in ptb:
        case = case_at("kd", LARGE, dtype)
        found.append(_time(case, cuda.GRAPH_COLD, most))
        found.append(_against(case, cuda.GRAPH_COLD, ("compile",), "the best torch.compile", 2.5))
    found += [
        _time(small, cuda.GRAPH_WARM, 3),
        _time(small, cuda.PLAIN, 15),
        _against(small, cuda.PLAIN, ("eager",), "the fastest eager form", 6.0),
        _against(small, cuda.PLAIN, ("compile",), "the best torch.compile", 3.0),
        _share(confident, cuda.PLAIN, 0.90),
        _to_kd(confident, cuda.PLAIN, 1 / 1.4),
    ]
    shapes: tuple[tuple[Shape, float], ...] = (((128, 10), 1.15), (SMALL, 1.15), ((512, 100), 1.15), (LARGE, 2.0))
    found += [_to_kd(case_at("dkpp", shape, "fp32"), cuda.GRAPH_WARM, most) for shape, most in shapes]
    found.append(_against(case_at("dkpp", LARGE, "fp32"), cuda.PLAIN, ("eager",), "eager argsort", 25.0))
    wide, thin, thick = StepCase("wrn-28-10", 128), StepCase("densenet-bc-100-12", 64), StepCase("densenet-80-80", 128)
    found += [_step_time(wide, 9.3), _step_time(thin, 1.3), _step_time(thick, 11.0)]
    for case, naive, composed in ((thin, 6.0, 2.5), (thick, 3.5, 2.0)):
        found += [
            _step_over(case, NAIVE, CACHED, at_least=naive),
            _step_over(case, COMPOSED, CACHED, at_least=composed),
        ]
    lean = DenseCase("densenet-80-80", 128, amp=True)
    found += [
        _dense_time(lean, CHANNELS_LAST, SHARED + GRAPHED, at_least=2.5),
        _dense_compiled(lean, SHARED + GRAPHED, 1.6),
        _dense_bytes(lean, "saved_bytes", PLAIN, 0.2),
        _dense_bytes(lean, "saved_bytes", CHECKPOINT, 0.5),
    ]
    return found


def _against(
    case: Case, setting: str, kinds: tuple[str, ...], whom: str, least: float, goal: float | None = None
) -> Target:
    return Target(
        what=f"{case.title}, {setting}: against {whom}",
        quantity=lambda figures: ratio(figures.find(case, setting), kinds),
        at_least=least,
        goal=goal,
        of=((case, setting),),
    )


def _share(case: Case, setting: str, least: float) -> Target:
    return Target(
        what=f"{case.title}, {setting}: of the copy's bandwidth",
        quantity=lambda figures: share(figures.find(case, setting), "copy"),
        at_least=least,
        unit="",
        of=((case, setting),),
    )


def _time(case: Case, setting: str, most_us: float) -> Target:
    def quantity(figures: Figures) -> float | None:
        record = figures.find(case, setting)
        mine = None if record is None else ours(record)
        return None if mine is None else mine * 1e3

    where = ((case, setting),)
    return Target(what=f"{case.title}, {setting}", quantity=quantity, at_most=most_us, unit=" us", of=where)


def _to_kd(case: Case, setting: str, most: float) -> Target:
    kd = Case(objective="kd", rows=case.rows, classes=case.classes, dtype=case.dtype, regime=case.regime)

    def quantity(figures: Figures) -> float | None:
        one, other = figures.find(case, setting), figures.find(kd, setting)
        mine, kds = one and ours(one), other and ours(other)
        return mine / kds if mine and kds else None

    where = ((case, setting), (kd, setting))
    return Target(what=f"{case.title}, {setting}: times our KD", quantity=quantity, at_most=most, of=where)


def _step_over(
    case: StepCase, one: str, other: str, *, at_least: float | None = None, at_most: float | None = None
) -> Target:
    return Target(
        what=f"a step of {case.title}: {one} over {other}",
        quantity=lambda figures: step_figures.over(find(figures.steps, case), one, other),
        at_least=at_least,
        at_most=at_most,
    )


def _step_time(case: StepCase, most_ms: float) -> Target:
    def quantity(figures: Figures) -> float | None:
        mine = step_figures.seconds(find(figures.steps, case), CACHED)
        return None if mine is None else 1e3 * mine

    return Target(what=f"a step of {case.title}: {CACHED}", quantity=quantity, at_most=most_ms, unit=" ms")


def _loader_and_loss(case: StepCase, most: float) -> Target:
    def quantity(figures: Figures) -> float | None:
        share = step_figures.loader_and_loss(find(figures.steps, case))
        return None if share is None else 100 * share

    what = f"a step of {case.title}: share of loader, augmentation and loss, {CACHED}"
    return Target(what=what, quantity=quantity, at_most=100 * most, unit=" %")


def _loader_over(name: str, least: float) -> Target:
    return Target(
        what=f"images/s of the loader in memory over {name}",
        quantity=lambda figures: None if figures.loaders is None else loaders.speed_up(figures.loaders, name),
        at_least=least,
    )


def _dense_time(
    case: DenseCase,
    one: str,
    other: str,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    goal: float | None = None,
) -> Target:
    return Target(
        what=f"{case.title}: time of {one} over {other}",
        quantity=lambda figures: densenet_figures.over(find(figures.densenets, case), one, other),
        at_least=at_least,
        at_most=at_most,
        goal=goal,
    )


def _dense_compiled(case: DenseCase, other: str, least: float) -> Target:
    def quantity(figures: Figures) -> float | None:
        return densenet_figures.best_compiled_over(find(figures.densenets, case), other)

    return Target(what=f"{case.title}: time of the best torch.compile over {other}", quantity=quantity, at_least=least)


def _dense_bytes(case: DenseCase, size: str, other: str, most: float) -> Target:
    def quantity(figures: Figures) -> float | None:
        record = find(figures.densenets, case)
        return densenet_figures.bytes_over(record, size, SHARED, other)

    kept = {"held_bytes": "kept memory", "saved_bytes": "saved bytes"}[size]
    return Target(what=f"{case.title}: {kept} of {SHARED} over {other}", quantity=quantity, at_most=most)


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or not Path(arguments[0]).is_file():
        print("usage: python -m benchmarks.targets RESULTS_FILE", file=sys.stderr)
        return 2
    verdicts = judge(json.loads(Path(arguments[0]).read_text()))
    for verdict in verdicts:
        what, bound, goal, found, met = verdict.cells
        hoped = f", goal {goal}" if goal else ""
        print(f"{met or '-':>3}  {what}: {found} (asked {bound}{hoped})")
    return int(not all(verdict.met for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
