"""setuptools as the build backend, which asks for nvcc from PyPI as well where the machine has none that works.

Only builds in an environment of their own ask; `--no-build-isolation` takes what is installed.
"""

from __future__ import annotations

from typing import Any

import native_build
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *native_build.extra_requirements()]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *native_build.extra_requirements()]
