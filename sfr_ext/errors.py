"""The one sentence that every refused argument gets: who asks, which argument, what was wanted, what came."""

from __future__ import annotations

from typing import Any, NoReturn


def refuse(error: type[Exception], where: str, argument: str, wanted: str, came: Any) -> NoReturn:
    raise error(f"sfr_ext.{where}: expected {argument} {wanted}, got {came}")
