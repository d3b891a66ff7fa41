"""Downloads of the published archives: checked against their sums, then unpacked in one piece or not at all."""

import contextlib
import hashlib
import http.client
import os
import shutil
import tarfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import UserError
from . import cifar
from .cifar import Published
from .scratch import remove_abandoned, scratch

Progress = Callable[[int, int | None], None]
"""Called with the bytes that have come and, where the server says, the bytes that will."""

_CHUNK = 1 << 20
_TIMEOUT_SECONDS = 60
"""Without a byte from the server."""
_BY_HAND = "or get the archive elsewhere, unpack it and name its directory with --data-dir"


def fetch(published: Published, directory: Path, progress: Progress | None = None) -> Path:
    """The directory of the dataset under `directory` (its own directory or its parent), downloaded if it isn't there.

    What is there already is read from end to end and left as it is; its sum isn't asked for.

    Raises:
        UserError: no network, another sum than the published one, no space, or a damaged file where the dataset should
            be. Nothing of an attempt that failed stays behind.
    """
    parent = directory.parent if directory.name == published.directory else directory
    remove_abandoned(parent)
    there = cifar.locate(published, directory)
    if there is not None:
        cifar.read(published, there)
        return there

    def fill(place: Path) -> None:
        archive = place.with_name("archive")
        download(published.url, published.md5, archive, progress)
        _unpack(published, archive, place)
        cifar.read(published, place)

    return in_one_piece(published.name, parent / published.directory, fill)


def in_one_piece(name: str, place: Path, fill: Callable[[Path], None]) -> Path:
    """The directory `place`, made and filled elsewhere beside it, then renamed; of a failure nothing stays."""
    parent = place.parent
    missing = [directory for directory in (parent, *parent.parents) if not directory.exists()]
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with scratch(parent) as beside:
            unfinished = beside / place.name
            unfinished.mkdir()
            fill(unfinished)
            os.replace(unfinished, place)
    except BaseException as error:
        with contextlib.suppress(OSError):
            for directory in missing:
                directory.rmdir()
        if isinstance(error, OSError):
            raise UserError(
                f"cannot write {name} to {parent}: {error.strerror or error}; "
                "make room there or name another place with --data-dir"
            ) from None
        raise
    return place


def download(url: str, md5: str, path: Path, progress: Progress | None = None) -> None:
    """Write what is published at `url` to `path`. UserError where it doesn't come, or has another sum."""
    digest = hashlib.md5(usedforsecurity=False)
    done, total = 0, None
    with path.open("wb") as out:
        for chunk, total in _receive(url):
            digest.update(chunk)
            out.write(chunk)
            done += len(chunk)
            if progress is not None:
                progress(done, total)
    if digest.hexdigest() != md5:
        cut = f" ({done} of {total} bytes came)" if total is not None and done != total else ""
        raise UserError(
            f"what came from {url} has md5 {digest.hexdigest()}, not the published {md5}{cut}; try again, {_BY_HAND}"
        )


def _receive(url: str) -> Iterator[tuple[bytes, int | None]]:
    """The body in pieces, each with the length of the whole, if the server says it."""
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response:
            length = response.headers.get("Content-Length")
            total = int(length) if length and length.isdecimal() else None
            while chunk := response.read(_CHUNK):
                yield chunk, total
    except urllib.error.HTTPError as error:
        raise UserError(
            f"cannot download {url}: HTTP {error.code} {error.reason}; try again later, {_BY_HAND}"
        ) from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or str(error) or type(error).__name__
        raise UserError(f"cannot download {url}: {reason}; check the network, {_BY_HAND}") from None


def _unpack(published: Published, archive: Path, directory: Path) -> None:
    """Copies the dataset's files to names of our own; the archive's paths, links and modes play no part."""
    wanted = {f"{published.directory}/{file}": directory / file for file in published.files}
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                content = tar.extractfile(member) if member.name in wanted and member.isreg() else None
                if content is not None:
                    with content, wanted.pop(member.name).open("wb") as out:
                        shutil.copyfileobj(content, out, _CHUNK)
                        out.flush()
                        os.fsync(out.fileno())
    except tarfile.TarError as error:
        raise UserError(f"cannot unpack the archive from {published.url}: {error}; {_BY_HAND}") from None
    if wanted:
        raise UserError(f"the archive from {published.url} has no file {next(iter(wanted))}; {_BY_HAND}")
