"""What only a GPU can show of runs of language models: the CPU's path on the device, kept outputs. `pytest -m gpu`."""

import json
from pathlib import Path

import pytest
import torch
from small_runs import Recorder, StopAt, but_for_steps
from text_runs import text_config, write_text

from ban_fast.config import ModelConfig, TeacherConfig
from ban_fast.training import Interrupted, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("deterministic_kernels"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "corpus", lines=40)


@pytest.mark.parametrize("model", ["lstm-8", "cnn-lstm-8"])
@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_figures_are_the_cpus(text: Path, model: str, amp: str) -> None:
    """Without dropout, whose draws are the device's own. To fp32's rounding, or to bf16's."""
    nll = {}
    for device in ("cpu", "cuda"):
        options = {"dropout": 0.0}
        changes = {"generations": 1, "epochs": 2, "amp": amp, "device": device}
        results = run(text_config(text, model=ModelConfig(name=model, options=options), **changes))
        nll[device] = [record["test"]["nll"] for record in results.generations]
    assert nll["cuda"] == pytest.approx(nll["cpu"], rel=1e-3 if amp == "off" else 3e-2)


def test_kept_outputs_are_the_live_ones(text: Path, tmp_path: Path) -> None:
    """And a run that was stopped within a text goes on as if it had not been."""
    for mode in ("live", "cache", "stopped"):
        teacher = TeacherConfig(mode="live" if mode == "live" else "cache")
        settings = text_config(text, generations=1, epochs=2, teacher=teacher, device="cuda")
        if mode == "stopped":
            with pytest.raises(Interrupted):
                run(settings, out=tmp_path / mode, should_stop=StopAt(30))
        run(settings, out=tmp_path / mode, resume=mode == "stopped", observer=Recorder())
    metrics = [
        [json.loads(line) for line in (tmp_path / mode / "generation-1" / "metrics.jsonl").read_text().splitlines()]
        for mode in ("live", "cache")
    ]
    for one, other in zip(*metrics, strict=True):
        assert one["train"]["loss"] == pytest.approx(other["train"]["loss"], rel=1e-5)
    assert but_for_steps(tmp_path / "stopped") == but_for_steps(tmp_path / "cache")
