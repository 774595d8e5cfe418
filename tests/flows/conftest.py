"""One Prefect server for all tests of the flows; every test here is marked `flow`."""

import logging
import warnings
from pathlib import Path

import pytest

from tests.shells import ROOT


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.flow)


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """The URL of a Prefect server with a database of its own, which flows in this process use.

    Results are kept in a temporary folder too, not in the home of whoever runs the tests.
    """
    import flows  # noqa: F401  (sets Prefect's environment before Prefect is imported)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Prefect's own imports
        from prefect.settings import (
            PREFECT_API_URL,
            PREFECT_HOME,
            PREFECT_LOCAL_STORAGE_PATH,
            PREFECT_LOGGING_LEVEL,
            temporary_settings,
        )
        from prefect.testing.utilities import prefect_test_harness

        home = tmp_path_factory.mktemp("prefect")
        own = {
            PREFECT_HOME: home,
            PREFECT_LOCAL_STORAGE_PATH: home / "storage",
            PREFECT_LOGGING_LEVEL: "ERROR",
        }
        with temporary_settings(own), prefect_test_harness(server_startup_timeout=120):
            yield PREFECT_API_URL.value()


@pytest.fixture(autouse=True)
def _here(monkeypatch, tmp_path):
    """An empty working folder; this tree for child processes; MLflow at no store afterwards."""
    import mlflow

    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    logging.getLogger("mlflow.pytorch").setLevel(logging.ERROR)
    yield
    mlflow.set_tracking_uri(None)
