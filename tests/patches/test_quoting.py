"""Messages quote at most 200 characters of a value."""

from patches.quoting import quoted, shortened


def test_what_is_short_is_quoted_as_python_writes_it() -> None:
    for value in ("x", None, [1, "two"], {"a": (1.5, b"x")}, ValueError("wrong")):
        assert quoted(value) == repr(value)
    assert shortened(ValueError("wrong")) == "wrong"


def test_what_is_long_or_no_text_is_shortened() -> None:
    for value in ("x" * 1000, b"x" * 1000, ["x" * 50] * 1000, 10**1000, {name: [[name]] for name in range(1000)}):
        assert len(quoted(value)) <= 200
    assert shortened("x" * 201) == "x" * 199 + "…"
    assert shortened("half \ud800") == "half \\ud800"


def test_control_characters_are_escaped() -> None:
    assert shortened("\x1b[31mred\r\x9b0m\x00") == "\\x1b[31mred\\x0d\\x9b0m\\x00"
    assert shortened("two\nlines\tand ä 猫") == "two\nlines\tand ä 猫"
