"""The same studies on a Ray cluster of this machine, with fractional CPUs."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
from study_runs import Heard, at_work, footprints, hold, kill_at_work, release, separately, small, workers

from ban_fast.errors import UserError
from ban_fast.studies import Study, run_study
from ban_fast.training import Interrupted

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install '.[ray]'"),
]


@pytest.fixture(scope="module")
def study() -> Study:
    return Study.vary(small(), {"objective.name": ["ban", "dkpp"]})


@pytest.fixture(scope="module")
def expected(study: Study, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    path = tmp_path_factory.mktemp("separate")
    separately(study, path)
    return footprints(study, path)


@pytest.fixture(scope="module")
def _cluster() -> Iterator[None]:
    """Two CPUs and little memory, whatever the machine has; where others use nearly all of it, no task is ended."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_memory_monitor_refresh_ms", "0")
        patch.setenv("RAY_gcs_server_port_wait_time_s", "300")
        ray.init(
            address="local",
            num_cpus=2,
            num_gpus=0,
            object_store_memory=10**8,
            include_dashboard=False,
            log_to_driver=False,
        )
        yield
        ray.shutdown()


@pytest.mark.usefixtures("_cluster")
def test_half_a_cpu_each_and_two_are_killed(study: Study, expected: dict[str, object], tmp_path: Path) -> None:
    """One student's process, and of the other the process of Ray's that had started it."""
    out, heard = tmp_path / "study", Heard()
    teacher, first, second = (run.name for run in study.runs)
    killers = [kill_at_work(out, first), kill_at_work(out, second, its_starter=True)]
    assert run_study(study, out, engine="ray", cpus_per_run=0.5, observer=heard) == {}
    for killer in killers:
        killer.join()
    assert footprints(study, out) == expected
    assert heard.started[0] == (teacher, 1)
    assert sorted(heard.started[1:]) == sorted([(first, 1), (first, 2), (second, 1), (second, 2)])
    assert sorted(heard.ended[1:]) == sorted(
        [(name, *how) for name in (first, second) for how in (("failed", True), ("done", False))]
    )


@pytest.mark.usefixtures("_cluster")
def test_stopped_and_gone_on_with_elsewhere(study: Study, expected: dict[str, object], tmp_path: Path) -> None:
    """What Ray began, a local pool ends."""
    out, students = tmp_path / "study", [run.name for run in study.runs[1:]]
    hold(out, *students)
    with pytest.raises(Interrupted):
        run_study(study, out, engine="ray", workers=2, cpus_per_run=0.25, should_stop=lambda: at_work(out, *students))
    assert workers(out) == {}
    release(out, *students)
    assert run_study(None, out, engine="local", workers=2, cpus_per_run=1, resume=True) == {}
    assert footprints(study, out) == expected


@pytest.mark.usefixtures("_cluster")
def test_a_run_that_no_machine_has_room_for(study: Study, tmp_path: Path) -> None:
    for asked, words in (
        ({"cpus_per_run": 3.0}, "no machine of the Ray cluster has 3 CPUs and 0 GPUs for a run"),
        ({"gpus_per_run": 0.5}, r"no machine of the Ray cluster has 1 CPUs and 0.5 GPUs"),
    ):
        with pytest.raises(UserError, match=words):
            run_study(study, tmp_path / "out", engine="ray", **asked)
    assert not (tmp_path / "out").exists()
