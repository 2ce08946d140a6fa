"""What the tests of the GPU model share."""

from __future__ import annotations

import subprocess
from pathlib import Path

import cuda_toolchain
import native_build
import pytest
from gpu_model import ptx

HERE = Path(__file__).resolve().parent


class Entries(dict[str, ptx.Entry]):
    arch: str


@pytest.fixture(scope="session", params=["75", "90"])
def intrinsics(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Entries:
    """The kernels of intrinsics.cu in PTX, for the oldest architecture and for a newer one."""
    try:
        cuda = cuda_toolchain.find_cuda(native_build.find_toolchain().cxx)
    except cuda_toolchain.NoCuda as reason:
        pytest.skip(str(reason))
    path = tmp_path_factory.mktemp("ptx") / "intrinsics.ptx"
    flags = ["-O3", "-std=c++17", "-ptx", f"-arch=compute_{request.param}", f"-I{HERE.parents[1] / 'csrc'}"]
    subprocess.run([cuda.nvcc, *cuda.host, *flags, str(HERE / "intrinsics.cu"), "-o", str(path)], check=True)
    entries = Entries(ptx.parse(path.read_text()))
    entries.arch = request.param
    return entries
