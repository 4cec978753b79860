"""What users write in YAML: settings, recipes and prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from novelret.errors import UserError


class _OnceOnly(yaml.SafeLoader):
    """YAML whose keys stand once in a mapping: the last of two would silently win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: list[Any] = []
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":  # <<: *others, whose keys give way to those written out
                continue
            keys.append(self.construct_object(key, deep=True))
            if keys[-1] in keys[:-1]:
                again = f"{keys[-1]!r} stands there twice"
                raise yaml.constructor.ConstructorError(None, None, again, key.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """Read a YAML file.

    Raises:
        UserError: it is missing, not YAML, or has a key twice.
    """
    try:
        with path.open(encoding="utf-8") as file:  # which is named in what is said of it
            return yaml.load(file, _OnceOnly)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: not readable as YAML ({' '.join(str(error).split())})") from None
