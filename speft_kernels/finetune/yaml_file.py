"""Reading a YAML file of settings, in which nothing stands twice."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError, shown

# To the base of 60, with a leading zero to that of 8, or in groups; 0x1F is no surprise.
_ODD_NUMBER = re.compile(r"[:_]|^[-+]?0\d+$")


def read_yaml(path: Path) -> Any:
    """What a YAML file holds. Raises ConfigError for a missing file and for broken YAML."""
    import yaml

    try:
        return yaml.load(path.read_text(encoding="utf-8"), _loader())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; --config takes a YAML file") from None
    # Of a date that does not exist or an endless number, and of lists nested too deep.
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path}: cannot be read as YAML: {reason}") from error


def _loader() -> Any:
    """PyYAML's safe loader without what it takes in silence: the last of two entries with one key,
    and YAML 1.1's numbers that read otherwise elsewhere (1:30 is 90 in it, 010 is 8, 1_0 is 10).

    Mappings that are merged (<<) out of others many times over take no more than their keys.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_yaml_int(self, node: Any) -> Any:
            return _plain(node, super().construct_yaml_int(node))

        def construct_yaml_float(self, node: Any) -> Any:
            return _plain(node, super().construct_yaml_float(node))

        def flatten_mapping(self, node: Any) -> None:
            known = set()
            for key, _ in node.value:
                if _identity(key) in known:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {shown(key.value)} stands twice", key.start_mark
                    )
                known.add(_identity(key))
            super().flatten_mapping(node)
            # The last entry of a key counts, as in the mapping that is made of them.
            node.value = list({_identity(pair[0]): pair for pair in node.value}.values())

    def _identity(key: Any) -> tuple[Any, Any]:
        return (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else (None, id(key))

    def _plain(node: Any, number: Any) -> Any:
        if _ODD_NUMBER.search(node.value):
            raise yaml.constructor.ConstructorError(
                None,
                None,
                f"{shown(node.value)} is the number {shown(number)} to YAML: write that, or put "
                "quotes around a text",
                node.start_mark,
            )
        return number

    Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)
    Loader.add_constructor("tag:yaml.org,2002:float", Loader.construct_yaml_float)
    return Loader


def one_name_each(where: str, loaded: Mapping[Any, Any]) -> dict[str, Any]:
    """`loaded` with `-` and `_` alike in its keys. Raises ConfigError where that makes two one."""
    settings: dict[str, Any] = {}
    for key, value in loaded.items():
        name = (key if isinstance(key, str) else shown(key)).replace("-", "_")
        if name in settings:
            raise ConfigError(f"{where}: {shown(name)} stands twice, with '-' and with '_'")
        settings[name] = value
    return settings
