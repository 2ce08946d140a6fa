"""YAML's own rule that names of one mapping differ, which PyYAML does not keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from .errors import UsageError

_MERGE = "tag:yaml.org,2002:merge"  # the key <<


class NoDuplicates(yaml.SafeLoader):
    """Names of one mapping differ, and are no collections."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            where = f"{key.start_mark.name}: line {key.start_mark.line + 1}"
            if not isinstance(key, yaml.ScalarNode):
                raise UsageError(f"{where}: expected a name before the colon, got a {key.id}")
            if (key.tag, key.value) in seen and key.tag != _MERGE:
                raise UsageError(f"{where}: {key.value!r} is there twice")
            seen.add((key.tag, key.value))
        return node


def refuse_duplicates(path: Path) -> None:
    """Raises UsageError where a name is there twice; whatever else is wrong is for others to say."""
    try:
        with path.open(encoding="utf-8") as file:
            yaml.compose(file, NoDuplicates)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        pass
