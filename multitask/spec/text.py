"""The text of a spec: YAML that is read into plain data, and plain data that is written as YAML.

A spec is read by the rules of YAML 1.1, with these differences: a key that stands twice in one mapping is an error,
and so is a tag that names a kind of its own; numbers follow YAML 1.2, so `1e-3` is a number, `010` is ten and `1:30` is
text; a date is text. Size, depth and number of values are limited before anything is made of them.
"""

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from yaml._yaml import CParser
from yaml.composer import Composer
from yaml.constructor import SafeConstructor
from yaml.reader import ReaderError
from yaml.resolver import Resolver

from multitask.spec.errors import SpecError, quoted, shortened

MAX_BYTES, MAX_DEPTH, MAX_VALUES = 1_000_000, 32, 100_000
"""Limits of a spec: bytes of its file, mappings and lists within each other, and keys and values together."""
LARGEST = 2**63
"""Whole numbers of a spec lie between plus and minus this one, so that every format that keeps a spec can hold them."""
NO_TEXT = re.compile("[\0\ud800-\udfff]")
"""Characters that no file name can have, and halves of characters, which no file can hold as UTF-8."""
INT, FLOAT, TIMESTAMP = (f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "timestamp"))
OF_ANY_VALUE = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map", "merge")}
"""Tags of text, lists, mappings and `<<`. A value with another tag has to read as that tag says."""


class _Loader(Composer, CParser, SafeConstructor, Resolver):
    """PyYAML's safe loader with its parser in C, which checks all values while they are read.

    The loader that is in C as a whole crashes on deep text.
    """

    def __init__(self, text: str) -> None:
        CParser.__init__(self, text)
        Composer.__init__(self)
        SafeConstructor.__init__(self)
        Resolver.__init__(self)
        self._depth = self._count = 0
        self._sizes: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        """Read one value, in whose size an alias counts as a copy of what it stands for.

        Raises:
            _Refused: a limit is exceeded, a key stands twice, a tag does not fit its value, or an alias stands within
                what it stands for.
        """
        event, before = self.peek_event(), self._count
        assert event is not None, "the parser ends with an event of its own"
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _refusal(event, f"found more than {MAX_DEPTH} mappings and lists within each other")
        node = super().compose_node(parent, index)
        assert node is not None, "every event at which a value begins makes a node"
        if not isinstance(event, yaml.AliasEvent):
            self._count += 1
            self._check(node)
            self._sizes[node] = self._count - before
        elif node in self._sizes:
            self._count += self._sizes[node]
        else:
            raise _refusal(event, "found an alias within what it stands for")
        if self._count > MAX_VALUES:
            raise _refusal(event, f"found more than {MAX_VALUES:,} keys and values, copies by aliases included")
        self._depth -= 1
        return node

    def _check(self, node: yaml.Node) -> None:
        """Check the tag of a value, and the keys of a mapping."""
        if node.tag not in OF_ANY_VALUE:
            scalar = isinstance(node, yaml.ScalarNode)
            reads_as = self.resolve(yaml.ScalarNode, node.value, (True, False)) if scalar else None
            if node.tag != reads_as:
                raise _refusal(node, f"found the tag {quoted(node.tag)} on a value of another kind; leave the tag out")
        if not isinstance(node, yaml.MappingNode):
            return
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in lines:
                    before = f"the first time in line {lines[key.value]}"
                    raise _refusal(key, f"the key {quoted(key.value)} stands twice in one mapping, {before}; keep one")
                lines[key.value] = key.start_mark.line + 1


class _Dumper(yaml.CSafeDumper):
    """PyYAML's safe dumper, which puts text in quotes that `_Loader` would read as a number."""


for _kind in (_Loader, _Dumper):
    _kind.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in rules if tag not in (INT, FLOAT, TIMESTAMP)]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _kind.add_implicit_resolver(INT, re.compile(r"^(?:[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+)$"), list("-+0123456789"))
    _kind.add_implicit_resolver(
        FLOAT,
        re.compile(
            r"^(?:[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?"
            r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        list("-+.0123456789"),
    )


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the keys and values of a spec's file.

    Raises:
        SpecError: the file is missing, too large, not UTF-8 or not valid YAML, has a key twice, or has no mapping at
            its top level. The message names the file, and the line where there is one.
    """
    if not os.path.isfile(path):
        raise SpecError(f"Job spec '{_name(path)}' is not a file. Name a YAML file, for example one of jobs/specs/.")
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise SpecError(
            f"{_name(path)}: cannot be read ({error.strerror}). Check your permission to read it."
        ) from None
    if len(content) > MAX_BYTES:
        raise SpecError(
            f"{_name(path)}: found more than {MAX_BYTES:,} bytes, but a spec has at most that many. Name the YAML file "
            "of a job or a sweep."
        )
    try:
        raw = _parse(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise SpecError(
            f"{_name(path)}, line {line}: found the byte 0x{error.object[error.start]:02x}, which is not UTF-8. Save "
            "the file as UTF-8."
        ) from None
    except (yaml.YAMLError, ValueError) as error:
        raise SpecError(f"{_name(path)}{_place(error, content)}: {_problem(error)}") from None
    if not isinstance(raw, dict):
        found = "nothing" if raw is None else type(raw).__name__
        raise SpecError(f"{_name(path)}: expected keys and values at the top, found {found}.")
    check_plain(raw, _name(path))
    return raw


def to_yaml(content: Mapping[str, Any]) -> str:
    """Return plain data as the text of a YAML file, which `read_yaml` reads back as equal data."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def read_anew(value: Any) -> Any:
    """Return plain data that version 0.1 has read from a spec as this version reads the same text.

    Version 0.1 took `1e-3` for text.

    Raises:
        ValueError: the data is not that of a spec.
    """
    try:
        return _parse(yaml.safe_dump(value))
    except yaml.YAMLError as error:
        raise ValueError(_problem(error)) from None


def check_plain(value: Any, where: str, key: str = "", depth: int = 1) -> None:
    """Check that a value is plain data, as a spec's file can hold it.

    Plain data is text, finite numbers, true, false, null, lists, and mappings whose keys are text.

    Args:
        where: the file's name, with which error messages begin.
        key: the value's key in the spec, with dots.
        depth: number of mappings and lists that the value is within, itself included.
    Raises:
        SpecError: it is something else, or nested too deep. The message names the key.
    """
    problem = None
    if depth > MAX_DEPTH:
        problem = f"nested more than {MAX_DEPTH} levels deep, which no key of a spec needs"
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            if not isinstance(name, str) or NO_TEXT.search(name):
                problem = f"expected keys that are text, found {quoted(name)}; put the key in quotes"
                break
            check_plain(inner, where, f"{key}.{name}".removeprefix("."), depth + 1)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            check_plain(inner, where, f"{key}[{index}]", depth + 1)
    elif isinstance(value, str):
        if NO_TEXT.search(value):
            problem = f"found {quoted(value)}, which has a character that no file name or text file can hold"
    elif isinstance(value, int):
        if abs(value) >= LARGEST:
            problem = "found a whole number with more than 63 bits"
    elif isinstance(value, float):
        if not math.isfinite(value):
            problem = f"expected a finite number, found {value}"
    elif value is not None:
        problem = f"found a {type(value).__name__}, expected text, a number, true, false, a list, or keys and values"
    if problem is not None:
        raise SpecError(f"{where}: {shortened(key) or 'spec'}: {problem}")


def _parse(text: str) -> Any:
    """Return the plain data of a YAML text.

    Raises:
        yaml.YAMLError, ValueError: the text is no YAML of a spec.
    """
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


class _Refused(yaml.MarkedYAMLError):
    """The text may be YAML, but no spec."""


def _refusal(at: Any, problem: str) -> _Refused:
    """Return the error about a node or an event, whose line the message states."""
    return _Refused(problem=problem, problem_mark=at.start_mark)


def _place(error: Exception, content: bytes) -> str:
    """Return the line of an error, as a message states it after the file's name."""
    if isinstance(error, ReaderError):
        line = content.count(b"\n", 0, error.position)
    else:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        if mark is None:
            return ""
        line = mark.line
    return f", line {line + 1}"


def _problem(error: Exception) -> str:
    problem = shortened(getattr(error, "problem", None) or getattr(error, "reason", None) or str(error), 200)
    if isinstance(error, _Refused):
        return problem
    # Both of PyYAML's parsers say so of a tab at the beginning of a line.
    advice = "; indent with spaces" if "cannot start any token" in problem else ""
    return f"not valid YAML: {problem}{advice}"


def _name(path: Path) -> str:
    return shortened(str(path), 200)
