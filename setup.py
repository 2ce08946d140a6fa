"""Hands the compiling to tools/backend/native_build.py; what can be said without code stands in pyproject.toml."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools" / "backend"))

import native_build  # noqa: E402

# Read by sfr_ext/build.py.
CONFIG = Path("sfr_ext", "build_config.json")


class BuildNative(build_ext):
    """Puts the module that ninja built, and a note on how it was built, where setuptools expects them."""

    def build_extension(self, ext: Extension) -> None:
        try:
            module, config = native_build.build(ROOT)
        except native_build.BuildError as error:
            raise CompileError(f"sfr_ext: {error}") from None
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # Replaced, not overwritten: a process that has the old module loaded keeps it whole.
        fresh = target.with_name(target.name + ".new")
        shutil.copy2(module, fresh)
        os.replace(fresh, target)
        Path(self.build_lib, CONFIG).write_text(json.dumps(config, indent=2) + "\n")

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        shutil.copy2(Path(self.build_lib, CONFIG), ROOT / CONFIG)

    def get_outputs(self) -> list[str]:
        return [*super().get_outputs(), str(Path(self.build_lib, CONFIG))]


setup(ext_modules=[Extension("sfr_ext._C", sources=[])], cmdclass={"build_ext": BuildNative})
