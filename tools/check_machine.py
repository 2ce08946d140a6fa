"""Says in one sentence what a machine lacks before `make` downloads anything. Runs on any Python 3."""

import os
import sys

if sys.version_info < (3, 10):  # noqa: UP036
    sys.exit(
        f"sfr_ext needs Python 3.10 or newer, but {sys.executable} is {sys.version_info[0]}."
        f"{sys.version_info[1]}. Name a newer one: make PYTHON=python3.12 ..."
    )

try:
    import ensurepip  # noqa: F401
    import venv  # noqa: F401
except ImportError:
    sys.exit("Python's venv module is missing (Debian and Ubuntu: apt-get install python3-venv)")

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "backend"))
import native_build  # noqa: E402

try:
    native_build.find_toolchain()
    native_build.python_include()
except native_build.BuildError as error:
    sys.exit(f"sfr_ext: {error}")
