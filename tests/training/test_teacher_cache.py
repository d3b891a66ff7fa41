"""A cached teacher is the live one, asked less often: the same bits, or the stated rounding; forwards are counted."""

from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import (
    BATCH,
    CLASSES,
    EPOCHS,
    IMAGES,
    STEPS,
    Heard,
    Recorder,
    StopAt,
    but_for_teachers,
    config,
    digits,
    footprint,
    network,
    own,
    samples,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ban_fast.config import Config, ModelConfig, ObjectiveConfig, TeacherConfig
from ban_fast.data import Batch
from ban_fast.errors import UserError
from ban_fast.training import Interrupted, run, run_together
from ban_fast.training.cache_store import FileRows, MemoryRows
from ban_fast.training.objectives import make_objective
from ban_fast.training.teacher import LiveTeacher
from ban_fast.training.teacher_cache import CachedTeacher

LIVE, CACHE, AUTO = (TeacherConfig(mode=mode) for mode in ("live", "cache", "auto"))
CPU = torch.device("cpu")


def same_but_teacher(one: Path, other: Path) -> bool:
    """Whether two runs have the same weights, figures and losses, whatever their teachers' records say."""
    return but_for_teachers(footprint(one)) == but_for_teachers(footprint(other))


class Counting(nn.Module):
    """The small network, which counts the images that it sees in eval mode without being evaluated."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network()
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and len(x) == BATCH:  # evaluation has batches of 40
            self.seen += len(x)
        return self.body(x)


# The same bits


@pytest.mark.parametrize(
    ("objective", "changes"),
    [("ban", {}), ("ban+l", {"amp": "bf16"}), ("cwtm", {"channels_last": True}), ("dkpp", {})],
)
def test_cached_and_live_runs_are_the_same_bits(objective: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """torch's CPU kernels are batch-invariant at one size, so every loss in metrics.jsonl is equal, not close."""
    run(digits(objective, teacher=LIVE, **changes), out=tmp_path / "live")
    cached = run(digits(objective, teacher=AUTO, **changes), out=tmp_path / "auto")
    assert cached.generations[1]["teacher"]["mode"] == "cache"
    assert same_but_teacher(tmp_path / "live", tmp_path / "auto")


@pytest.mark.parametrize("model", ["wrn-10-1", "densenet-bc-10-12", "mlp-8"])
def test_auto_gives_the_same_bits_with_other_networks(model: str, tmp_path: Path) -> None:
    """Live, where the processor's kernels for those shapes are not batch-invariant."""
    changes: dict[str, Any] = {"model": ModelConfig(name=model), "epochs": 8, "limit": 48}
    run(digits(teacher=LIVE, **changes), out=tmp_path / "live")
    run(digits(teacher=AUTO, **changes), out=tmp_path / "auto")
    assert same_but_teacher(tmp_path / "live", tmp_path / "auto")


def test_in_memory_where_there_is_no_directory() -> None:
    kept, live = run(digits(teacher=CACHE)), run(digits(teacher=LIVE))
    assert kept.generations[1]["teacher"]["mode"] == "cache"
    assert kept.generations[1]["test"] == live.generations[1]["test"]
    for mine, theirs in zip(kept.models[1].parameters(), live.models[1].parameters(), strict=True):
        assert torch.equal(mine, theirs)


# Rounding, where it was asked for


@pytest.mark.parametrize(
    ("dtype", "name", "rounding"), [(torch.float16, "fp16", 2**-11), (torch.bfloat16, "bf16", 2**-8)]
)
def test_rows_in_half_precision(dtype: torch.dtype, name: str, rounding: float) -> None:
    """Each logit is rounded once; the loss moves by the logits' largest rounding at most, twice (p and log p)."""
    live, cached, batch = pair(rows=MemoryRows(CLASSES, dtype, CPU))
    exact, kept = live(batch).logits, cached(batch)
    assert exact is not None
    assert kept.logits is not None
    assert kept.logits.dtype == dtype
    assert ((kept.logits[kept.rows].float() - exact).abs() <= rounding * exact.abs()).all()
    student = torch.randn(BATCH, CLASSES, generator=torch.Generator().manual_seed(1))
    objective = make_objective(ObjectiveConfig(name="ban"), 0)
    losses = [objective(student, taught, batch, torch.tensor(0)).loss.item() for taught in (live(batch), kept)]
    assert losses[0] != losses[1]
    largest = max(exact.abs().max().item(), student.abs().max().item())
    assert losses[0] == pytest.approx(losses[1], abs=4 * rounding * largest)
    record = run(config(teacher=TeacherConfig(mode="cache", cache_dtype=name)), **own()).generations[1]["teacher"]
    assert (record["mode"], record["dtype"]) == ("cache", str(dtype).removeprefix("torch."))


def test_cwtm_keeps_the_largest_output_alone(tmp_path: Path) -> None:
    """Four bytes a view. c is rounded to fp32, 6e-8, where the kernel has it exactly: the loss moves by no more.

    A place that has a name is for other objectives too, and gets logits.
    """
    live, cached, batch = pair(rows=MemoryRows(1, torch.float32, CPU), only_confidence=True)
    taught = cached(batch)
    assert taught.logits is None
    objective = make_objective(ObjectiveConfig(name="cwtm"), 0)
    student = torch.randn(BATCH, CLASSES, generator=torch.Generator().manual_seed(1))
    losses = [objective(student, t, batch, torch.tensor(0)).loss.item() for t in (live(batch), taught)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-7)
    sizes = []
    for name, place in (("own", None), ("named", str(tmp_path / "caches"))):
        settings = digits("cwtm", teacher=TeacherConfig(mode="cache", cache_directory=place))
        with pytest.raises(Interrupted):
            run(settings, out=tmp_path / name, should_stop=StopAt(24 * 5 + 70))
        (folder,) = (tmp_path / "own" / "teacher-cache" if place is None else tmp_path / "caches").iterdir()
        sizes.append((folder / "rows.bin").stat().st_size)
    assert 0 < sizes[0] <= 4 * 72 * 9
    assert sizes[1] == 10 * sizes[0]


def pair(**options: Any) -> tuple[LiveTeacher, CachedTeacher, Batch]:
    """A live and a cached teacher of one network, and a batch that the latter is prepared for."""
    torch.manual_seed(0)
    taught = network().eval()
    cached = CachedTeacher(taught, samples=IMAGES, views=2, batch_size=BATCH, device=CPU, **options)
    x, y = samples(BATCH, 0)
    batch = Batch(x * 4, y, torch.arange(BATCH) * 3, torch.arange(BATCH) % 2)
    cached.prepare([batch])
    return LiveTeacher(taught), cached, batch


def test_rows_are_read_where_they_lie() -> None:
    """The losses get the table itself and the rows' places in it, whoever asks and whatever he asks for."""
    rows = MemoryRows(CLASSES, torch.float32, CPU)
    _, cached, batch = pair(rows=rows)
    for _ in range(2):
        taught = cached(batch)
        assert taught.logits is not None
        assert taught.logits.data_ptr() == rows.table.data_ptr()
        assert taught.rows is not None
        assert torch.equal(rows.table[taught.rows], taught.logits.index_select(0, taught.rows))
        assert len(taught.rows.unique()) == BATCH


def test_confidences_beside_logits_are_those_alone() -> None:
    _, alone, batch = pair(rows=MemoryRows(1, torch.float32, CPU), only_confidence=True)
    _, beside, _ = pair(rows=MemoryRows(CLASSES, torch.float32, CPU), with_confidence=True)
    one, other = alone(batch), beside(batch)
    assert one.confidence is not None
    assert other.confidence is not None
    assert torch.equal(one.confidence[one.rows], other.confidence[other.rows])


@pytest.mark.parametrize(
    "dtype", ["bf16", *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in ("fp32", "fp16"))]
)
def test_cwtm_does_not_depend_on_what_else_is_kept(dtype: str, tmp_path: Path) -> None:
    """Its numbers alone, beside another run's logits, a family's, or in memory: the same bits."""

    def kept(name: str) -> TeacherConfig:
        return TeacherConfig(mode="cache", cache_dtype=dtype, cache_directory=str(tmp_path / name))

    run(digits("cwtm", teacher=kept("own")), out=tmp_path / "alone")
    ban = run(digits("ban", teacher=kept("shared")), out=tmp_path / "ban").generations[1]["teacher"]
    then = run(digits("cwtm", teacher=kept("shared")), out=tmp_path / "then").generations[1]["teacher"]
    assert ban["forward_images"] > then["forward_images"] == 0
    own_rows = TeacherConfig(mode="cache", cache_dtype=dtype)
    run_together(digits(students=("ban", "cwtm"), teacher=own_rows), out=tmp_path / "family")
    assert same_but_teacher(tmp_path / "then", tmp_path / "alone")
    assert same_but_teacher(tmp_path / "family" / "cwtm", tmp_path / "alone")
    assert same_but_teacher(tmp_path / "family" / "ban", tmp_path / "ban")
    in_memory = run(digits("cwtm", teacher=own_rows)).generations[1]
    assert in_memory["test"] == footprint(tmp_path / "alone")["results"]["generations"][1]["test"]


@pytest.mark.parametrize("question", [24 * 5 + 20, pytest.param(24 * 5 + 90, marks=pytest.mark.slow)])
def test_a_family_with_rounded_rows_resumes_to_the_same_bits(question: int, tmp_path: Path) -> None:
    settings = digits(students=("ban", "cwtm"), teacher=TeacherConfig(mode="cache", cache_dtype="fp16"))
    run_together(settings, out=tmp_path / "whole")
    with pytest.raises(Interrupted):
        run_together(settings, out=tmp_path / "parts", should_stop=StopAt(question))
    run_together(settings, out=tmp_path / "parts", resume=True)
    for name in ("ban", "cwtm"):
        assert footprint(tmp_path / "parts" / name) == footprint(tmp_path / "whole" / name)


def test_a_logit_beyond_fp16_is_one_line() -> None:
    taught = nn.Sequential(nn.Flatten(), nn.Linear(36, CLASSES))
    taught[1].bias.data += 7e4
    rows = MemoryRows(CLASSES, torch.float16, CPU)
    teacher = CachedTeacher(taught, rows=rows, samples=4, views=1, batch_size=4, device=CPU)
    x, y = samples(4, 0)
    batch = Batch(x, y, torch.arange(4), torch.zeros(4).long())
    with pytest.raises(UserError, match=r"a logit of .*, which fp16 can't hold: use --cache-dtype bf16 or fp32"):
        teacher.prepare([batch])
    assert rows.count == 0


class Waits(TorchDispatchMode):
    """Operations that a GPU would be waited for: numbers for the host, and results as large as the data say."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.__name__.partition(".")[0]
        by_mask = name.startswith("index") and any(
            isinstance(each, Tensor) and each.dtype == torch.bool
            for arg in args
            if isinstance(arg, list)
            for each in arg
        )
        if by_mask or name in ("nonzero", "masked_select", "_local_scalar_dense", "equal"):
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


def test_many_batches_are_one_wait() -> None:
    """For how many rows are missing; none at all where it answers."""
    _, cached, batch = pair(rows=MemoryRows(CLASSES, torch.float32, CPU))
    others = [batch._replace(sample_ids=batch.sample_ids + shift) for shift in range(3)]
    with Waits() as waits:
        cached.prepare(others)
    assert waits.seen == ["nonzero"]
    with Waits() as waits:
        for each in others:
            cached(each)
    assert waits.seen == []
    assert cached.known == 3 * BATCH
    with Waits() as waits:
        assert batch.images[batch.labels > 0].numel()
    assert waits.seen == ["index"]  # one would be seen


# What is saved


def test_forward_passes_are_counted_and_saved() -> None:
    """Own tensors have one view: each image is shown to the teacher once, in whole batches."""
    networks: list[Counting] = []

    def factory() -> nn.Module:
        networks.append(Counting())
        return networks[-1]

    recorded = {}
    for teacher in (LIVE, AUTO):
        networks.clear()
        observer = Recorder()
        results = run(config(generations=1, teacher=teacher), observer=observer, **own(model=factory))
        taught = networks[1]  # 0 was only tried on the data
        recorded[teacher.mode] = results.generations[1]["teacher"]["forward_images"]
        probes = 2 * BATCH if teacher is AUTO else 0  # whether the kernels are batch-invariant
        assert taught.seen == recorded[teacher.mode] + probes
    assert recorded["live"] == STEPS * BATCH
    # 64 of 72 images in the first epoch; the 8 it left out cost a batch in at most each of the others.
    assert 64 + BATCH <= recorded["auto"] <= 64 + (EPOCHS - 1) * BATCH


def test_a_shared_directory_is_filled_once(tmp_path: Path) -> None:
    """By the next objective too: with the same seed it sees the same views."""
    place = TeacherConfig(mode="cache", cache_directory=str(tmp_path / "caches"))
    first = run(digits("ban", teacher=place), out=tmp_path / "a").generations[1]["teacher"]
    assert first["forward_images"] > 0
    for name in ("dkpp", "cwtm", "ban"):
        observer = Heard()
        again = run(digits(name, teacher=place), out=tmp_path / f"then-{name}", observer=observer)
        assert again.generations[1]["teacher"] == {"mode": "cache", "dtype": "float32", "forward_images": 0}
    assert len(list((tmp_path / "caches").iterdir())) == 1
    other = run(digits("ban", teacher=place, seed=1), out=tmp_path / "b").generations[1]["teacher"]
    assert other["forward_images"] > 0, "another teacher"
    assert len(list((tmp_path / "caches").iterdir())) == 2


def test_a_runs_own_cache_goes_when_its_student_is_trained(tmp_path: Path) -> None:
    class Watching(Recorder):
        def __init__(self) -> None:
            super().__init__()
            self.sizes: dict[int, int] = {}

        def epoch_finished(self, generation: int, record: dict[str, Any]) -> None:
            self.sizes[generation] = len(list((tmp_path / "teacher-cache").glob("*/rows.bin")))

    observer = Watching()
    run(config(teacher=CACHE), out=tmp_path, observer=observer, **own())
    assert observer.sizes == {0: 0, 1: 1, 2: 1}
    assert not (tmp_path / "teacher-cache").exists()


# Stopped and resumed


@pytest.mark.parametrize("model", [pytest.param("convnet-8", marks=pytest.mark.slow), "densenet-bc-10-4"])
def test_resumed_with_its_cache(model: str, tmp_path: Path) -> None:
    """Everything is equal, the count of forward passes too: nothing that was kept is computed again.

    With kernels that are not batch-invariant too: what is left is shown to the teacher in the same batches.
    """
    settings = digits(model=ModelConfig(name=model), teacher=CACHE, checkpoint_seconds=1e9)
    run(settings, out=tmp_path / "whole")
    first = StopAt(24 * 5 + 70)  # in the student: 96 steps and 24 evaluations come before
    for stop in (first, StopAt(3), StopAt(30)):
        with pytest.raises(Interrupted):
            run(settings, out=tmp_path / "parts", resume=stop is not first, should_stop=stop)
        assert list((tmp_path / "parts" / "teacher-cache").glob("*/rows.bin"))
    run(settings, out=tmp_path / "parts", resume=True)
    assert footprint(tmp_path / "parts") == footprint(tmp_path / "whole")


def stopped(path: Path, teacher: TeacherConfig = CACHE) -> Config:
    settings = digits(teacher=teacher)
    with pytest.raises(Interrupted):
        run(settings, out=path, should_stop=StopAt(24 * 5 + 70))
    return settings


@pytest.mark.parametrize("damage", ["removed", "cut", "flipped", "garbage"])
def test_a_lost_or_damaged_cache_costs_forward_passes_alone(damage: str, tmp_path: Path) -> None:
    run(digits(teacher=CACHE), out=tmp_path / "whole")
    settings = stopped(tmp_path / "run")
    (rows,) = (tmp_path / "run" / "teacher-cache").glob("*/rows.bin")
    data = bytearray(rows.read_bytes())
    if damage == "removed":
        for file in rows.parent.iterdir():
            file.unlink()
        rows.parent.rmdir()
    elif damage == "garbage":
        (rows.parent / "index.bin").write_bytes(b"garbage\n" * 999)
    else:
        data[len(data) // 2] ^= 1
        rows.write_bytes(data[: len(data) // 2] if damage == "cut" else data)
    observer = Heard()
    run(settings, out=tmp_path / "run", resume=True, observer=observer)
    assert ("was damaged after" in observer.said[0][1]) == (damage != "removed")
    assert same_but_teacher(tmp_path / "run", tmp_path / "whole")


def test_a_foreign_cache_in_its_place_is_refused(tmp_path: Path) -> None:
    settings = stopped(tmp_path / "run")
    (folder,) = (tmp_path / "run" / "teacher-cache").iterdir()
    place = TeacherConfig(mode="cache", cache_directory=str(tmp_path / "caches"))
    run(digits(seed=1, teacher=place))
    (other,) = (tmp_path / "caches").iterdir()
    for file in other.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match=r"is the cache of another teacher: .* there, .* here; delete the directory"):
        run(settings, out=tmp_path / "run", resume=True)


def test_the_place_may_change_between_sessions(tmp_path: Path) -> None:
    settings = stopped(tmp_path / "run", TeacherConfig(mode="cache", cache_directory=str(tmp_path / "caches")))
    (tmp_path / "caches").rename(tmp_path / "moved")
    settings.teacher.cache_directory = str(tmp_path / "moved")
    run(settings, out=tmp_path / "run", resume=True)
    run(digits(teacher=CACHE), out=tmp_path / "whole")
    assert footprint(tmp_path / "run") == footprint(tmp_path / "whole")


# Held, and watched


def test_a_directory_in_use(tmp_path: Path) -> None:
    place = TeacherConfig(mode="cache", cache_directory=str(tmp_path / "caches"))

    class Intruder(Recorder):
        said = ""

        def step(self, generation: int, done_steps: int) -> None:
            if generation == 1 and not self.said:
                with pytest.raises(UserError, match=r"in use by another process: wait for it, .*--cache-dir") as caught:
                    run(config(generations=1, teacher=place), **own())
                self.said = str(caught.value)

    intruder = Intruder()
    run(config(generations=1, teacher=place), observer=intruder, **own())
    assert intruder.said


def test_a_cached_teacher_that_changes_is_noticed() -> None:
    _, cached, _ = pair(rows=MemoryRows(CLASSES, torch.float32, CPU))
    cached.check()
    cached.network[1].running_mean[0] += 1e-6
    with pytest.raises(UserError, match="changed"):
        cached.check()


@pytest.mark.parametrize("key", [-1, 2 * IMAGES])
def test_rows_of_views_that_there_are_not(key: int, tmp_path: Path) -> None:
    """One line, and nothing is held any more."""

    def opened() -> FileRows:
        return FileRows(tmp_path, {"format": 0}, CLASSES, torch.float32)

    rows = opened()
    rows.append(torch.zeros(2, CLASSES), 2, torch.tensor([0, key]))
    rows.close()
    for _ in range(2):
        with pytest.raises(UserError, match="has rows of views that these data have not: delete the directory"):
            pair(rows=opened())
