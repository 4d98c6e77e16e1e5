"""The text of a spec: what is read, what is refused with file and line, and that what is written reads back equal."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from multitask.spec.errors import SpecError
from multitask.spec.text import MAX_BYTES, MAX_DEPTH, check_plain, read_yaml, to_yaml

LAUGHS = "a0: &a0 [x, x, x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}, *a{n - 1}]\n" for n in range(1, 20))
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 30))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "job.yaml"


def read(path: Path, content: str | bytes) -> dict[str, Any]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_yaml(path)


def error_of(path: Path, content: str | bytes) -> str:
    with pytest.raises(SpecError) as caught:
        read(path, content)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert len(message) < 400
    return message.removeprefix(str(path))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E5", 100_000.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("-1.5e+3", -1500.0),
        ("1_000", 1000),
        ("0x10", 16),
        ("-7", -7),
        ("010", 10.0),
        ("1:30", "1:30"),
        ("2026-12-01", "2026-12-01"),
        ("'1e-3'", "1e-3"),
        ("e5", "e5"),
        ("1e", "1e"),
        ("yes", True),
        ("~", None),
        ("~/data", "~/data"),
    ],
)
def test_plain_values_are_read_by_yaml_1_1_and_numbers_by_yaml_1_2(path: Path, text: str, value: object) -> None:
    found = read(path, f"a: {text}\n")["a"]

    assert found == value
    assert type(found) is type(value)


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**62), 2**62)
    | st.floats(allow_nan=False, allow_infinity=False)
    # Text that without quotes would be read as something else.
    | st.sampled_from(
        ["1e-3", "1e5", "010", "1:30", "2026-12-01", "yes", "~", ".inf", "<<", "=", "", "-", "0x1F", "1_0"]
    )
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab1e-~<", max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=25, deadline=None)
@given(value=PLAIN)
def test_what_is_written_reads_back_equal(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "written.yaml"
    path.write_bytes(to_yaml({"a": value}).encode())

    assert read_yaml(path) == {"a": value}


def test_a_byte_order_mark_is_no_part_of_the_text(path: Path) -> None:
    assert read(path, b"\xef\xbb\xbfa: 1\n") == {"a": 1}


def test_merge_keys_and_aliases_are_read(path: Path) -> None:
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\n"
    assert read(path, text) == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}}


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("a: 1\nb: 2\na: 3\n", [", line 3: the key 'a' stands twice", "line 1", "keep one"]),
        ("a:\n  b: {c: 1, d: 2, c: 3}\n", [", line 2: the key 'c' stands twice"]),
        ("a:\n\tb: 1\n", [", line 2: not valid YAML", "indent with spaces"]),
        ("a: [1\n", [", line 2: not valid YAML"]),
        ("a: 1\nb: *c\n", [", line 2: not valid YAML: found undefined alias"]),
        ("a: 1\n---\nb: 2\n", [", line 2: not valid YAML", "another document"]),
        ("a: 1\nb: \x00\n", [", line 2: not valid YAML: control characters"]),
        ("a: 1\n# caf\xe9\n".encode("latin-1"), [", line 2: found the byte 0xe9", "Save the file as UTF-8"]),
        ("a: 1\n".encode("utf-16"), [", line 1: found the byte 0xff", "UTF-8"]),
        ("a: 1\nb: &b [*b]\n", [", line 2: found an alias within what it stands for"]),
        ("a: " + "[" * 400_000, [f", line 1: found more than {MAX_DEPTH} mappings and lists within each other"]),
        ("- " * 100_000, [", line 1: found more than"]),
        (LAUGHS, ["keys and values, copies by aliases included"]),
        (MERGES, ["keys and values, copies by aliases included"]),
        ("a: 1\n" + "#" * MAX_BYTES, [f"more than {MAX_BYTES:,} bytes"]),
        ("a: !!binary aGk=\n", [", line 1: found the tag 'tag:yaml.org,2002:binary'"]),
        ("a: !!int words\n", [", line 1: found the tag 'tag:yaml.org,2002:int'"]),
        ("a: 1\nb: !mine {c: 1}\n", [", line 2: found the tag '!mine'"]),
        ("!!set {a, b}\n", [", line 1: found the tag"]),
        ("a: " + "9" * 5000, ["Exceeds the limit"]),
        ("a: " + "9" * 30, [": a: found a whole number with more than 63 bits"]),
        ("a: [1, .nan]\n", [": a[1]: expected a finite number, found nan"]),
        ('a: {b: "x\\0"}\n', [": a.b: found 'x\\x00'", "no file name"]),
        ("a: {1: b}\n", [": a: expected keys that are text, found 1", "in quotes"]),
        ("? [a]\n: 1\n", [", line 1: not valid YAML: found unhashable key"]),
        ("", [": expected keys and values at the top, found nothing."]),
        ("- a\n", [": expected keys and values at the top, found list."]),
        (f"{'x' * 900}: 1\n{'x' * 900}: 1\n", [", line 2: the key 'xxx"]),
    ],
)
def test_what_is_no_spec_is_refused_with_file_and_line(path: Path, content: str | bytes, parts: list[str]) -> None:
    message = error_of(path, content)

    assert all(part in message for part in parts), message


def test_a_file_with_too_many_values_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multitask.spec.text.MAX_VALUES", 20)

    assert read(path, f"a: [{'1, ' * 17}]") == {"a": [1] * 17}  # with the key, the list and the mapping
    assert error_of(path, f"a: [{'1, ' * 18}]").startswith(", line 1: found more than 20 keys and values")


@pytest.mark.parametrize("name", ["missing.yaml", ".", "x\0y"])
def test_what_is_no_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(SpecError, match="is not a file"):
        read_yaml(tmp_path / name)


@pytest.mark.parametrize("value", [{1: 2}, {"a": [object()]}, {"a": {1, 2}}, {"a": b"x"}, {"a": "\ud800"}, {"\0": 1}])
def test_data_that_no_file_could_hold_is_refused(value: Any) -> None:
    with pytest.raises(SpecError, match=r"^where: "):
        check_plain(value, "where")


def test_data_within_itself_is_refused() -> None:
    value: dict[str, Any] = {}
    value["a"] = [value]
    with pytest.raises(SpecError, match="nested more than"):
        check_plain(value, "where")
