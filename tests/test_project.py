"""One set of versions: pyproject.toml, requirements.lock, conda.yaml and MLproject agree."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PIN = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9.]+)")

project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
conda = yaml.safe_load((ROOT / "conda.yaml").read_text())
mlproject = yaml.safe_load((ROOT / "MLproject").read_text())

dependencies = [Requirement(line) for line in project["dependencies"]]
development = [Requirement(line) for line in project["optional-dependencies"]["dev"]]


def lock_lines() -> list[str]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def locked() -> dict[str, str]:
    pins = [line.split("==") for line in lock_lines()]
    return {canonicalize_name(name): version for name, version in pins}


def test_lock_pins_name_and_version_alone():
    """No options, addresses or folders, and no mark of a build such as +cpu."""
    assert [line for line in lock_lines() if not PIN.fullmatch(line)] == []
    assert len(locked()) == len(lock_lines())


@pytest.mark.parametrize("requirement", dependencies + development, ids=lambda r: r.name)
def test_pyproject_admits_the_locked_version(requirement):
    assert requirement.specifier.contains(locked()[canonicalize_name(requirement.name)])


def test_conda_pins_the_direct_dependencies_as_the_lock_does():
    (pip,) = [entry["pip"] for entry in conda["dependencies"] if isinstance(entry, dict)]
    pinned = {(canonicalize_name(r.name), str(r.specifier)) for r in map(Requirement, pip)}
    direct = {canonicalize_name(requirement.name) for requirement in dependencies}
    assert pinned == {(name, f"=={locked()[name]}") for name in direct}
    assert {r.name: r.extras for r in map(Requirement, pip)} == {
        r.name: r.extras for r in dependencies
    }


def test_conda_python_is_one_that_pyproject_admits():
    (python,) = [entry for entry in conda["dependencies"] if str(entry).startswith("python=")]
    assert SpecifierSet(project["requires-python"]).contains(python.removeprefix("python="))


def test_mlproject_names_one_environment():
    """MLflow refuses a project with both conda_env and python_env."""
    assert mlproject["name"] == project["name"]
    assert mlproject["conda_env"] == "conda.yaml"
    assert not {"python_env", "docker_env"} & mlproject.keys()


@pytest.mark.parametrize("entry", mlproject["entry_points"])
def test_mlproject_uses_every_parameter_once(entry):
    point = mlproject["entry_points"][entry]
    used = re.findall(r"{(\w+)}", point["command"])
    assert sorted(used) == sorted(point.get("parameters", {}))


@pytest.mark.parametrize("entry", mlproject["entry_points"])
def test_mlproject_calls_commands_that_exist(entry):
    command = mlproject["entry_points"][entry]["command"].split()
    assert command[:3] == ["python", "-m", "flataudit"]
    shown = subprocess.run(
        [sys.executable, "-m", "flataudit", command[3], "--help"],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "200", "TERM": "dumb"},
        capture_output=True,
        text=True,
    )
    assert shown.returncode == 0, shown.stderr
    options = [word for word in command if word.startswith("--")]
    assert [option for option in options if option not in shown.stdout] == []


def test_versions_of_project_and_citation_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == project["version"]
    assert citation["license"] == project["license"]


def test_make_prints_help_of_every_documented_target():
    shown = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in ("demo", "test", "install", "lint", "format", "types", "contracts", "bench"):
        assert f"make {target} " in shown
