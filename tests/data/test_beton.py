"""FFCV's files: what FFCV reads in them, and what is said of those that are not as they should be."""

import importlib.util
import itertools
import os
import resource
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ban_fast import data
from ban_fast.data import beton, checksum
from ban_fast.data.beton import Beton
from ban_fast.data.cifar import CIFAR
from ban_fast.data.dataset import Part
from ban_fast.errors import OptionError, UserError

ffcv_only = pytest.mark.skipif(importlib.util.find_spec("ffcv") is None, reason="FFCV is not installed")


def part_of(count: int, shape: tuple[int, int, int], seed: int = 0) -> Part:
    images = torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Part.of(images, torch.arange(count) % 7)


def written(path: Path, part: Part, what: str = "things train") -> Beton:
    beton.write(path, part, what)
    return Beton(path, part, what, "COMMAND")


# One page; several, with whole and part-filled ones; an image larger than FFCV's own page; one channel; one image.
SHAPES = [(10, (32, 32, 3)), (120, (300, 300, 3)), (3, (1700, 1700, 3)), (30, (8, 8, 1)), (1, (5, 4, 2))]


@pytest.mark.parametrize(("count", "shape"), SHAPES)
def test_what_is_written_can_be_read(tmp_path: Path, count: int, shape: tuple[int, int, int]) -> None:
    part = part_of(count, shape)
    file = written(tmp_path / "x.beton", part)
    ids = torch.randperm(count, generator=torch.Generator().manual_seed(1))
    assert torch.equal(file.read(ids), part.read(ids))
    assert torch.equal(file.read(ids[:1]), part.read(ids[:1]))


@pytest.fixture
def threads() -> Iterator[None]:
    """FFCV sets torch's number of threads, on import too."""
    number = torch.get_num_threads()
    yield
    torch.set_num_threads(number)


@ffcv_only
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("count", "shape"), SHAPES)
def test_ffcv_reads_it_with_no_word_of_ours(tmp_path: Path, count: int, shape: tuple[int, int, int]) -> None:
    from ffcv.loader import Loader

    part = part_of(count, shape)
    written(tmp_path / "x.beton", part)
    served = list(Loader(str(tmp_path / "x.beton"), batch_size=count, num_workers=1, drop_last=False))
    assert len(served) == 1
    images, labels = served[0]
    assert torch.equal(images, part.read(torch.arange(count)))
    assert torch.equal(labels[:, 0], part.labels)


@ffcv_only
@pytest.mark.usefixtures("threads")
def test_the_layout_is_ffcvs() -> None:
    from ffcv import types
    from ffcv.fields import IntField, NDArrayField
    from ffcv.fields.ndarray import NDArrayArgsType

    assert (types.HeaderType, types.ALLOC_TABLE_TYPE) == (beton.HEADER, beton.ALLOCATION)
    assert beton.FIELD.itemsize == types.FieldDescType.itemsize
    assert {n: f[1] for n, f in beton.FIELD.fields.items()} == {n: f[1] for n, f in types.FieldDescType.fields.items()}
    assert NDArrayArgsType == beton.ARRAY
    fields = [NDArrayField(np.dtype(np.uint8), (4, 4, 3)), IntField()]
    assert types.get_metadata_type(fields).itemsize == beton.SAMPLE.itemsize


def test_the_file_is_as_open_to_others_as_any(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    written(tmp_path / "x.beton", part_of(2, (4, 4, 3)))
    assert (tmp_path / "x.beton").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_folder_of_any_name_is_noted(tmp_path: Path) -> None:
    """255 bytes of UTF-8, the longest that there are; escaped they would not fit. And what is no UTF-8."""
    for what in ("é" * 127 + " train 8 x 8", os.fsdecode(b"\xff\xfe train 8 x 8")):
        part = part_of(2, (8, 8, 3))
        assert torch.equal(written(tmp_path / "x.beton", part, what).read(torch.arange(2)), part.read(torch.arange(2)))


def test_progress(tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    path = tmp_path / "x.beton"
    beton.write(path, part_of(120, (300, 300, 3)), "x", lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert len(seen) == 4  # pages of 31 images
    assert {total for _, total in seen} == {path.stat().st_size}


# A bit of: the version, the name of the image's field, the name of the label's, the note, the emptiness behind it, a
# pointer to a sample, the emptiness behind these, a pixel, the emptiness behind the pixels, the table, the last byte.
PLACES = [0, 26, 1068, 1100, 2100, 2110, 3000, 2**23 + 100, 2**24 - 1, 2**24 + 8, -1]


def damage(path: Path, place: int) -> None:
    """Turn one bit, and leave length and time of change as they were."""
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


class TestMistakes:
    def test_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"^there is no .*x\.beton for FFCV to read; write it with `COMMAND`$"):
            Beton(tmp_path / "x.beton", part_of(2, (4, 4, 3)), "things train", "COMMAND")

    @pytest.mark.parametrize("kept", [0, 1, 23, 24, 2000, 2300, 2**20, 2**23 + 100, -1])
    def test_cut_short(self, tmp_path: Path, kept: int) -> None:
        # In the header, behind it, in the descriptors, the rows, the pages, and by the last byte.
        path, part = tmp_path / "x.beton", part_of(10, (8, 8, 3))
        written(path, part)
        path.write_bytes(path.read_bytes()[:kept])
        with pytest.raises(UserError, match=r"x\.beton is cut short.*; write it again with `COMMAND`$"):
            Beton(path, part, "things train", "COMMAND")

    def test_of_another_dataset(self, tmp_path: Path) -> None:
        path, part = tmp_path / "x.beton", part_of(10, (8, 8, 3))
        written(path, part, "cifar10 train 32 x 32")
        with pytest.raises(UserError, match=r"holds cifar10 train 32 x 32, not cifar100 .*; write it with `COMMAND`$"):
            Beton(path, part, "cifar100 train 32 x 32", "COMMAND")

    @pytest.mark.parametrize("what", ["pixel", "label", "count"])
    def test_of_images_that_have_changed(self, tmp_path: Path, what: str) -> None:
        path, part = tmp_path / "x.beton", part_of(10, (8, 8, 3))
        written(path, part)
        images, labels = part.read(torch.arange(10)).clone(), part.labels.clone()
        if what == "pixel":
            images[4, 5, 6, 1] ^= 1
        elif what == "label":
            labels[3] += 1
        else:
            images, labels = images[:9], labels[:9]
        with pytest.raises(UserError, match=r"was written from other images than things train has now; .*`COMMAND`$"):
            Beton(path, Part.of(images, labels), "things train", "COMMAND")

    @pytest.mark.parametrize("place", PLACES)
    def test_damaged(self, tmp_path: Path, place: int) -> None:
        path, part = tmp_path / "x.beton", part_of(10, (8, 8, 3))
        written(path, part)
        damage(path, place)
        with pytest.raises(UserError, match=r"x\.beton (is|was|holds) .*; write it (again )?with `COMMAND`$"):
            Beton(path, part, "things train", "COMMAND")

    @pytest.mark.parametrize("content", [b"x" * 10_000, bytes(10_000)])
    def test_no_file_of_ours(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "x.beton").write_bytes(content)
        with pytest.raises(UserError, match=r"is not a file of this version of ban-fast's; write it .*`COMMAND`$"):
            Beton(tmp_path / "x.beton", part_of(10, (8, 8, 3)), "things train", "COMMAND")

    def test_a_directory(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"^cannot read .*: Is a directory"):
            Beton(tmp_path, part_of(10, (8, 8, 3)), "things train", "COMMAND")

    def test_an_image_larger_than_any_page(self, tmp_path: Path) -> None:
        part = Part(torch.zeros(1, dtype=torch.int64), (30_000, 30_000, 3), part_of(1, (1, 1, 1)).read, lambda: "")
        with pytest.raises(UserError, match=r"^an image of 30000 x 30000 pixels does not fit FFCV's pages of 2 GiB"):
            beton.write(tmp_path / "x.beton", part, "things train")
        assert list(tmp_path.iterdir()) == []

    def test_no_room(self, tmp_path: Path) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
        try:
            with pytest.raises(UserError, match=r"^cannot write .*x\.beton: File too large; make room there"):
                beton.write(tmp_path / "x.beton", part_of(10, (8, 8, 3)), "things train")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert list(tmp_path.iterdir()) == []


def identity(path: Path) -> tuple[int, int]:
    """Another one for a file that was written anew."""
    return path.stat().st_ino, path.stat().st_mtime_ns


class TestPrepare:
    def test_cifar(self, tmp_path: Path, make_cifar: Callable[..., Path]) -> None:
        home = make_cifar(CIFAR["cifar100"], tmp_path)
        paths = [home / "cifar100-train-32.beton", home / "cifar100-test-32.beton"]
        assert data.prepare_ffcv("cifar100", tmp_path) == paths
        before = [identity(path) for path in paths]
        assert data.prepare_ffcv("cifar100", home) == paths
        assert [identity(path) for path in paths] == before, "whole files are kept"

    def test_what_is_damaged_is_written_anew(self, tmp_path: Path, make_cifar: Callable[..., Path]) -> None:
        make_cifar(CIFAR["cifar100"], tmp_path)
        train, test = data.prepare_ffcv("cifar100", tmp_path)
        content = train.read_bytes()
        train.write_bytes(content[:-1])
        kept = identity(test)
        data.prepare_ffcv("cifar100", tmp_path)
        assert train.read_bytes() == content
        assert identity(test) == kept
        for place in (1100, 2**23 + 100, -1):
            damage(train, place)
            data.prepare_ffcv("cifar100", tmp_path)
            assert train.read_bytes() == content
        assert identity(test) == kept

    def test_the_files_of_a_folder_lie_in_it_or_where_they_are_asked_for(self, tmp_path: Path) -> None:
        pets, elsewhere = tmp_path / "pets", tmp_path / "else" / "where"
        for part, name in itertools.product(("train", "test"), ("cat", "dog")):
            (pets / part / name).mkdir(parents=True)
            Image.new("RGB", (8, 8), (0, 0, 3 * len(part))).save(pets / part / name / "x.png")
        named = ["pets-train-32.beton", "pets-test-32.beton"]
        for directory in (None, tmp_path, pets):
            assert data.prepare_ffcv(str(pets), directory) == [pets / name for name in named]
        assert data.prepare_ffcv("pets", tmp_path) == [pets / name for name in named]
        assert data.prepare_ffcv(str(pets), elsewhere) == [elsewhere / name for name in named]
        assert {path.name for path in pets.iterdir()} == {"train", "test", *named}

    def test_digits(self, tmp_path: Path) -> None:
        paths = data.prepare_ffcv("digits", tmp_path / "new" / "place")
        assert [path.name for path in paths] == ["digits-train-8.beton", "digits-test-8.beton"]
        assert {path.parent for path in paths} == {tmp_path / "new" / "place"}

    def test_what_is_not_there(self, tmp_path: Path, make_cifar: Callable[..., Path]) -> None:
        with pytest.raises(UserError, match="unknown dataset 'cifra10'; did you mean 'cifar10'"):
            data.prepare_ffcv("cifra10", tmp_path)
        with pytest.raises(OptionError, match=r"cifar100 has images of 32 pixels, got 64"):
            data.prepare_ffcv("cifar100", make_cifar(CIFAR["cifar100"], tmp_path), image_size=64)


def await_another_time(path: Path) -> None:
    """Until a change of the file is of another time than its last: file systems' clocks go by steps of up to 10 ms."""
    probe = path.with_name("probe")
    while True:
        probe.write_bytes(b"")
        if probe.stat().st_ctime_ns > path.stat().st_ctime_ns:
            probe.unlink()
            return


class TestStamp:
    """A file that is large is read through once."""

    @pytest.fixture(autouse=True)
    def large(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(checksum, "SUMMED_ALWAYS", 0)

    @pytest.fixture
    def summed(self, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
        """The files that were."""
        paths: list[Path] = []
        monkeypatch.setattr(
            checksum, "checksum", lambda path, *rest, real=checksum.checksum: (paths.append(path), real(path, *rest))[1]
        )
        return paths

    def test_read_once_and_after_every_change(self, tmp_path: Path, summed: list[Path]) -> None:
        path, part = tmp_path / "x.beton", part_of(10, (8, 8, 3))
        written(path, part)
        stamp = tmp_path / "x.beton.checked"
        assert stamp.is_file()
        assert summed == []
        stamp.unlink()
        for _ in range(2):
            Beton(path, part, "things train", "COMMAND")
        assert summed == [path]
        await_another_time(path)
        path.touch()
        for _ in range(2):
            Beton(path, part, "things train", "COMMAND")
        assert summed == [path] * 2
        Beton(path, part, "things train", "COMMAND", trust_stamp=False)
        assert summed == [path] * 3
        await_another_time(path)
        damage(path, -1)
        for _ in range(2):
            with pytest.raises(UserError, match="is damaged"):
                Beton(path, part, "things train", "COMMAND")
        assert summed == [path] * 5

    @pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"0 0 0\n", None])
    def test_one_that_says_nothing(self, tmp_path: Path, summed: list[Path], content: bytes | None) -> None:
        path, part = tmp_path / "x.beton", part_of(10, (8, 8, 3))
        written(path, part)
        stamp = tmp_path / "x.beton.checked"
        stamp.unlink()
        if content is None:
            stamp.mkdir()  # which can't be written either
        else:
            stamp.write_bytes(content)
        Beton(path, part, "things train", "COMMAND")
        assert summed == [path]


def test_a_checksum_is_of_every_byte_but_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksum, "_AT_ONCE", 1000)
    path, seen = tmp_path / "x", []
    content = bytes(torch.randint(0, 256, (2500,), dtype=torch.uint8).tolist())
    path.write_bytes(content)
    whole = checksum.checksum(path, slice(10, 20), lambda done, total: seen.append((done, total)))
    assert seen == [(1000, 2500), (2000, 2500), (2500, 2500)]
    for place in range(0, 2500, 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ 128]) + content[place + 1 :])
        assert (checksum.checksum(path, slice(10, 20)) == whole) == (10 <= place < 20), place
    path.write_bytes(content + b"\0")
    assert checksum.checksum(path, slice(10, 20)) != whole


class TestLoad:
    @ffcv_only
    def test_a_file_that_is_not_there_names_the_command_that_writes_it(
        self, tmp_path: Path, make_cifar: Callable[..., Path]
    ) -> None:
        home = make_cifar(CIFAR["cifar100"], tmp_path / "my data")
        with pytest.raises(UserError) as caught:
            data.load_stored("cifar100", ffcv=True, directory=home.parent)
        assert f"there is no {home / 'cifar100-train-32.beton'}" in str(caught.value)
        command = shlex.split(str(caught.value).split("`")[1])
        assert command == ["ban-fast", "prepare", "cifar100", "--format", "ffcv", "--data-dir", str(home.parent)]

    @ffcv_only
    def test_another_datasets_file_under_this_ones_name(self, tmp_path: Path, make_cifar: Callable[..., Path]) -> None:
        make_cifar(CIFAR["cifar10"], tmp_path)
        make_cifar(CIFAR["cifar100"], tmp_path)
        theirs, _ = data.prepare_ffcv("cifar10", tmp_path)
        ours, _ = data.prepare_ffcv("cifar100", tmp_path)
        ours.write_bytes(theirs.read_bytes())
        with pytest.raises(UserError, match="holds cifar10 train 32 x 32, not cifar100 train 32 x 32; write it with"):
            data.load_stored("cifar100", ffcv=True, directory=tmp_path)

    def test_ffcv_that_is_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(
            OptionError, match=r"data\.loader: FFCV is not installed; .*libopencv-dev.*pip install ffcv"
        ):
            data.load_stored("digits", ffcv=True)

    def test_what_is_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for there, said in (({"ffcv", "distutils"}, None), ({"ffcv"}, "pip install setuptools"), (set(), "apt-get")):
            monkeypatch.setattr(importlib.util, "find_spec", lambda name, there=there: name if name in there else None)
            reason = beton.missing()
            assert reason is None if said is None else reason is not None and said in reason

    def test_an_ffcv_that_cannot_be_imported(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "ban_fast.data.ffcv_reader", None)
        file = written(tmp_path / "x.beton", part_of(2, (4, 4, 3)))
        with pytest.raises(UserError, match=r"^FFCV cannot be imported: .*; install it again, or use another loader$"):
            file.reader(2)


def test_a_directory_in_its_place(tmp_path: Path) -> None:
    """Said before the images are written, and left as it is."""
    (tmp_path / "digits-train-8.beton").mkdir()
    with pytest.raises(UserError, match=r"^cannot write .*digits-train-8\.beton: it is a directory; move it away$"):
        data.prepare_ffcv("digits", tmp_path)
    part = part_of(2, (2, 2, 3))
    with pytest.raises(UserError, match=r"^cannot read .*: Is a directory; move it away and run `COMMAND`$"):
        Beton(tmp_path / "digits-train-8.beton", part, "digits train 8 x 8", "COMMAND")
    assert [path.name for path in tmp_path.iterdir()] == ["digits-train-8.beton"]
