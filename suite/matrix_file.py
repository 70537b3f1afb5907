"""Reads the YAML file of a matrix: what is not YAML, or would grow without end, is one line with its place."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from suite.errors import InputError, shown

# A matrix has some hundred nodes and is six deep; aliases count as often as they are used, since whoever walks over
# the data meets them as often.
MOST_NODES = 100_000
MOST_DEPTH = 50
_LONGEST_NUMBER = 100  # characters; Python itself refuses to print a number of 5000 digits
_MERGE = "tag:yaml.org,2002:merge"
_BROKEN_SCALAR = (
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    ArithmeticError,
)  # what PyYAML's own readers raise


class _Loader(yaml.SafeLoader):
    """SafeLoader whose every refusal has a place; a key given twice, NUL and lone surrogates are refused too."""

    def get_single_data(self) -> Any:
        node = self.get_single_node()
        if node is None:
            return None
        _refuse_growth(node)
        return self.construct_document(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == _MERGE:  # several may be merged, and the mapping's own keys win
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise _refused(f"key {shown(key)} is given twice", key_node)
            if isinstance(key, Hashable):
                seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if not isinstance(node, yaml.ScalarNode):
            return super().construct_object(node, deep)
        kind = node.tag.rpartition(":")[2]
        if kind in ("int", "float") and len(node.value) > _LONGEST_NUMBER:
            raise _refused(f"a number of {len(node.value)} characters; give at most {_LONGEST_NUMBER}", node)
        try:
            value = super().construct_object(node, deep)
        except _BROKEN_SCALAR as error:
            reason = str(error) if isinstance(error, ValueError) else f"it cannot be read as {kind}"
            raise _refused(f"{shown(node.value)} is no {kind}: {reason}; put a text in quotes", node) from error
        if isinstance(value, str) and any(c == "\0" or "\ud800" <= c <= "\udfff" for c in value):
            raise _refused(f"{shown(value)} has a character that no text may have; remove it", node)
        return value


def _refused(problem: str, node: yaml.Node) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def _refuse_growth(root: yaml.Node) -> None:
    """Refuse more nodes or a greater depth than a matrix has, with every alias expanded; each node is looked at once."""
    sizes: dict[int, tuple[int, int]] = {}  # nodes and depth below a node, by its id
    open_nodes: set[int] = set()

    def measure(node: yaml.Node, level: int) -> tuple[int, int]:
        if id(node) in sizes:
            return sizes[id(node)]
        if id(node) in open_nodes:
            raise _refused("an alias that contains itself; write it out", node)
        if level > MOST_DEPTH:
            raise _refused(f"nested more than {MOST_DEPTH} deep", node)
        open_nodes.add(id(node))
        children: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            children = node.value
        elif isinstance(node, yaml.MappingNode):
            children = [child for pair in node.value for child in pair]
        found = [measure(child, level + 1) for child in children]
        size = 1 + sum(count for count, _ in found), 1 + max((depth for _, depth in found), default=0)
        if size[0] > MOST_NODES:
            raise _refused(f"more than {MOST_NODES} values once aliases are expanded", node)
        if level + size[1] > MOST_DEPTH + 1:
            raise _refused(f"nested more than {MOST_DEPTH} deep", node)
        open_nodes.discard(id(node))
        sizes[id(node)] = size
        return size

    measure(root, 1)


def read_yaml(path: Path) -> Any:
    """Content of a YAML file.

    Raises
    ------
    InputError
        No such file, unreadable, or no YAML (with line and column).
    """
    place = f"matrix file {shown(str(path), quotes=False)}"
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except UnicodeDecodeError as error:
        raise InputError(f"{place}: is not UTF-8 text; give the path of a YAML file, or a profile") from error
    except OSError as error:
        raise InputError(f"{place}: {error.strerror}; give the path of a YAML file, or a profile") from error
    except RecursionError as error:
        raise InputError(f"{place}: nested more than {MOST_DEPTH} deep; write it flatter") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1} column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise InputError(f"{place}{line}: broken YAML: {problem}") from error
