"""Files of specs as people and programs may leave them: with other keys and values, other bytes, other encodings."""

import copy
from collections.abc import Mapping
from random import Random
from typing import Any

import yaml

from tests.fuzz.damage import as_text, damaged, edit

PIECES = (
    *(b"\t", b" ", b"\n", b"\r", b"\0", b"\xff", b"\xe9", b"\xef\xbb\xbf", b"\xc2\x85"),
    *(b"&a ", b"*a ", b"*b", b"<<: *a\n", b"!!int ", b"!!set ", b"!!python/name:os.system ", b"!x "),
    *(b"- ", b"? ", b": ", b"{", b"}", b"[", b"]", b"[" * 500, b"'", b'"', b"|\n", b"#"),
    *(b"---\n", b"...\n", b"%YAML 9\n"),
    *(b"1e-3", b"0x1F", b"010", b"1:30", b"2026-13-45", b".nan", b".inf", b"~", b"yes", b"=", b"9" * 5000),
    b"a: &a [1, 2]\n" + b"".join(b"b%d: &b%d [*a, *a, *a, *a]\n" % (n, n) for n in range(3)),
)
"""What means something in YAML, or is no text."""


def spec_file(random: Random, spec: Mapping[str, Any]) -> bytes:
    """Return the file of a spec that differs from the given one in keys, values or bytes, and sometimes in nothing."""
    tree = copy.deepcopy(dict(spec))
    for _ in range(random.choice((0, 0, 1, 1, 2, 5))):
        edit(random, tree)
    text = as_text(tree, random) if random.random() < 0.5 else yaml.safe_dump(tree, sort_keys=False)
    data = text.encode(random.choice(("utf-8",) * 20 + ("utf-8-sig", "utf-16", "latin-1")), "replace")
    kind = random.choice(("as it is", "as it is", "piece", "piece", "line", "bytes"))
    if kind == "piece":
        for _ in range(random.choice((1, 1, 2, 4))):
            place = random.randrange(len(data) + 1)
            data = data[:place] + random.choice(PIECES) + data[place:]
    elif kind == "line":
        lines = data.splitlines(keepends=True)
        lines.insert(random.randrange(len(lines) + 1), random.choice(lines or [b""]))
        data = b"".join(lines)
    elif kind == "bytes":
        data = damaged(random, data)
    return data


def has_a_key_twice(data: bytes) -> bool:
    """Return whether a mapping of a YAML file has a key twice."""
    # PyYAML's parser in Python refuses tabs between two values, which YAML allows.
    waiting, seen = [yaml.compose(data.decode("utf-8-sig"), Loader=yaml.CSafeLoader)], set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen or isinstance(node, yaml.ScalarNode):
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value]
            if len(set(keys)) < len(keys):
                return True
            waiting += [part for pair in node.value for part in pair]
        else:
            waiting += node.value
    return False
