"""The DenseNet benchmark: its peers compute the same network, its memory figures mean something, its table is whole."""

import json
import subprocess
import sys

import pytest
import torch

from benchmarks import densenet, machine

SMALL = densenet.Case("densenet-bc-16-4", 4)


@pytest.mark.parametrize("network", ["densenet-bc-16-4", "densenet-80-80"])
def test_torchvisions_network_has_the_same_parameters(network):
    with torch.device("meta"):
        step_network = densenet.models.create(network)
        theirs = densenet.torchvision_network(step_network)
    ours = {id(parameter): parameter.shape for parameter in step_network.parameters()}
    assert {id(parameter): parameter.shape for parameter in theirs.parameters()} == ours


def test_times_are_of_providers_with_the_right_gradient(monkeypatch):
    providers = tuple(provider for provider in densenet.PROVIDERS if provider != "compile")
    entries = densenet.times(providers, SMALL, "cpu", rounds=2)
    for provider, entry in entries.items():
        assert entry["off"] <= densenet.LIMITS[False], provider
        assert len(entry["laps_s"]) == 2
    monkeypatch.setattr(densenet.Step, "gradient", lambda step: torch.tensor([1.0 + (step.network.memory == "shared")]))
    wrong = densenet.times(("plain", "shared"), SMALL, "cpu", rounds=1)
    assert wrong["shared"] == {"off": 1.0, "laps_s": []}
    sizes = {"saved_bytes": 3e6, "held_bytes": 2e6, "peak_bytes": 4e6}
    assert "no time" in densenet.table(SMALL, {name: entry | sizes for name, entry in wrong.items()}).splitlines()[-1]


def test_saved_bytes_are_ordered():
    saved = {memory: densenet.saved_bytes(densenet.Step(memory, SMALL, "cpu")) for memory in ("plain", "shared")}
    assert 0 < saved["shared"] < 0.5 * saved["plain"]


@pytest.mark.slow
def test_memory_of_densenet_bc_100_12():
    """What was asked of memory="shared": a quarter of plain's, and no more than checkpoint's, in fresh processes."""
    case = densenet.Case("densenet-bc-100-12", 8)
    held = {}
    for memory in ("plain", "checkpoint", "shared"):
        entry = densenet._fresh("memory", case, "cpu", 1, (memory,))
        held[memory] = entry["held_bytes"]
        assert entry["peak_bytes"] >= entry["held_bytes"]
    assert held["shared"] <= held["plain"] / 4
    assert held["shared"] <= held["checkpoint"]


@pytest.mark.slow
def test_command_line(tmp_path):
    path = tmp_path / "densenet.json"
    command = [sys.executable, "-m", "benchmarks.densenet", "--network", SMALL.network, "--batch", "4", "--rounds", "2"]
    command += ["--provider", "shared", "--json", str(path)]
    done = subprocess.run(command, cwd=machine.ROOT, capture_output=True, text=True, check=True)
    assert "densenet-bc-16-4, batch 4, fp32" in done.stdout
    (record,) = json.loads(path.read_text())["records"]
    assert list(record["providers"]) == ["plain", "shared"]
    assert all(len(entry["laps_s"]) == 2 for entry in record["providers"].values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_graphs_need_a_gpu(capsys):
    with pytest.raises(SystemExit):
        densenet.main(["--network", SMALL.network, "--provider", "shared, graphed"])
    assert "--provider 'shared, graphed' needs a CUDA device" in capsys.readouterr().err
