"""What every test needs.

Tests mirror `flataudit/` and `flows/`. The folders hold no `__init__.py`: pytest runs with
`--import-mode=importlib`, so files of the same name may stand in different folders. Helpers are
imported from the repository root, which `pythonpath` in pyproject.toml puts on the path:
`from tests.cases import ...`.
"""

import logging
import os
from pathlib import Path

import pytest

from tests.servers import mlflow_url, postgresql_url, sqlite_url  # noqa: F401  (fixtures)

# One thread: several processes share the cores, and a fork after a threaded operation can hang.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
# Tests never talk to the stores and servers of whoever runs them.
for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "MLFLOW_RUN_ID", "PREFECT_API_URL"):
    os.environ.pop(name, None)


DEFAULT_STORE = Path("mlflow.db").absolute()


@pytest.fixture(autouse=True)
def _heard():
    """A command that runs in this process keeps the package's lines from others; tests listen."""
    package = logging.getLogger("flataudit")
    before = package.propagate
    yield
    package.propagate = before


@pytest.fixture(autouse=True)
def _leaves_no_store():
    """MLflow, pointed at nothing, makes a database where it stands: in whoever's tree that is."""
    there = DEFAULT_STORE.exists()
    yield
    assert there or not DEFAULT_STORE.exists(), f"{DEFAULT_STORE} was made by this test"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked gpu on a machine without one."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
