"""The soak of benchmarks/soak.py, small; and its published table."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import soak
from benchmarks.common.fleet import PLANTS, planted
from tests.shells import environment

ROOT = Path(__file__).parents[2]


def test_the_page_shows_what_was_measured():
    page = soak.PAGE.read_text()
    assert "<!-- table: soak -->" in page
    assert soak.published(page, json.loads(soak.RESULT.read_text())) == page


def test_every_kind_of_failure_is_planted():
    for models in (20, 200):
        found = planted(models, soak.SHARE, 0)
        assert set(found.values()) == set(PLANTS)
        assert len(found) == max(len(PLANTS), round(models * soak.SHARE))
    assert planted(200, soak.SHARE, 0) != planted(200, soak.SHARE, 1)


@pytest.mark.slow
@pytest.mark.flow
@pytest.mark.parametrize("runner", soak.RUNNERS)
def test_small(runner, tmp_path):
    """Twenty models, four of them broken, three processes killed: the script checks the rest."""
    if runner == "dask":
        pytest.importorskip("prefect_dask", reason="prefect-dask is not installed")
    out = tmp_path / "soak.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "soak.py"), "--models", "20",
               "--runners", runner, "--overhead", "0", "--out", str(out)]  # fmt: skip
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())[runner]
    assert found["checked"]["healthy_audited_once"] == 16
    assert found["checked"]["failures_named"] == 4
    assert len(found["faults"]) == 3
    assert "healthy models audited exactly once" in done.stdout
