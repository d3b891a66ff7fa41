"""Files that are whole or not there: state.pt, model.safetensors and the JSON of a run directory."""

import contextlib
import errno
import hashlib
import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ..errors import UserError

TEMPORARY = ".tmp"
"""What the name of a file ends in while it is being written."""


def make_directories(path: Path) -> list[Path]:
    """Make a directory and its parents; those that were not there, outermost first."""
    missing = [parent for parent in [*reversed(path.parents), path] if not parent.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {path}: {error.strerror}") from error
    return missing


def write_file(path: Path, data: bytes | memoryview) -> None:
    """Replace the file by `data` at once: temporary file, fsync, rename, fsync of the directory.

    UserError where that fails, with whatever was there before untouched and no temporary file left.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_directory(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UserError(f"cannot write {path}: {error.strerror}") from error
        raise


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that has no fsync of directories
            raise
    finally:
        os.close(descriptor)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """`value`, indented. NaN and infinity, which JSON has not, are a ValueError."""
    write_file(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a training state of tensors and plain Python values."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_file(path, buffer.getbuffer())


def load_state(path: Path) -> dict[str, Any]:
    """Read a training state onto the CPU, `weights_only`. UserError for a damaged file."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not check the archive's sums
            if archive.testzip() is not None:
                raise zipfile.BadZipFile
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:  # a damaged archive or pickle fails in torch in a dozen ways
        raise UserError(
            f"{path} is cut short or corrupted; delete it to train its generation again from the start"
        ) from error
    if not isinstance(state, dict):
        raise UserError(f"{path} is corrupted: not a training state")
    return state


def save_model(path: Path, network: nn.Module) -> str:
    """Write the network's state_dict as safetensors and return the file's SHA-256."""
    tensors: dict[str, Tensor] = {}
    written: set[int] = set()
    for name, value in network.state_dict().items():
        if not isinstance(value, Tensor):
            raise UserError(f"cannot write {path}: the network's state has {name!r}, a {type(value).__name__}")
        tensor = value.detach().cpu().contiguous()
        # safetensors refuses tensors that share memory, tied weights for one: each gets its own
        tensors[name] = tensor.clone() if tensor.untyped_storage().data_ptr() in written else tensor
        written.add(tensors[name].untyped_storage().data_ptr())
    data = safetensors.torch.save(tensors)
    write_file(path, data)
    return hashlib.sha256(data).hexdigest()


def load_model(path: Path, network: nn.Module, sha256: str | None = None) -> None:
    """Fill `network` with a saved state_dict.

    UserError where the file is missing, damaged, not the one with that SHA-256, or of another network.
    """
    remedy = "put it back, or delete results.json, and `ban-fast train --resume` makes both again from the checkpoints"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; {remedy}") from error
    try:
        tensors = safetensors.torch.load(data)
    except Exception as error:  # SafetensorError, and what torch says of a header that is nonsense
        raise UserError(f"{path} is cut short or corrupted: not safetensors; {remedy}") from error
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise UserError(
            f"{path} is not the file that the run wrote: its SHA-256 differs from the one in results.json; {remedy}"
        )
    wanted = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if wanted != found:
        name = next(n for n in sorted(wanted.keys() | found.keys()) if wanted.get(n) != found.get(n))
        raise UserError(
            f"{path} is of another network: {name} is {found.get(name, 'not there')}, "
            f"here {wanted.get(name, 'not there')}"
        )
    network.load_state_dict(tensors)
