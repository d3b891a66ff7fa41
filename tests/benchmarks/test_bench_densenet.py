"""The DenseNet benchmark: its peers compute the same network, its memory figures mean something, its table is whole."""

import json
import math
import subprocess
import sys
import time
from typing import Any

import bench_records
import pytest
import torch

from benchmarks import densenet, densenet_figures, machine, report, tables, targets
from benchmarks.densenet_figures import CHANNELS_LAST, CHECKPOINT, GRAPHED, PLAIN, SHARED, Record

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


def test_processes_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """And who fails, or has another gradient, has no time."""
    entries = densenet.times((PLAIN, SHARED, "compile no such mode"), SMALL, "cpu", rounds=2)
    assert [len(each["laps_s"]) for each in entries.values()] == [2, 2, 0]
    assert [each["off"] for each in entries.values()] == [0, pytest.approx(0, abs=densenet.LIMITS[False]), None]
    assert "no such mode" in entries["compile no such mode"]["failed"]
    assert (entries[PLAIN]["failed"], entries[SHARED]["failed"]) == (None, None)
    assert densenet._entry([0.5], 0.03, None, SMALL) == {"off": 0.03, "failed": None, "laps_s": []}


def test_a_process_that_ends_is_an_error() -> None:
    with densenet.Processes([PLAIN], SMALL, "cpu", None) as processes:
        processes._of[PLAIN].kill()
        with pytest.raises(subprocess.CalledProcessError):
            processes.lap(PLAIN)


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
    with pytest.raises(subprocess.TimeoutExpired):
        densenet.measure(SMALL, "cpu", providers=(PLAIN,), timeout=0.1)


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
