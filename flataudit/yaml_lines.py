"""The values of a YAML text with the line of each, so that an error can say where it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

Place = tuple[str | int, ...]  # keys and positions on the way to a value


@dataclass(eq=False)
class RepeatedKeyError(Exception):
    """A key given twice, of which YAML would keep the last: its place and both lines."""

    place: Place
    line: int
    before: int


@dataclass(eq=False)
class BadYamlError(Exception):
    """Text that is no YAML: what is wrong, and the line where that is known."""

    reason: str
    line: int | None


def parse_yaml(text: str) -> tuple[Any, dict[Place, int]]:
    """The values, None for an empty text, and the line of each place, from 1.

    >>> parse_yaml("a: 1\\nb:\\n  c: [x]\\n")[1]
    {('a',): 1, ('b',): 2, ('b', 'c'): 3, ('b', 'c', 0): 3}

    Raises:
        BadYamlError, RepeatedKeyError
    """
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        lines: dict[Place, int] = {}
        _note_lines(node, (), lines, ())
        return (None if node is None else loader.construct_document(node)), lines
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or " ".join(str(error).split())
        raise BadYamlError(reason, None if mark is None else mark.line + 1) from None
    finally:
        loader.dispose()


def _note_lines(node: Any, place: Place, lines: dict[Place, int], above: tuple[Any, ...]) -> None:
    if any(node is other for other in above):  # an anchor that holds itself
        return
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner, line = (*place, str(key.value)), key.start_mark.line + 1
            if inner in lines:
                raise RepeatedKeyError(inner, line, lines[inner])
            lines[inner] = line
            _note_lines(value, inner, lines, (*above, node))
    elif isinstance(node, yaml.SequenceNode):
        for at, value in enumerate(node.value):
            lines[*place, at] = value.start_mark.line + 1
            _note_lines(value, (*place, at), lines, (*above, node))
