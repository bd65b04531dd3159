"""Sections out of text: YAML in bounds, and frozen dataclasses out of nested mappings, by their type hints.

    text ──► parse ──► mappings ──► merged with key=value ──► build ──► a dataclass of dataclasses, or all that is wrong

Nothing that is read is trusted: not its length, not its depth, not what its aliases stand for, not the type of a value.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from raytron.errors import Problem

LONGEST, LONGEST_NUMBER = 1 << 17, 300  # characters of YAML, and of a number in it
MOST_VALUES, DEEPEST = 4_000, 40  # in a configuration


def parse(text: str) -> Any:
    """The value of some YAML, in bounded time and memory. Raises ValueError where it is none, or far beyond any need: long,
    deep, or many times larger than it looks, by aliases."""
    if len(text) > LONGEST:
        raise ValueError(f"longer than {LONGEST:,} characters")
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _measure(node, 0, {})
        return loader.construct_document(node)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except Exception as error:  # constructors of tagged values fail in ways of their own
        raise ValueError(str(error) or type(error).__name__) from None


def _measure(node: yaml.Node, depth: int, sizes: dict[int, int]) -> int:
    """How many values a node stands for, all aliases written out. sizes: of nodes seen, by id."""
    if depth > DEEPEST:
        raise ValueError("nested too deeply")
    if isinstance(node, yaml.ScalarNode) and node.tag.endswith(":int") and len(node.value) > LONGEST_NUMBER:
        raise ValueError("a number of too many digits")
    if id(node) not in sizes:
        inside: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            inside = [each for pair in node.value for each in pair]
        elif isinstance(node, yaml.SequenceNode):
            inside = node.value
        sizes[id(node)] = 1 + sum(_measure(each, depth + 1, sizes) for each in inside)
    if sizes[id(node)] > MOST_VALUES:
        raise ValueError("too large with all its aliases")
    return sizes[id(node)]


def merged(raw: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`raw` with dotted-key changes laid over it; neither argument is changed."""
    out: dict[str, Any] = {k: merged(v, {}) if isinstance(v, Mapping) else v for k, v in raw.items()}
    for dotted, value in changes.items():
        *parents, leaf = dotted.split(".")
        node = out
        for parent in parents:
            if not isinstance(node.get(parent), dict):
                node[parent] = {}
            node = node[parent]
        node[leaf] = value
    return out


def build(root: Any, raw: Any, found: list[Problem]) -> Any:
    """An instance of a frozen dataclass out of nested mappings. found: gets each key that is unknown or of a wrong type; the
    instance then has a default in its place."""
    return _build(root, root, raw, "", found)


def _build(root: Any, cls: Any, raw: Any, prefix: str, found: list[Problem]) -> Any:
    where = prefix.rstrip(".")
    if raw is None:
        raw = {}
    if not isinstance(raw, Mapping):
        found.append(Problem(where, f"{raw!r} is not a section", f"write keys below `{where}:`"))
        return cls()
    hints = _hints(cls)
    names = [item.name for item in dataclasses.fields(cls)]
    values: dict[str, Any] = {}
    for key, value in raw.items():
        if key not in hints or key not in names:
            found.append(Problem(f"{prefix}{key}", "unknown key", _nearest(root, f"{prefix}{key}", names, prefix)))
        elif dataclasses.is_dataclass(hints[key]):
            values[key] = _build(root, hints[key], value, f"{prefix}{key}.", found)
        elif _is_list_of_sections(hints[key]) and isinstance(value, list | tuple):
            cls_of_item = get_args(hints[key])[0]
            values[key] = tuple(
                _build(root, cls_of_item, item, f"{prefix}{key}[{index}].", found) for index, item in enumerate(value)
            )
        else:
            try:
                values[key] = _convert(value, hints[key])
            except (TypeError, ValueError, OverflowError):
                expected = _type_name(hints[key])
                found.append(Problem(f"{prefix}{key}", f"{value!r} is not {expected}", f"give {expected}"))
    return cls(**values)


def _is_list_of_sections(hint: Any) -> bool:
    return get_origin(hint) is tuple and dataclasses.is_dataclass(get_args(hint)[0])


def _convert(value: Any, hint: Any) -> Any:
    """`value` as a value of type `hint`; raises TypeError or ValueError where it is none."""
    origin = get_origin(hint)
    if origin is Literal:
        if value in get_args(hint) and not isinstance(value, bool):
            return value
        if str(value) in get_args(hint):  # YAML reads words such as 1f1b or off as something else
            return str(value)
        raise ValueError
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _convert(value, next(arm for arm in get_args(hint) if arm is not type(None)))
    if origin is tuple:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, Sequence):
            raise TypeError
        return tuple(_convert(item, get_args(hint)[0]) for item in items)
    if hint is bool:
        if isinstance(value, bool):
            return value
        raise TypeError
    if hint is int:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise TypeError
        number = float(value)  # accepts 1e6, which YAML reads as text
        if number != int(number):
            raise ValueError
        return int(value) if isinstance(value, int) else int(number)
    if hint is float:
        if isinstance(value, bool):
            raise TypeError
        number = float(value)
        if not math.isfinite(number):
            raise ValueError
        return number
    if hint is str and isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    raise TypeError


def _type_name(hint: Any) -> str:
    origin = get_origin(hint)
    if origin is Literal:
        return "one of " + ", ".join(str(arm) for arm in get_args(hint))
    if origin in (types.UnionType, typing.Union):
        return " or ".join("null" if arm is type(None) else _type_name(arm) for arm in get_args(hint))
    if origin is tuple:
        each = "a section" if _is_list_of_sections(hint) else _type_name(get_args(hint)[0])
        return f"a list of which each item is {each}"
    return {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}[hint]


def _nearest(root: type, dotted: str, siblings: Sequence[str], prefix: str) -> str:
    """A remedy that names the known key most like an unknown one: a sibling first, then one of another section."""
    leaf = dotted.rsplit(".", 1)[-1]
    close = difflib.get_close_matches(leaf, siblings, n=1)
    if close:
        return f"did you mean {prefix}{close[0]}?"
    keys = _all_keys(root)
    same_leaf = [key for key in keys if key.rsplit(".", 1)[-1] == leaf]
    close = same_leaf or difflib.get_close_matches(dotted, keys, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else "known keys here: " + ", ".join(siblings)


def _all_keys(cls: type, prefix: str = "") -> list[str]:
    """Every dotted key below a dataclass, sections included."""
    hints = _hints(cls)
    keys = []
    for item in dataclasses.fields(cls):
        keys.append(prefix + item.name)
        if dataclasses.is_dataclass(hints[item.name]):
            keys += _all_keys(hints[item.name], f"{prefix}{item.name}.")
    return keys


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    """The types of a dataclass's fields."""
    return get_type_hints(cls)
