"""Real processes of a local pool: the bits of separate runs, whatever is killed and whenever all is stopped."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from study_runs import Heard, Watch, asked, at_work, footprints, hold, kill_at_work, release, separately, small, workers

from ban_fast.config import TeacherConfig
from ban_fast.errors import UserError
from ban_fast.studies import Study, run_study, summary
from ban_fast.training import Interrupted

TEACHER, BAN, CWTM = "teacher,seed=0", "objective=ban,seed=0", "objective=cwtm,seed=0"


@pytest.fixture(scope="module")
def study() -> Study:
    return Study.vary(small(), {"objective.name": ["ban", "cwtm"]})


@pytest.fixture(scope="module")
def expected(study: Study, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Each run by itself, with one thread, as the pool's are asked to have."""
    path = tmp_path_factory.mktemp("separate")
    separately(study, path)
    return footprints(study, path)


@pytest.mark.slow
def test_a_worker_that_is_killed_goes_on_and_all_are_what_separate_runs_are(
    study: Study, expected: dict[str, object], tmp_path: Path
) -> None:
    """Its student is killed at work; the teacher that both share is trained once."""
    out, heard = tmp_path / "study", Heard()
    killer = kill_at_work(out, CWTM)
    assert run_study(study, out, workers=2, cpus_per_run=1, observer=heard) == {}
    killer.join()
    assert footprints(study, out) == expected
    assert heard.started[0] == (TEACHER, 1)
    assert sorted(heard.started[1:]) == [(BAN, 1), (CWTM, 1), (CWTM, 2)]
    assert (CWTM, "failed", True) in heard.ended
    assert heard.notes == []
    assert asked(out, study) == {BAN: ("cache", 0), CWTM: ("cache", 0)}
    for name in (BAN, CWTM):
        log = (out / "logs" / f"{name}.txt").read_text()
        assert "generation 0 (label)" not in log, "adopted, not trained"
    assert {path.name for path in out.iterdir()} == {"study.json", "logs", TEACHER, BAN, CWTM}
    assert [row.figures["error"].n for row in summary(out)] == [1, 1, 1, 1]


@pytest.mark.slow
def test_stopped_and_gone_on_with(study: Study, expected: dict[str, object], tmp_path: Path) -> None:
    """All save themselves; what is finished is not begun again, also where only the results are left to collect."""
    out, students = tmp_path / "study", (BAN, CWTM)
    hold(out, *students)
    with pytest.raises(Interrupted):
        run_study(study, out, workers=2, cpus_per_run=1, should_stop=lambda: at_work(out, *students))
    assert workers(out) == {}
    release(out, *students)
    heard = Heard()
    assert run_study(None, out, workers=1, cpus_per_run=1, resume=True, observer=heard) == {}
    assert heard.before == {TEACHER}
    assert sorted(heard.started) == [(BAN, 1), (CWTM, 1)]
    assert footprints(study, out) == expected
    again = Heard()
    assert run_study(study, out, resume=True, observer=again) == {}
    assert (again.before, again.started) == ({TEACHER, BAN, CWTM}, [])


@pytest.mark.slow
def test_a_starter_that_is_killed(study: Study, expected: dict[str, object], tmp_path: Path) -> None:
    """Its runs save themselves and end; who resumes at once waits for them."""
    out = tmp_path / "study"
    hold(out, CWTM)
    with _starter(study, out) as starter:
        Watch(lambda: at_work(out, CWTM)).join()
    assert starter.returncode == -signal.SIGKILL
    release(out, CWTM)
    assert run_study(None, out, workers=2, cpus_per_run=1, resume=True) == {}
    assert footprints(study, out) == expected


@pytest.mark.slow
def test_two_starters_of_one_study(study: Study, tmp_path: Path) -> None:
    out = tmp_path / "study"
    hold(out, BAN, CWTM)
    with _starter(study, out):
        Watch(lambda: at_work(out, BAN, CWTM)).join()
        with pytest.raises(UserError, match=r"is in use by another process: wait for it, or choose another --out"):
            run_study(None, out, resume=True)
    Watch(lambda: not workers(out)).join()


@pytest.mark.slow
def test_one_that_always_fails_does_not_end_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that raises is tried again, --retries times; one that can't be trained is a mistake, and is not."""
    (tmp_path / "odd_networks.py").write_text(
        "import os\nfrom torch import nn\n\n"
        "def dies(num_classes):\n    os.kill(os.getpid(), 9)\n\n"
        "def fine(num_classes):\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    names = ["odd_networks:dies", "odd_networks:fine", "odd_networks:missing"]
    study, heard = Study.vary(small(epochs=1), {"model.name": names}), Heard()
    failed = run_study(study, tmp_path / "study", workers=2, retries=1, observer=heard)
    dies, fine, missing = (f"model={name.replace(':', '_')},seed=0" for name in names)
    assert failed == {dies: "killed by SIGKILL", missing: failed[missing]}
    assert "missing" in failed[missing]
    assert sorted(heard.started) == sorted([(dies, 1), (dies, 2), (fine, 1), (missing, 1)])
    assert (tmp_path / "study" / fine / "generation-1" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("is_named", [True, False])
def test_students_of_one_teacher_read_its_outputs_at_once(is_named: bool, tmp_path: Path) -> None:
    """In a place with a name or the study's own, which goes with them: both are at work, and neither asks."""
    place = str(tmp_path / "cache") if is_named else None
    study = Study.vary(
        small(teacher=TeacherConfig(mode="cache", cache_directory=place)), {"objective.name": ["ban", "cwtm"]}
    )
    out, students = tmp_path / "study", (BAN, CWTM)
    hold(out, *students)
    waits = Watch(lambda: at_work(out, *students), lambda: release(out, *students))
    assert run_study(study, out, workers=2, cpus_per_run=1) == {}
    waits.join()
    assert asked(out, study) == dict.fromkeys(students, ("cache", 0))
    assert (tmp_path / "cache").exists() == is_named
    assert not (out / "teacher-cache").exists()


@pytest.mark.slow
def test_stopped_while_the_teachers_outputs_are_put_down(study: Study, tmp_path: Path) -> None:
    """Its run goes on with that, computes nothing again, and the students are those of a study that was not stopped."""
    whole, out = tmp_path / "whole", tmp_path / "study"
    assert run_study(study, whole, workers=2, cpus_per_run=1) == {}

    def is_filling() -> bool:
        return any(file.stat().st_size for file in (out / "teacher-cache").glob("*/*/index.bin"))

    with pytest.raises(Interrupted):
        run_study(study, out, workers=1, cpus_per_run=1, should_stop=is_filling)
    (out / TEACHER / "shared.json").unlink(missing_ok=True)  # a fast machine's was done
    heard = Heard()
    assert run_study(None, out, workers=2, cpus_per_run=1, resume=True, observer=heard) == {}
    assert heard.started[0] == (TEACHER, 1)
    assert footprints(study, out) == footprints(study, whole)
    assert asked(out, study) == asked(whole, study)
    records = [json.loads((place / TEACHER / "shared.json").read_text())["shared"] for place in (whole, out)]
    assert records[0][0]["forward_images"] == records[1][0]["forward_images"] > 0


@pytest.mark.slow
def test_what_libraries_print_holds_no_run_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than fits a pipe, before standard output is the log's."""
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "sitecustomize.py").write_text("print('hello ' * 50_000, flush=True)\n")
    path = os.pathsep.join([str(tmp_path / "library"), *filter(None, [os.environ.get("PYTHONPATH")])])
    monkeypatch.setenv("PYTHONPATH", path)
    assert run_study(Study.vary(small(), {"seed": [0]}), tmp_path / "study", workers=1) == {}


@contextmanager
def _starter(study: Study, out: Path) -> "Iterator[subprocess.Popen[bytes]]":
    """A process that executes the study; at the block's end it is killed."""
    out.mkdir()
    study.save(out)
    code = (
        "import sys; out, *sys.path[:] = sys.argv[1:]; from ban_fast.studies import run_study; "
        "run_study(None, out, workers=2, cpus_per_run=1, resume=True)"
    )
    starter = subprocess.Popen([sys.executable, "-c", code, str(out), *sys.path])
    try:
        yield starter
    finally:
        starter.kill()
        starter.wait()
