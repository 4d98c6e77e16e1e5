"""Class lists in messages."""

from multitask.data.classes import shown


def test_a_long_class_list_is_shown_by_its_first_names() -> None:
    assert shown(["cat", "dog"]) == "'cat', 'dog'"
    assert shown([f"class {number}" for number in range(6)]) == "'class 0', 'class 1', 'class 2', 'class 3' and 2 more"
    assert shown(["x" * 100]) == f"'{'x' * 18}…"


def test_of_two_class_lists_the_names_that_differ_are_shown_first() -> None:
    same = [f"class {number}" for number in range(5)]

    assert shown([*same, "cat"], [*same, "dog"]) == "'cat', 'class 0', 'class 1', 'class 2' and 2 more"
    assert shown(same, [*same, "dog"]) == "'class 0', 'class 1', 'class 2', 'class 3' and 1 more"
    assert shown([*same[::-1], "cat"], same[:4]) == "'class 4', 'cat', 'class 3', 'class 2' and 2 more"
