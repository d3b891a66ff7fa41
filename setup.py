"""Builds `ban_fast/_native` from csrc/ with CMake and Ninja; everything else is in pyproject.toml."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class CMakeBuild(build_ext):
    """Runs CMake once for the one extension. The environment variables BAN_FAST_CUDA=auto|on|off and
    BAN_FAST_CUDA_ARCHS ("80;90") are passed on."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        source = Path(__file__).resolve().parent
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake", "-S", str(source), "-B", str(build), "-G", "Ninja",
            "-DCMAKE_BUILD_TYPE=" + ("Debug" if self.debug else "Release"),
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DBAN_FAST_CUDA={os.environ.get('BAN_FAST_CUDA', 'auto')}",
            f"-DBAN_FAST_CUDA_ARCHS={os.environ.get('BAN_FAST_CUDA_ARCHS', '80;90')}",
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)


setup(ext_modules=[Extension("ban_fast._native", sources=[])], cmdclass={"build_ext": CMakeBuild})
