import inspect

import pytest

from flataudit.audit import audit
from flataudit.config import AuditOptions, make_options, read_options
from flataudit.errors import InputError


def refused(call):
    """The one line of the InputError that `call` raises."""
    with pytest.raises(InputError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_nothing_given_is_auto_everywhere():
    options = make_options({}).model_dump()
    assert options == {
        "target": None,
        "family": "auto",
        "penalty": "auto",
        "dispersion": "auto",
        "training": "auto",
        "curvature": "ggn",
        "solver": "auto",
        "device": "auto",
        "seed": 0,
        "recalibrate": False,
        "sensitivity": "auto",
        "slices": None,
        "deadline": 86400.0,
        "memory_limit": None,
        "checkpoint": None,
        "tracking_uri": None,
    }


def test_empty_text_and_null_count_as_not_given():
    fields = dict.fromkeys(AuditOptions.model_fields)
    assert make_options(fields) == make_options({})
    assert make_options(dict.fromkeys(fields, "")) == make_options({})
    assert make_options({"penalty": 0.0}).penalty == 0.0  # zero is a value


def test_sensitivity_auto_on_or_off():
    given = {"auto": "auto", "on": True, "off": False, True: True, False: False}
    for value, wanted in given.items():
        assert make_options({"sensitivity": value}).sensitivity == wanted


def test_penalty_by_number_name_or_auto():
    assert make_options({"penalty": 0.1}).penalty == 0.1
    assert make_options({"penalty": {"weight": 0.1, "bias": 0}}).penalty == {
        "weight": 0.1,
        "bias": 0.0,
    }
    assert make_options({"penalty": "auto"}).penalty == "auto"


def test_defaults_are_those_of_the_python_function():
    """`training` apart: only who has a store can read the source run."""
    parameters = inspect.signature(audit).parameters
    for name, field in AuditOptions.model_fields.items():
        if name in parameters and name != "training":
            assert field.default == parameters[name].default, name
    assert parameters["training"].default is None


def test_unknown_options_are_named_with_the_known_ones():
    text = refused(lambda: make_options({"pennalty": 0.1}, "a.yaml"))
    assert text.startswith("unknown option 'pennalty' in a.yaml; choose from: target, family, pen")
    assert "unknown option '1'" in refused(lambda: make_options({1: 2}))


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("deadline", 0, "greater than 0, got 0"),
        ("deadline", -1.5, "greater than 0, got -1.5"),
        ("deadline", float("nan"), "got nan"),
        ("deadline", float("inf"), "got inf"),
        ("deadline", "soon", "a valid number"),
        ("seed", 0.5, "a valid integer"),
        ("penalty", [1, 2], "got [1, 2]"),
        ("penalty", {"weight": "much"}, "expected penalty"),
        ("family", 3, "a valid string, got 3"),
        ("solver", ["primal"], "a valid string"),
        ("recalibrate", "perhaps", "a valid boolean"),
        ("sensitivity", "perhaps", "'auto'"),
    ],
)
def test_values_of_the_wrong_kind(name, value, expected):
    text = refused(lambda: make_options({name: value}, "flow parameters"))
    assert text.startswith(f"expected {name} in flow parameters to be")
    assert expected in text


def test_yaml_file(tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text(
        "penalty: {weight: 0.1, bias: 0}\n"
        "training: {optimizer: sgd, sum_lr: 40}\n"
        "deadline: 60\ntarget: ''\n"
    )
    assert read_options(path) == {
        "penalty": {"weight": 0.1, "bias": 0},
        "training": {"optimizer": "sgd", "sum_lr": 40},
        "deadline": 60,
        "target": "",
    }


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "got NoneType"),
        (b"# nothing but a comment\n", "got NoneType"),
        (b"- penalty\n- 0.1\n", "got list"),
        (b"penalty", "got str"),
        (b"penalty: [1\n", "expected valid YAML"),
        (b"target: \xff\n", "expected valid YAML"),
        (b"pennalty: 0.1\n", "unknown option 'pennalty'"),
        (b"1: 2\n", "unknown option '1'"),
        (b"deadline: -1\n", "greater than 0"),
        (b"model_uri: models:/digits/1\n", "unknown option 'model_uri'"),
    ],
)
def test_bad_yaml_names_its_file(tmp_path, content, expected):
    path = tmp_path / "options.yaml"
    path.write_bytes(content)
    text = refused(lambda: read_options(path))
    assert expected in text
    assert str(path) in text


def test_a_missing_yaml_file_and_a_folder(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        text = refused(lambda path=path: read_options(path))
        assert text.startswith("expected a YAML file, got none at")


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("8GB", 8 * 10**9), ("1.5 GiB", 3 * 2**29), ("2000000000", 2 * 10**9), (5, 5)],
)
def test_memory_limits_have_units(text, n_bytes):
    found = make_options({"memory_limit": text}).memory_limit
    assert found == n_bytes
    assert type(found) is int  # as JSON gives it back


@pytest.mark.parametrize("text", ["much", "8 elephants", "0", "-1", -5])
def test_memory_limits_that_are_none(text):
    with pytest.raises(InputError, match="expected memory_limit in options to be"):
        make_options({"memory_limit": text})
