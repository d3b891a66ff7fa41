"""What "auto" picks for a teacher and says of it; what cannot be kept is refused before anything is trained."""

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_runs import (
    BATCH,
    IMAGES,
    Heard,
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
from torch.utils.data import DataLoader, TensorDataset

from ban_fast import models
from ban_fast.config import Config, DataConfig, ModelConfig, TeacherConfig
from ban_fast.data import KeyedLoader
from ban_fast.errors import OptionError, UserError
from ban_fast.training import Interrupted, run, run_together
from ban_fast.training.cache_store import FileRows, count_rows
from ban_fast.training.cache_worth import Fill
from ban_fast.training.jobs import make_task
from ban_fast.training.locks import DirectoryLock
from ban_fast.training.teacher_cache import CachedTeacher
from ban_fast.training.teacher_choice import choose_teacher

LIVE, CACHE = TeacherConfig(mode="live"), TeacherConfig(mode="cache")


class AgainstTheMean(nn.Module):
    """Its outputs for an image depend on the others in the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network()

    def forward(self, x: Tensor) -> Tensor:
        z = self.body(x)
        return z - (z * torch.linspace(0, 1, len(z))[:, None]).mean(0)


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(*samples(IMAGES, 0)), batch_size=BATCH, shuffle=True, drop_last=True)


@pytest.mark.parametrize(
    ("changes", "arguments", "said"),
    [
        ({}, own, "cache: 3 epochs show one view of an image: 62% fewer forward passes than live; logits in float32"),
        ({"epochs": 1}, own, "live: 1 epoch shows one view of an image: 0% fewer forward passes than live"),
        ({}, lambda: own(train=loader()), "live: what a DataLoader serves can't be told apart"),
        ({}, lambda: own(model=AgainstTheMean), "live: its logits depend on the other images of a batch"),
        ({"teacher": LIVE}, own, None),
        ({"objective": "label"}, own, None),
        ({"generations": 0}, own, None),
    ],
)
def test_what_auto_picks_and_says(changes: dict[str, Any], arguments: Callable[[], Any], said: str | None) -> None:
    observer = Heard()
    run(config(**{"generations": 1, **changes}), observer=observer, **arguments())
    assert len(observer.said) == (said is not None)
    assert said is None or observer.said[0][1].startswith(said)


def test_auto_counts_views_and_reuse(tmp_path: Path) -> None:
    """72 images in 9 views: of 2 epochs few come twice; of 24 most do; and of what is kept already all do."""
    observer = Heard()
    run(digits(epochs=2), observer=observer)
    run(digits(epochs=24), observer=observer)
    place = TeacherConfig(cache_directory=str(tmp_path))
    run(digits(epochs=24, teacher=place))
    run(digits("dkpp", epochs=24, teacher=place), observer=observer)
    texts = [text for _, text in observer.said]
    # 72 images, 64 of them an epoch: 16/9 shows in 2 epochs, 9 (1 - (8/9)^(16/9)) = 1.70 views; 21.3 shows in 24, 8.27
    assert texts[0] == "live: 2 epochs show 1.7 of 9 views of an image: 5% fewer forward passes than live"
    assert texts[1].startswith("cache: 24 epochs show 8.27 of 9 views of an image: 61% fewer forward passes than live")
    assert texts[2].startswith(
        "cache: 24 epochs show 8.27 of 9 views of an image, 100% of these are kept already: 100% fewer forward passes"
    )


def test_what_is_kept_is_counted_view_by_view(tmp_path: Path) -> None:
    """Of one teacher: 2 epochs of some order, then 24 of the same, which begin so, then 12 of another, twice."""
    place, kept = TeacherConfig(cache_directory=str(tmp_path)), 0
    for seed, steps in ((5, 8), (5, 96), (6, 48), (6, 48)):
        settings = digits(max_steps=steps, teacher=place)
        task = make_task(settings, torch.device("cpu"))
        loader = task.train(seed)
        teacher, said = choose_teacher(task.network(1), settings, task, loader, ["ban"], None, bytes(8))
        assert isinstance(teacher, CachedTeacher)
        assert said is not None
        served = itertools.chain.from_iterable(map(loader.epoch, range(24)))
        for batch in itertools.islice(served, steps):
            teacher.prepare([batch])
        teacher.close()
        before, kept = kept, sum(count_rows(path) for path in tmp_path.iterdir())
        assert (" of these are kept already: " in said) == (before > 0)
        if before:
            assert f"{1 - (kept - before) / (steps * 16):.0%} fewer forward passes than live" in said
    assert kept == before


def test_auto_goes_live_where_the_disk_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2000))
    observer = Heard()
    run(config(generations=1), out=tmp_path / "a", observer=observer, **own())
    assert "live: a cache of its outputs needs about 1.15 kB, and 2 kB are free in" in observer.said[0][1]
    with pytest.raises(OptionError, match="use --cache-dtype fp16, another --cache-dir, or live") as caught:
        run(config(generations=1, teacher=CACHE), out=tmp_path / "b", **own())
    assert caught.value.field == "teacher.mode"
    assert not (tmp_path / "b").exists()


def test_what_cannot_be_kept_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="a DataLoader's samples may be augmented in endless ways") as caught:
        run(config(teacher=CACHE), out=tmp_path / "run", **own(train=loader()))
    assert caught.value.field == "teacher.mode"
    (tmp_path / "file").write_text("precious")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OptionError, match="file is not a directory") as caught:
            run(config(teacher=TeacherConfig(cache_directory=str(place))), out=tmp_path / "run", **own())
        assert caught.value.field == "teacher.cache_directory"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


ANOTHER: dict[str, dict[str, Any]] = {
    "precision": {"amp": "bf16"},
    "kernels": {"step": "compile"},
    "layout": {"channels_last": True},
    "batch, by which kernels are chosen": {"batch_size": 12},
    "views": {"data": DataConfig(name="digits", limit_train=72, augmentation="none")},
    "borders": {"data": DataConfig(name="digits", limit_train=72, padding="zero")},
    "images": {"data": DataConfig(name="digits", limit_train=70)},
    "rounding": {"teacher": TeacherConfig(mode="cache", cache_dtype="bf16")},
    "batch norm": {"teacher": TeacherConfig(mode="cache", fold="on")},
}


def test_what_a_cache_is_known_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the bits of a row depend on makes it another cache; what they don't does not."""
    monkeypatch.setattr("ban_fast.training.teacher_choice.compiled", lambda forward: forward)
    weights = [models.create("convnet-8", 10, in_channels=1) for _ in range(2)]

    def place(network: nn.Module, changes: dict[str, Any]) -> str:
        settings = digits(**{"teacher": CACHE, **changes})
        task = make_task(settings, torch.device("cpu"))
        teacher, _ = choose_teacher(network, settings, task, task.train(0), ["ban"], tmp_path, bytes(8))
        assert isinstance(teacher, CachedTeacher)
        rows = teacher._rows
        teacher.close()
        assert isinstance(rows, FileRows)
        return rows.path.name

    own = place(weights[0], {})
    assert place(weights[0], {"seed": 5, "epochs": 3, "objective": "dkpp", "step": "eager"}) == own
    others = {"weights": place(weights[1], {})} | {name: place(weights[0], each) for name, each in ANOTHER.items()}
    for name, target, value in (
        ("processor", "ban_fast.training.cache_worth.device_name", lambda device: "another, AVX2"),
        ("torch", "torch.__version__", "2.0.0"),
    ):
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(target, value)
            others[name] = place(weights[0], {})
    assert place(weights[0], {}) == own
    assert len({own, *others.values()}) == 1 + len(others)


def test_double_precision_logits_are_not_rounded_unasked() -> None:
    class Double(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x).double()

    observer = Heard()
    run(config(generations=1), observer=observer, **own(model=Double))
    assert observer.said[0][1] == "live: its logits are float64, which fp32 rounds"
    with pytest.raises(OptionError, match="logits are float64, which fp32 rounds; use live"):
        run(config(generations=1, teacher=CACHE), **own(model=Double))


def test_kernels_that_are_not_batch_invariant() -> None:
    """A growth of 4 channels fills no vector: on some CPUs an image's logits move by an ulp with its neighbours.

    Then "auto" stays live. Who asks for the cache has logits within rounding: some ulp of 6e-8 a layer, in 5 steps.
    """
    changes: dict[str, Any] = {"model": ModelConfig(name="densenet-bc-10-4"), "epochs": 12}
    observer = Heard()
    picked = run(digits(**changes), observer=observer).generations[1]["teacher"]["mode"]
    same_bits = "depend on the other images" not in observer.said[0][1]
    assert picked == ("cache" if same_bits else "live")
    kept = run(digits(teacher=CACHE, max_steps=5, **changes), observer=observer)
    live = run(digits(teacher=LIVE, max_steps=5, **changes))
    assert ("the same bits as live" in observer.said[1][1]) == same_bits
    x = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(kept.models[1](x), live.models[1](x), rtol=1e-4, atol=1e-4)


# A choice that was made


def free(monkeypatch: pytest.MonkeyPatch, space: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=space))


def stopped(path: Path, teacher: TeacherConfig, question: int = 24 * 5 + 70) -> Config:
    """A run that was stopped in its student, by default when nearly all views were seen."""
    settings = digits(teacher=teacher)
    with pytest.raises(Interrupted):
        run(settings, out=path, should_stop=StopAt(question))
    return settings


def test_rows_that_are_there_need_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resumed, and by another run, on a disk that they filled. What is missing still needs some."""
    place = TeacherConfig(mode="cache", cache_directory=str(tmp_path / "caches"))
    settings = stopped(tmp_path / "a", place)
    early = stopped(tmp_path / "b", CACHE, 24 * 5 + 2)
    free(monkeypatch, 5000)  # a fifth of all rows
    run(settings, out=tmp_path / "a", resume=True)
    free(monkeypatch, 0)
    again = run(digits("dkpp", teacher=place), out=tmp_path / "c").generations[1]["teacher"]
    assert (again["mode"], again["forward_images"]) == ("cache", 0)
    free(monkeypatch, 2000)
    with pytest.raises(OptionError, match=r"2 kB are free in .*; free some, or use another --cache-dir$"):
        run(early, out=tmp_path / "b", resume=True)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_auto_does_not_change_what_it_rounds(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where room is gone, nor where there is some by now, or a place with a name."""
    auto = TeacherConfig(cache_dtype=dtype)
    run(digits(teacher=auto), out=tmp_path / "cached")
    run(digits(teacher=LIVE), out=tmp_path / "live")
    settings = stopped(tmp_path / "a", auto, 24 * 5 + 20)
    free(monkeypatch, 0)
    run(settings, out=tmp_path / "a", resume=True)
    assert footprint(tmp_path / "a") == footprint(tmp_path / "cached")
    settings = stopped(tmp_path / "b", auto)
    monkeypatch.undo()
    settings.teacher.cache_directory = str(tmp_path / "caches")
    observer = Heard()
    run(settings, out=tmp_path / "b", resume=True, observer=observer)
    assert observer.said == [(1, "live: as this generation began")]
    assert but_for_teachers(footprint(tmp_path / "b")) == but_for_teachers(footprint(tmp_path / "live"))
    assert but_for_teachers(footprint(tmp_path / "a")) != but_for_teachers(footprint(tmp_path / "live"))


def test_a_cache_that_was_given_up_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32 "auto" may go live at any time, with the same bits; one that was moved elsewhere leaves nothing."""
    run(digits(teacher=LIVE), out=tmp_path / "live")
    settings = stopped(tmp_path / "a", TeacherConfig(), 24 * 5 + 20)
    moved = stopped(tmp_path / "b", TeacherConfig(), 24 * 5 + 20)
    for name in ("a", "b"):
        assert list((tmp_path / name / "teacher-cache").glob("*/rows.bin"))
    free(monkeypatch, 0)
    results = run(settings, out=tmp_path / "a", resume=True)
    assert results.generations[1]["teacher"]["mode"] == "live"
    monkeypatch.undo()
    moved.teacher.cache_directory = str(tmp_path / "caches")
    run(moved, out=tmp_path / "b", resume=True)
    for name in ("a", "b"):
        assert not (tmp_path / name / "teacher-cache").exists()
        assert but_for_teachers(footprint(tmp_path / name)) == but_for_teachers(footprint(tmp_path / "live"))
    assert list((tmp_path / "caches").glob("*/rows.bin"))


def test_auto_keeps_its_own_where_another_process_fills_its_cache(tmp_path: Path) -> None:
    """At the beginning, and resumed in fp32; not where rows were rounded. Who asked for the cache can resume.

    Where that is not worth it, it goes live.
    """
    auto = TeacherConfig(cache_directory=str(tmp_path / "caches"))
    half = TeacherConfig(cache_directory=str(tmp_path / "caches"), cache_dtype="fp16")
    started, rounded = stopped(tmp_path / "auto", auto), stopped(tmp_path / "half", half)
    only_cache = digits(teacher=TeacherConfig(mode="cache", cache_directory=str(tmp_path / "caches")))
    observer = Heard()
    held = set((tmp_path / "caches").iterdir())
    locks = [DirectoryLock(folder, "") for folder in held]
    for path, resume in (("auto", True), ("new", False)):
        run(started, out=tmp_path / path, resume=resume, observer=observer)
        ((number, said),) = observer.said
        assert (number, said.partition(":")[0]) == (1, "cache")
        assert f" in {tmp_path / path / 'teacher-cache'}, the same bits as live" in said
        assert said.endswith(f"; another process fills its cache in {tmp_path / 'caches'}")
        assert not (tmp_path / path / "teacher-cache").exists()
        observer.said.clear()
    short = digits(teacher=auto, epochs=2)
    run(short, out=tmp_path / "other")
    (folder,) = set((tmp_path / "caches").iterdir()) - held
    (folder / "index.bin").write_bytes((folder / "index.bin").read_bytes()[:-1])  # whole, it would be read
    locks.append(DirectoryLock(folder, ""))
    run(short, out=tmp_path / "short", observer=observer)
    assert observer.said[0][1].startswith(f"live: another process fills its cache in {tmp_path / 'caches'}; 2 epochs")
    for path, settings in (("half", rounded), ("cache", only_cache)):
        with pytest.raises(UserError, match=r"wait for it, or choose another --cache-dir; --resume takes either$"):
            run(settings, out=tmp_path / path, resume=path == "half")
    for lock in locks:
        lock.release()
    run(only_cache, out=tmp_path / "cache", resume=True)
    for path in ("new", "cache"):
        assert but_for_teachers(footprint(tmp_path / path)) == but_for_teachers(footprint(tmp_path / "auto"))


@pytest.mark.parametrize(
    ("students", "dtype", "said"),
    [
        (("ban", "dkpp"), "fp32", ", the same bits as live"),
        (("ban", "cwtm"), "fp32", ", the same bits as live but for CWTM's confidences, rounded"),
        (("ban", "cwtm"), "fp16", ", rounded"),
        (("cwtm",), "fp32", ", rounded"),
    ],
)
def test_what_is_said_of_precision_and_recorded(students: tuple[str, ...], dtype: str, said: str) -> None:
    """Of fp32 rows nothing is lost to whom learns from them; CWTM has fp32 confidences beside rows of any kind."""
    observer = Heard()
    settings = digits(students=students, teacher=TeacherConfig(mode="cache", cache_dtype=dtype))
    results = run_together(settings, observer=observer)
    assert observer.said[0][1].endswith(said)
    for name, result in results.items():
        rounded = dtype == "fp16" and name != "cwtm"
        assert result.generations[1]["teacher"]["dtype"] == ("float16" if rounded else "float32")


def test_whole_caches_are_open_to_all(tmp_path: Path) -> None:
    """Who needs no other rows reads them while a process holds the cache; who does fills it when that has gone."""
    place = TeacherConfig(mode="cache", cache_directory=str(tmp_path / "caches"))
    run(digits("cwtm", teacher=place), out=tmp_path / "first")
    (folder,) = (tmp_path / "caches").iterdir()
    lock = DirectoryLock(folder, "")
    for name in ("ban", "dkpp", "cwtm"):
        made = run(digits(name, teacher=place), out=tmp_path / name).generations[1]["teacher"]
        assert (made["mode"], made["forward_images"]) == ("cache", 0)
    run(digits(teacher=CACHE), out=tmp_path / "alone")
    assert but_for_teachers(footprint(tmp_path / "ban")) == but_for_teachers(footprint(tmp_path / "alone"))
    more = (folder / "rows.bin").stat().st_size
    (folder / "index.bin").write_bytes((folder / "index.bin").read_bytes()[:-1])
    with pytest.raises(UserError, match="in use by another process"):
        run(digits(teacher=place), out=tmp_path / "more")
    assert (folder / "rows.bin").stat().st_size == more
    lock.release()
    assert run(digits(teacher=place)).generations[1]["teacher"]["forward_images"] > 0


@pytest.mark.parametrize("epochs", [1, 5, 24, 200])
def test_room_that_is_taken_at_once_is_enough(epochs: int) -> None:
    """Rows that orders of several seeds ask for, in one view of an image or nine."""
    for augmentation in ("none", "crop"):
        settings = digits(epochs=epochs, data=DataConfig(name="digits", limit_train=72, augmentation=augmentation))
        task = make_task(settings, torch.device("cpu"))
        fill = Fill.expected(settings, task)
        for seed in range(5):
            loader = task.train(seed)
            assert isinstance(loader, KeyedLoader)
            assert task.views is not None
            shown = [torch.stack(loader.shown(epoch, loader.steps_per_epoch)) for epoch in range(epochs)]
            rows = len(torch.cat(shown, 1).unique(dim=1)[0])
            assert rows <= fill.most <= rows + 4 * rows**0.5
            teacher, _ = choose_teacher(task.network(1), settings, task, loader, ["ban"], None, bytes(8), "cache")
            assert isinstance(teacher, CachedTeacher)
            before = teacher.addresses()
            for epoch in range(epochs):
                for batch in loader.epoch(epoch):
                    teacher.prepare([batch])
            assert teacher.addresses() == before
            assert teacher.known == rows
            if epochs > 5:
                break


def test_a_place_that_has_a_name_stays_wherever_it_is(tmp_path: Path) -> None:
    place = TeacherConfig(mode="cache", cache_directory=str(tmp_path / "run" / "teacher-cache" / "mine"))
    run(digits(teacher=place), out=tmp_path / "run")
    assert list((tmp_path / "run" / "teacher-cache" / "mine").glob("*/rows.bin"))
