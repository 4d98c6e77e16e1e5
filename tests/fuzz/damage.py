"""Ways to damage a file: bytes that changed on their way, and content that somebody wrote on purpose."""

import copy
import json
import struct
from random import Random
from typing import Any

DEEP = "@deep@"
"""In a JSON's text, a string that `as_text` replaces by lists inside each other."""
TWICE = "@twice@"
"""A key that `as_text` replaces by the key of the entry before it."""
NUMBERS = (0, 1, -1, 2, 7, 255, 10**3, 10**6, 10**9, 10**18, 2**63, 10**30, 10**400, 0.5, -0.0, 1e-300, 1e308)
TEXTS = (
    "",
    "x",
    "name",
    "weights",
    "0.5",
    "1e3",
    "nan",
    "\ud800",
    "\0",
    "é",
    "../../x",
    "full",
    "mist",
    "x" * 300,
    "ab" * 20_000,
)
METHODS = (
    "full+full",
    "full+last_layer",
    "mist",
    "dtl",
    "parasite",
    "shared",
    "scale_bais",
    "+",
    "+".join(["full"] * 5_000),
)
OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [[]], {"": {}}, DEEP, float("nan"), float("inf"), [1] * 1000)


def damaged(random: Random, data: bytes) -> bytes:
    """Return the bytes as they could arrive: with changed, lost, doubled or added ones."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 5))):
        place = (
            random.randrange(len(changed) + 1)
            if random.random() < 0.5
            else random.randrange(min(400, len(changed)) + 1)
        )
        length = random.choice((1, 1, 4, 16, 300))
        kind = random.choice(("flip", "flip", "cut", "zero", "drop", "double", "random", "length"))
        if kind == "flip" and place < len(changed):
            changed[place] ^= 1 << random.randrange(8)
        elif kind == "cut":
            del changed[place:]
        elif kind == "zero":
            changed[place : place + length] = bytes(len(changed[place : place + length]))
        elif kind == "drop":
            del changed[place : place + length]
        elif kind == "double":
            changed[place:place] = changed[place : place + length]
        elif kind == "random":
            changed[place : place + length] = random.randbytes(length)
        elif kind == "length":
            changed[:8] = struct.pack("<Q", random.choice((0, 1, len(changed), 2**31, 2**63, 2**64 - 1)))
    return bytes(changed)


def value(random: Random, old: Any = None) -> Any:
    """Return a value for an entry: near the old one, or of another size or type."""
    if isinstance(old, int | float) and abs(old) < 2**63 and random.random() < 0.3:
        return random.choice((old + 1, old - 1, -old, old * 2, float(old), str(old), [old]))
    chosen = random.choice(
        (random.choice(NUMBERS), random.choice(TEXTS), random.choice(METHODS), random.choice(OTHERS))
    )
    return copy.deepcopy(chosen)  # a list of `OTHERS` may be changed later, and must not get into itself


def edit(random: Random, tree: Any) -> None:
    """Change one entry of a tree of lists and dicts in place: its value, its key, or whether it is there."""
    node = tree
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return
        key = random.choice(keys)
        if not isinstance(node[key], dict | list) or random.random() < 0.2:
            break
        node = node[key]
    kind = random.choice(("set", "set", "set", "drop", "add", "twice", "rename"))
    if kind == "set" or (isinstance(node, list) and kind in ("twice", "rename")):
        node[key] = value(random, node[key])
    elif kind == "drop":
        del node[key]
    elif kind == "add" and isinstance(node, list):
        node.append(random.choice((node[key], value(random))))
    elif kind == "add":
        node[random.choice(TEXTS)] = value(random)
    elif kind == "twice":
        items = list(node.items())
        node.clear()
        for name, content in items:
            node[name] = content
            if name == key:
                node[TWICE + name] = value(random, content)
    else:
        node[random.choice(TEXTS)] = node.pop(key)


def as_text(tree: Any, random: Random) -> str:
    """Return a tree as JSON, with numbers, depths and doubled keys that `json.dumps` does not write."""
    depth = random.choice((31, 40, 900, 5_000, 100_000))
    text = json.dumps(tree, separators=(",", ":"))
    return text.replace(TWICE, "").replace(f'"{DEEP}"', "[" * depth + "]" * depth)


def rewritten(random: Random, text: bytes) -> bytes:
    """Return another JSON: with other values and keys, and sometimes with other bytes."""
    content = json.loads(text)
    for _ in range(random.choice((1, 1, 2, 4))):
        edit(random, content)
    changed = as_text(content, random).encode("utf-8", "surrogatepass")
    return damaged(random, changed) if random.random() < 0.1 else changed
