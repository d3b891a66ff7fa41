"""The native build: what was installed here, and (slow) wheels built from a copy of the tree with and without CUDA."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from ban_fast import _native

ROOT = Path(__file__).parents[1]
NVCC = shutil.which("nvcc")
TREE = ["ban_fast", "csrc", "CMakeLists.txt", "setup.py", "pyproject.toml", "README.md", "LICENSE"]


def native_sources() -> list[Path]:
    return [path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".h", ".cpp", ".cu", ".cuh"}]


def test_cmake_names_every_source_file() -> None:
    named = set(re.findall(r"csrc/\S+\.(?:cpp|cu)", (ROOT / "CMakeLists.txt").read_text()))
    there = {path.relative_to(ROOT).as_posix() for path in native_sources() if path.suffix in {".cpp", ".cu"}}
    assert named == there


def test_only_the_bindings_know_python_and_nothing_knows_torch() -> None:
    for path in native_sources():
        included = re.findall(r'#include\s*[<"]([^>"]+)', path.read_text())
        foreign = [name for name in included if re.match(r"(torch|ATen|c10|Python\.h|pybind11)", name)]
        assert all(name.startswith("pybind11/") for name in foreign)
        assert not foreign or path.name == "bindings.cpp" or path.parent.name == "python"


def check_cuda_info(info: dict[str, object], *, built: bool, architectures: str = "80,90") -> None:
    assert info["built"] is built
    if not built:
        assert list(info) == ["built"]
        return
    assert isinstance(info["runtime_version"], int)
    assert 12000 <= info["runtime_version"] < 20000
    assert info["architectures"] == architectures


def test_the_installed_extension_says_what_it_was_built_with() -> None:
    info = _native.cuda_info()
    if info["built"]:
        assert isinstance(info["devices"], int)
        if not torch.cuda.is_available():
            assert info["devices"] == 0
    else:
        assert list(info) == ["built"]


def test_an_unknown_cuda_setting_is_refused(tmp_path: Path) -> None:
    command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path), "-G", "Ninja", "-DBAN_FAST_CUDA=maybe"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode != 0
    assert "BAN_FAST_CUDA is 'maybe': choose auto, on or off" in done.stderr


def test_a_missing_extension_is_an_import_error_that_says_what_to_do() -> None:
    script = (
        "import sys; sys.modules['ban_fast._native'] = None\n"
        "try:\n    import ban_fast.backends.native\n"
        "except ImportError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert "ban_fast._native cannot be imported" in done.stdout
    assert "pip install" in done.stdout


def test_an_extension_built_from_other_sources_is_refused() -> None:
    script = (
        "import ban_fast._native as native\nnative.INTERFACE -= 1\n"
        "from ban_fast.backends import dispatch\nprint(dispatch.available()['native'])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert "built from other sources than these: run `pip install -e .` again" in done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a source distribution holds, without what was built in place."""
    copy = tmp_path_factory.mktemp("tree")
    for name in TREE:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            shutil.copy(source, copy / name)
    return copy


def build_wheel(tree: Path, out: Path, cuda: str) -> subprocess.CompletedProcess[str]:
    """`pip wheel` with the environment's own build tools: what isolation would install is in the extra [test].

    For one architecture, in half the time: what was installed here is for both.
    """
    shutil.rmtree(tree / "build", ignore_errors=True)
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", str(out), str(tree)]
    environment = {**os.environ, "BAN_FAST_CUDA": cuda, "BAN_FAST_CUDA_ARCHS": "90"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3000)


def installed_info(wheels: Path, into: Path) -> dict[str, object]:
    """cuda_info() of the wheel's extension, in a process of its own that sees no GPU."""
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(into)
    script = (
        "import json, ban_fast._native as native\n"
        f"assert native.__file__.startswith({str(into)!r}), native.__file__\n"
        "assert native.instruction_set()\n"
        "print(json.dumps(native.cuda_info()))"
    )
    environment = {**os.environ, "PYTHONPATH": str(into), "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("BAN_FAST_ISA", None)
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=into, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    info: dict[str, object] = json.loads(done.stdout)
    return info


@pytest.mark.slow
@pytest.mark.parametrize("cuda", ["off", "auto"])
def test_a_wheel(tree: Path, tmp_path: Path, cuda: str) -> None:
    done = build_wheel(tree, tmp_path / "wheels", cuda)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    info = installed_info(tmp_path / "wheels", tmp_path / "installed")
    built = cuda == "auto" and NVCC is not None
    check_cuda_info(info, built=built, architectures="90")
    if built:
        assert info["devices"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(("cuda", "refused"), [("on", True), ("auto", False)])
def test_without_a_cuda_compiler(tmp_path: Path, cuda: str, refused: bool) -> None:
    done = configure(tmp_path, cuda, CUDACXX=str(tmp_path / "no-such-nvcc"))
    assert (done.returncode != 0) == refused, done.stderr
    message = " ".join(done.stderr.split())  # CMake breaks lines
    assert ("put nvcc on the PATH, or set BAN_FAST_CUDA=off" in message) == refused


def configure(build: Path, cuda: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pybind11", "--cmakedir"]
    pybind11 = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    command = ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", f"-DBAN_FAST_CUDA={cuda}"]
    command += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11}"]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_no_instruction_set_leaks_into_shared_functions(tmp_path: Path) -> None:
    """An inline function compiled for AVX-512 and merged by the linker with another's copy is a SIGILL elsewhere."""
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("needs binutils' nm")
    assert configure(tmp_path, "off").returncode == 0
    subprocess.run(["cmake", "--build", str(tmp_path)], check=True)
    for isa in ("baseline", "avx2", "avx512"):
        objects = list((tmp_path / "CMakeFiles" / f"row_kernels_{isa}.dir").rglob("*.o"))
        if not objects:
            continue  # another architecture
        listing = subprocess.run([nm, "-C", *map(str, objects)], check=True, capture_output=True, text=True).stdout
        weak = re.findall(r"^[0-9a-f]+ [WVu] (.*)$", listing, re.MULTILINE)
        assert [name for name in weak if f"ban_fast::{isa}::" not in name] == []
