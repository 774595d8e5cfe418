"""Values with their lines: what the pipeline files and the policies are read with."""

import pytest

from flataudit.yaml_lines import BadYamlError, RepeatedKeyError, parse_yaml


def test_values_and_lines():
    values, lines = parse_yaml("a: 1\n\nb:\n  c:\n  - x\n  - d: 2\n")
    assert values == {"a": 1, "b": {"c": ["x", {"d": 2}]}}
    assert lines == {("a",): 1, ("b",): 3, ("b", "c"): 4, ("b", "c", 0): 5, ("b", "c", 1): 6,
                     ("b", "c", 1, "d"): 6}  # fmt: skip


@pytest.mark.parametrize("text", ["", "# nothing\n", "null"])
def test_nothing(text):
    assert parse_yaml(text) == (None, {})


def test_a_key_given_twice():
    with pytest.raises(RepeatedKeyError) as caught:
        parse_yaml("a:\n  b: 1\n  c: 2\n  b: 3\n")
    assert (caught.value.place, caught.value.line, caught.value.before) == (("a", "b"), 4, 2)


def test_no_yaml():
    with pytest.raises(BadYamlError) as caught:
        parse_yaml("a: 1\nb: [2\n")
    assert caught.value.line == 3
    assert "expected ',' or ']'" in caught.value.reason


def test_an_anchor_that_holds_itself_ends():
    values, lines = parse_yaml("a: &x\n  b: *x\n")
    assert values["a"]["b"] is values["a"]
    assert lines == {("a",): 1, ("a", "b"): 2}
