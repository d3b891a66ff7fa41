"""The DenseNet benchmark: its peers compute the same network, its memory figures mean something, its table is whole."""

import json
import math
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import bench_records
import pytest
import torch

from benchmarks import densenet, densenet_figures, machine, report, tables, targets
from benchmarks.densenet_figures import CHANNELS_LAST, CHECKPOINT, GRAPHED, PLAIN, SHARED, Record
from benchmarks.densenet_turns import ProviderFailed, Turns
from benchmarks.harness import TIME_OVER

SMALL = densenet.Case("densenet-bc-16-4", 4)


def entry(laps: list[float], held: float, saved: float = 1.0) -> Record:
    return {
        "off": 1e-3,
        "failed": None,
        "laps_s": laps,
        "held_bytes": held,
        "saved_bytes": saved,
        "peak_bytes": 2 * held,
    }


def made_up(network: str, batch: int, amp: bool, **providers: Record) -> Record:
    return {"case": {"network": network, "batch": batch, "amp": amp}, "providers": providers}


def judged(device: str, record: Record) -> dict[str, targets.Verdict]:
    """The verdicts on what was measured, by what is said before the colon's end."""
    found = targets.judge({"device": device, "records": [], "densenets": [record]})
    return {verdict.target.what: verdict for verdict in found if verdict.value is not None}


@pytest.mark.parametrize("network", ["densenet-bc-16-4", "densenet-80-80"])
def test_torchvisions_network_has_the_same_parameters(network):
    with torch.device("meta"):
        step_network = densenet.models.create(network)
        theirs = densenet.torchvision_network(step_network)
    ours = {id(parameter): parameter.shape for parameter in step_network.parameters()}
    assert {id(parameter): parameter.shape for parameter in theirs.parameters()} == ours


@pytest.mark.parametrize("provider", [provider for provider in densenet.PROVIDERS if provider != "compile"])
def test_all_have_the_same_gradient(provider: str) -> None:
    plain = densenet.Step(PLAIN, SMALL, "cpu")
    assert densenet.off(densenet.Step(provider, SMALL, "cpu"), plain) <= densenet.LIMITS[False]


def test_processes_take_turns() -> None:
    """And who fails, or has another gradient, has no time."""
    entries = densenet.times((PLAIN, SHARED, "compile no such mode"), SMALL, "cpu", rounds=2)
    assert [len(each["laps_s"]) for each in entries.values()] == [2, 2, 0]
    assert [each["off"] for each in entries.values()] == [0, pytest.approx(0, abs=densenet.LIMITS[False]), None]
    assert "no such mode" in entries["compile no such mode"]["failed"]
    assert (entries[PLAIN]["failed"], entries[SHARED]["failed"]) == (None, None)


def processes_of(*providers: str) -> densenet.Processes:
    groups = [(provider,) for provider in providers]
    return densenet.Processes(groups, lambda group: densenet._command("laps", SMALL, "cpu", group), None)


def test_a_process_that_ends_costs_nobody_else_a_lap() -> None:
    with processes_of(PLAIN, SHARED) as processes:
        processes._of[SHARED].kill()
        with pytest.raises(subprocess.CalledProcessError):
            processes.lap(SHARED)
        found = Turns(processes, 2, densenet.LIMITS[False], early=False).run([[PLAIN, SHARED]])
    assert len(found[PLAIN]["laps_s"]) == 2
    assert found[SHARED] == {"off": None, "failed": "its process ended with status -9", "laps_s": []}


def test_who_is_not_built_in_time_says_so() -> None:
    with processes_of(PLAIN) as processes:
        with pytest.raises(ProviderFailed, match="left out: not built within 0 s"):
            processes.lap(PLAIN, 0.001)
        assert processes.lap(PLAIN) > 0  # and its process goes on


class Scripted:
    """Processes that answer each lap by a function of (provider, its laps so far): seconds, or what it raises."""

    ends = None

    def __init__(self, answer: Callable[[str, int], float | Exception], off: float = 0.0) -> None:
        self.answer, self.gradient, self.counts = answer, off, Counter[str]()

    def lap(self, provider: str, most: float | None = None) -> float:
        self.counts[provider] += 1
        answer = self.answer(provider, self.counts[provider] - 1)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def off(self, provider: str) -> float:
        return self.gradient


def scripted(answer: Callable[[str, int], float | Exception], off: float = 0.0) -> dict[str, Record]:
    """As on a GPU: `late` joins for three further rounds."""
    processes: Any = Scripted(answer, off)
    return Turns(processes, 3, 0.02, early=True).run([["a", "b"], ["late"]])


LATE = subprocess.TimeoutExpired("python", 1)


def test_who_is_compiled_joins_later_and_is_compared_by_the_rounds_that_both_had() -> None:
    laps = scripted(lambda provider, count: 10.0 * (provider != "late") + count)
    assert [len(entry["laps_s"]) for entry in laps.values()] == [6, 6, 3]
    assert [entry.get("first_round") for entry in laps.values()] == [None, None, 3]
    record = made_up(SMALL.network, 4, False, **laps)
    assert densenet_figures.over(record, "late", "a") == pytest.approx(4 / 17)  # the fifth round's: warm-up has three
    assert "| late | 4000.0" in densenet_figures.table(record)
    assert not scripted(lambda provider, count: 1.0, off=0.03)["a"]["laps_s"]  # another gradient


def test_what_was_measured_is_kept_when_time_is_over() -> None:
    built = {"a": 1.0, "b": 2.0, "late": LATE}
    laps = scripted(lambda provider, count: built[provider])
    assert [len(entry["laps_s"]) for entry in laps.values()] == [3, 3, 0]
    assert [entry["failed"] for entry in laps.values()] == [None, None, TIME_OVER]
    within = scripted(lambda provider, count: LATE if (provider, count) == ("b", 7) else 1.0)  # warm-up, 3, and one
    assert [len(entry["laps_s"]) for entry in within.values()] == [5, 4, 0]
    assert [entry["failed"] for entry in within.values()] == [None, None, TIME_OVER]
    at_once = scripted(lambda provider, count: LATE if count == 4 else 1.0)
    assert {entry["failed"] for entry in at_once.values()} == {TIME_OVER}


def test_who_fails_in_a_later_phase_keeps_what_it_had() -> None:
    """A device that compiling leaves in disorder, say."""
    laps = scripted(lambda provider, count: ProviderFailed("lost") if count > 6 or provider == "late" else 1.0)
    assert [len(entry["laps_s"]) for entry in laps.values()] == [3, 3, 0]
    assert [entry["failed"] for entry in laps.values()] == [None, None, "lost"]
    broken = scripted(lambda provider, count: ProviderFailed("lost") if count == 4 and provider == "b" else 1.0)
    assert [len(entry["laps_s"]) for entry in broken.values()] == [6, 0, 3]
    assert broken["b"]["failed"] == "lost"


def test_memory_that_is_not_there_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """And costs nobody a lap; graphs hold what is held without them, which is measured once."""
    asked: list[str] = []

    def apart(provider: str, *_: object) -> Record:
        asked.append(provider)
        if provider == CHECKPOINT:
            raise subprocess.CalledProcessError(1, "python")
        if provider == CHANNELS_LAST:
            raise LATE
        return {"held_bytes": 1e6, "saved_bytes": 2e6, "peak_bytes": 3e6}

    timed = {"off": 0.0, "failed": None, "laps_s": [1.0]}
    monkeypatch.setattr(densenet, "memory_apart", apart)
    monkeypatch.setattr(densenet, "times", lambda providers, *_: {provider: dict(timed) for provider in providers})
    record = densenet.measure(SMALL, "cuda")
    assert sorted(asked[:3]) == sorted([PLAIN, CHECKPOINT, SHARED])  # what targets ask for, first
    assert sorted(asked) == sorted([*densenet.PROVIDERS])
    assert record["providers"][SHARED + GRAPHED]["saved_bytes"] == 2e6
    text = densenet_figures.table(record)
    assert "| checkpoint | 1000.0 (1000.0 to 1000.0) | 4 | 1.00 |  |  |  | 0e+00 |" in text
    assert "\nNo memory of checkpoint: its process ended with status 1" in text
    assert f"No memory of plain channels_last, plain channels_last, graphed: {TIME_OVER}" in text


def test_a_gpu_s_targets_come_first() -> None:
    usual = densenet.usual("cuda")
    assert set(usual) == {*densenet.PROVIDERS, *densenet.ON_GPUS}
    judged = {PLAIN, SHARED, SHARED + GRAPHED, CHANNELS_LAST, CHECKPOINT, *densenet_figures.COMPILED}
    assert set(usual[: len(judged)]) == judged


def test_who_has_no_time_is_in_the_table() -> None:
    failed = {"off": None, "failed": "OutOfMemoryError: CUDA out of memory", "laps_s": []}
    wrong = entry([], 2e6, 3e6) | {"off": 0.03}
    text = densenet_figures.table(
        made_up(SMALL.network, 4, False, plain=entry([1.0], 2e6), shared=wrong, compile=failed)
    )
    assert text.splitlines()[-2:] == [
        "| shared | no time |  |  | 3 | 2 | 4 | 3e-02 |",
        "| compile | OutOfMemoryError: CUDA out of memory |  |  |  |  |  |  |",
    ]


def test_saved_bytes_are_ordered():
    saved = {memory: densenet.saved_bytes(densenet.Step(memory, SMALL, "cpu")) for memory in ("plain", "shared")}
    assert 0 < saved["shared"] < 0.5 * saved["plain"]


@pytest.mark.slow
@pytest.mark.parametrize("network", ["densenet-80-80", "densenet-bc-100-12"])
def test_what_128_images_keep(network: str) -> None:
    """A GPU's targets of memory, counted where there is none: the same tensors are saved there, and their bytes are so
    many an image and so many for weights."""
    kept = {}
    for memory in (PLAIN, CHECKPOINT, SHARED):
        two, four = (
            densenet.saved_bytes(densenet.Step(memory, densenet.Case(network, batch, True), "cpu")) for batch in (2, 4)
        )
        kept[memory] = two + 63 * (four - two)
    assert kept[SHARED] <= 0.2 * kept[PLAIN]
    assert kept[SHARED] <= 0.5 * kept[CHECKPOINT]


def test_a_cpu_s_targets_are_judged() -> None:
    """Time by the rounds, of which the second was twice as slow for both; memory by what the processes kept."""
    record = made_up(
        "densenet-bc-100-12",
        32,
        False,
        plain=entry([1.0, 2.0, 1.0], 800.0),
        checkpoint=entry([1.3, 2.6, 1.3], 160.0),
        shared=entry([0.7, 1.4, 0.6], 200.0),
    )
    found = judged("cpu", record)
    title = "densenet-bc-100-12, batch 32, fp32"
    assert {what: (verdict.value, verdict.met) for what, verdict in found.items()} == {
        f"{title}: time of shared over plain": (pytest.approx(0.7), True),
        f"{title}: kept memory of shared over plain": (0.25, True),
        f"{title}: kept memory of shared over checkpoint": (1.25, False),
    }
    assert found[f"{title}: time of shared over plain"].cells[1:4] == ["<= 1x", "0.67x", "0.7x"]
    assert not judged("cpu", record | {"case": record["case"] | {"amp": True}})


def test_a_gpu_s_targets_are_judged() -> None:
    providers = {
        PLAIN: entry([9.0], 1.0, 1000.0),
        CHANNELS_LAST: entry([6.0], 1.0),
        "compile": entry([3.0], 1.0),
        "compile max-autotune": entry([2.8], 1.0),
        CHECKPOINT: entry([9.0], 1.0, 300.0),
        SHARED: entry([3.0], 1.0, 180.0),
        SHARED + GRAPHED: entry([2.0], 1.0),
    }
    found = judged("cuda", made_up("densenet-80-80", 128, True, **providers))
    assert [(round(verdict.value or 0, 3), verdict.met) for verdict in found.values()] == [
        (3.0, True),
        (1.4, False),
        (0.18, True),
        (0.6, False),
    ]
    providers["compile max-autotune"]["laps_s"] = []  # failed, or off
    again = judged("cuda", made_up("densenet-80-80", 128, True, **providers))
    assert [verdict.value for verdict in again.values()][1] == 1.5


def test_a_report_has_them_and_goes_on_without_what_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    record = made_up(SMALL.network, 4, False, plain=entry([1.0], 2e6), shared=entry([0.5], 1e6))
    answers = iter([record, subprocess.CalledProcessError(1, "python"), subprocess.TimeoutExpired("python", 1)])

    def measured(case: densenet.Case, device: str, **_: Any) -> Record:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(densenet, "measure", measured)
    monkeypatch.setattr(densenet, "reported", lambda device: [SMALL] * 3)
    records: list[Record] = []
    failed = report.measure_densenets("cpu", records, math.inf, lambda: None)
    assert records == [record]
    assert [(each["passed"], each["name"]) for each in failed] == [
        (False, "memories of densenet-bc-16-4, batch 4, fp32"),
        (True, "memories of densenet-bc-16-4, batch 4, fp32"),
    ]
    (late,) = report.measure_densenets("cpu", records, time.monotonic() + 1, lambda: None)[:1]
    assert "the run's time was over" in late["outcome"]
    page = tables.all_pages([bench_records.results() | {"densenets": records}])
    assert "#### DenseNets in every memory\n\ndensenet-bc-16-4, batch 4, fp32\n" in page
    assert "| shared | 500.0 (500.0 to 500.0) | 8 | 0.50 | 0 | 1 | 2 | 1e-03 |" in page


def test_a_measurement_ends_in_time() -> None:
    entry = densenet.measure(SMALL, "cpu", providers=(PLAIN,), timeout=0.1)["providers"][PLAIN]
    assert entry == {"off": None, "failed": TIME_OVER, "laps_s": []}


def test_a_report_measures_what_targets_are_set_for() -> None:
    """And the CPU's under autocast too; of a GPU's sixteen cases, for which minutes would not do, that one."""
    for device in ("cpu", "cuda"):
        titles = {case.title for case in densenet.reported(device)}
        assert {case.title for case in densenet.cases(device)} >= titles
        asked = {target.what.split(":")[0] for target in targets.targets(device) if f"of {SHARED} over" in target.what}
        assert asked
        assert asked <= titles


@pytest.mark.slow
def test_memory_of_densenet_bc_100_12(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was asked of memory="shared": a quarter of plain's, and no more than checkpoint's, in fresh processes.

    On one thread, each of which has buffers, and with an allocator that keeps nothing: what a process holds is else a
    matter of the cores, and of the heap's holes (57 to 89 MB in checkpoint mode).
    """
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(2**16))
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    case = densenet.Case("densenet-bc-100-12", 8)
    entries = {memory: densenet.memory_apart(memory, case, "cpu") for memory in ("plain", "checkpoint", "shared")}
    for kind in ("saved_bytes", "held_bytes"):
        found = {memory: entry[kind] for memory, entry in entries.items()}
        assert found["shared"] <= found["plain"] / 4, kind
        assert found["shared"] <= found["checkpoint"], kind
    for entry in entries.values():
        assert entry["peak_bytes"] >= 0.99 * entry["held_bytes"]  # the system's two counts may lag a little


@pytest.mark.slow
def test_command_line(tmp_path):
    path = tmp_path / "densenet.json"
    command = [sys.executable, "-m", "benchmarks.densenet", "--network", SMALL.network, "--batch", "4", "--rounds", "2"]
    command += ["--provider", "shared", "--json", str(path)]
    done = subprocess.run(command, cwd=machine.ROOT, capture_output=True, text=True, check=True)
    assert "densenet-bc-16-4, batch 4, fp32" in done.stdout
    (record,) = json.loads(path.read_text())["densenets"]
    assert list(record["providers"]) == ["plain", "shared"]
    assert all(len(entry["laps_s"]) == 2 for entry in record["providers"].values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_graphs_need_a_gpu(capsys):
    with pytest.raises(SystemExit):
        densenet.main(["--network", SMALL.network, "--provider", "shared, graphed"])
    assert "--provider 'shared, graphed' needs a CUDA device" in capsys.readouterr().err
