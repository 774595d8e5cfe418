"""The core stands on torch, numpy and scipy alone, and importing it costs nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLATFORM = "mlflow prefect fastapi sqlalchemy typer rich pydantic yaml"
DATA_AND_FIGURES = "netcal pandas pyarrow matplotlib jinja2 sklearn skops"
BLOCKED = [*PLATFORM.split(), *DATA_AND_FIGURES.split()]

AUDITS = """
import json
import sys

BLOCKED = set(sys.argv[1].split(",")) - {""}


class Without:
    # Finds all that another finder does, but for the blocked packages.

    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        blocked = name.partition(".")[0] in BLOCKED
        return None if blocked else self.finder.find_spec(name, path, target)


sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
for name in BLOCKED:
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} can still be imported")

import flataudit
from tests.cases import BY_NAME, REFERENCES, build, reference

found = {}
for name in ("mlp_tanh_wide", "convolutions", "gru", "gaussian_outputs", "poisson"):
    case = BY_NAME[name]
    built = build(case)
    report = flataudit.audit(
        built.model,
        (built.x, built.y),
        family=case.family,
        heldout=(built.x[:5], built.y[:5]),
        training="optimizer=adam,sum_lr=3,batch_size=4",
        recalibrate=True,
    )
    found[name] = report.to_dict() | {"display": report.display}
fitted = reference(REFERENCES[3])
report = flataudit.audit(fitted.model, (fitted.x, fitted.y.long()))
found["breast_cancer"] = report.to_dict() | {"display": report.display}
for report in found.values():
    del report["solver"]["seconds"]
imported = sorted(BLOCKED & {name.partition(".")[0] for name in sys.modules})
print(json.dumps({"reports": found, "imported": imported}, allow_nan=False))
"""


def python(code: str, *arguments: str) -> str:
    """Standard output of a fresh interpreter at the repository's root, warnings as errors."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def bare():
    return json.loads(python(AUDITS, ",".join(BLOCKED)))


@pytest.fixture(scope="module")
def full():
    return json.loads(python(AUDITS, ""))


def test_nothing_blocked_was_imported(bare):
    assert bare["imported"] == []
    assert len(bare["reports"]) == 6


def test_same_numbers_without_the_platform(bare, full):
    """Equal to the last bit; only ECE, MCE and ACE, which are netcal's, are null."""
    netcal = ("ece", "mce", "ace")
    seen = 0
    for name, wanted in full["reports"].items():
        found = bare["reports"][name]
        for key in netcal:
            assert found["calibration"][key] is None
            seen += wanted["calibration"][key] is not None
            wanted["calibration"][key] = None
        assert found == wanted, name
    assert seen == 3 * 4  # the four classifiers have all three where netcal is installed


def test_importing_the_package_is_free():
    code = "import sys, flataudit; print(*sorted({n.partition('.')[0] for n in sys.modules}))"
    loaded = set(python(code).split())
    assert "flataudit" in loaded
    assert not loaded & {"torch", "numpy", "scipy", *BLOCKED}


IMPORTS = [
    "import flataudit; import flataudit.audit",
    "import flataudit.audit; import flataudit",
    "from flataudit import audit; import flataudit.audit, flataudit",
    "import flataudit; flataudit.audit; from flataudit.audit import LEVEL",
]


def test_audit_stays_callable():
    """Importing the module of the same name does not shadow the function, in whichever order.

    One interpreter, in which the package is new each time and what it stands on is not.
    """
    code = (
        "import inspect, sys\n"
        f"for imports in {IMPORTS!r}:\n"
        "    for name in [n for n in sys.modules if n.partition('.')[0] == 'flataudit']:\n"
        "        del sys.modules[name]\n"
        "    exec(imports, found := {})\n"
        "    exec('import torch, flataudit.audit as module', found)\n"
        "    torch, package, module = found['torch'], found['flataudit'], found['module']\n"
        "    x, y = torch.randn(9, 2), torch.arange(9) % 2\n"
        "    for audit in (package.audit, module, module.audit):\n"
        "        assert 'heldout' in inspect.signature(audit).parameters\n"
        "        print(audit(torch.nn.Linear(2, 2), (x, y), penalty=0.1).family)\n"
    )
    assert python(code).split() == ["categorical"] * 12


def test_public_names():
    code = (
        "import flataudit\n"
        "print(*sorted(flataudit.__all__), *[getattr(flataudit, n).__name__ for n in"
        " sorted(flataudit.__all__)])"
    )
    names = python(code).split()
    classes = ["AuditReport", "FlatauditError", "InputError", "TrainingRecorder"]
    assert names[:6] == [*classes, "audit", "log_training"]
    assert names[6:10] == classes


def test_unknown_name():
    import flataudit

    with pytest.raises(AttributeError, match="no attribute 'audti'"):
        _ = flataudit.audti
