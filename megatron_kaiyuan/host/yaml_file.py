"""YAML files that people wrote: no key twice, no more nodes than a person can mean, no object but plain data."""

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

__all__ = ["NotYamlError", "read_yaml"]

_MOST_BYTES = 1 << 24
_MOST_NODES = 1 << 20
"""With aliases and merge keys written out: a few lines of them can stand for more data than any memory holds."""
# PyYAML lets errors of Python's own through where a value is not of the type it looks like, such as 2024-13-45
_ERRORS = (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError)


class NotYamlError(ValueError):
    """What a file holds instead of YAML."""


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML loader that refuses a key given twice, of which PyYAML silently keeps the last.

    A plan that names a source twice is a mistake.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *anchor` is resolved by the parent class
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(
                    None, None, f"a key is a {type(key).__name__}; keys are names", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} occurs twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> Any:
    """Return the plain data of a YAML file, None for an empty one.

    Raises:
        OSError: it cannot be read.
        NotYamlError: it is too large, is not UTF-8 or not YAML, names a key twice, or its aliases stand for too much.
    """
    with Path(path).open("rb") as stream:
        raw = stream.read(_MOST_BYTES + 1)
    if len(raw) > _MOST_BYTES:
        raise NotYamlError(f"more than {_MOST_BYTES >> 20} MiB, which no file of this kind has")
    try:
        loader = _UniqueKeyLoader(raw.decode("utf-8"))
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _Sizes().check(node)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except _ERRORS as error:
        raise NotYamlError(str(error) or type(error).__name__) from error


class _Sizes:
    """Counts nodes with every alias written out, each node of the file once."""

    def __init__(self) -> None:
        self._known: dict[int, int] = {}

    def check(self, node: yaml.Node) -> int:
        """Return the number of nodes below and with `node`.

        Raises ConstructorError where they are too many, or part of themselves.
        """
        known = self._known.get(id(node))
        if known is None:
            self._known[id(node)] = 0  # until it is known: an alias to what is being counted has no end
            known = 1 + sum(self.check(inner) for inner in _children(node))
            self._known[id(node)] = known
        if not known:
            raise yaml.constructor.ConstructorError(None, None, "an alias to what it is a part of", node.start_mark)
        if known > _MOST_NODES:
            raise yaml.constructor.ConstructorError(
                None, None, f"aliases that stand for more than {_MOST_NODES:,} values", node.start_mark
            )
        return known


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [inner for pair in node.value for inner in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []
