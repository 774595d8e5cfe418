"""Where MLflow's data lives: the tracking URI, the embedded store, experiments and their errors.

The embedded store keeps its database and its artifacts side by side in one folder; nothing is
ever written to `mlflow.db` or `mlruns` in the working folder because no URI was set.
"""

from __future__ import annotations

import atexit
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from flataudit.errors import FlatauditError, StoreError

STORE_VARIABLE = "FLATAUDIT_STORE"
DEFAULT_STORE = "flataudit-store"
DATABASE, ARTIFACTS = "mlflow.db", "artifacts"

_SQLITE = "sqlite:///"


def embedded_store(folder: Path | str) -> str:
    """The tracking URI of the store in `folder`, made where there is none yet.

    Database `mlflow.db` and artifacts in `artifacts` beside it, those of the experiment
    `Default` included.

    Raises:
        StoreError: the folder cannot be made or the database in it cannot be opened.
    """
    path = Path(folder).expanduser().resolve()
    uri = f"{_SQLITE}{path / DATABASE}"
    with store_errors(f"open the embedded store in {path}"):
        path.mkdir(parents=True, exist_ok=True)
        if not (path / DATABASE).exists():
            _make_database(path)
    return uri


def _make_database(folder: Path) -> None:
    """Made apart and put in place whole: of several processes at once the first one's counts, and
    none sees tables half made, or makes the first experiment with another artifact root."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    with tempfile.TemporaryDirectory(prefix=".new-", dir=folder) as apart:
        made = Path(apart) / DATABASE
        # The artifact root is fixed when the first experiment is made, which happens here.
        SqlAlchemyStore(f"{_SQLITE}{made}", (folder / ARTIFACTS).as_uri()).engine.dispose()
        with suppress(FileExistsError):
            os.link(made, folder / DATABASE)


def use_tracking(uri: str | None = None) -> str:
    """Points MLflow at a store and returns its URI.

    The argument, else MLFLOW_TRACKING_URI, else the embedded store in the folder named by
    FLATAUDIT_STORE (./flataudit-store). The registry is MLFLOW_REGISTRY_URI, else the same store.

    Raises:
        StoreError: a sqlite database that does not exist (MLflow would make an empty one), or an
            embedded store that cannot be made.
    """
    # No progress bars of MLflow among ours, and no links to runs on stdout: that is for the JSON.
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    chosen = uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not chosen:
        chosen = embedded_store(os.environ.get(STORE_VARIABLE) or DEFAULT_STORE)
    database = _sqlite_file(chosen)
    if database is not None:
        if not database.is_file():
            raise StoreError(
                f"expected an MLflow database at {database}, got no such file; check the tracking"
                f" URI, or leave it out to use the store in ./{DEFAULT_STORE}"
            )
        _, mark, query = chosen.partition("?")
        chosen = f"{_SQLITE}{database}{mark}{query}"
    with store_errors("set the tracking URI"):
        import mlflow

        mlflow.set_tracking_uri(chosen)
    return chosen


def ensure_experiment(name: str) -> str:
    """The id of the experiment `name`, made where there is none.

    With a sqlite store its artifacts go beside the database; a server decides itself.

    Raises:
        StoreError: the store cannot be read or written, or the experiment was deleted.
    """
    with store_errors(f"open the experiment {name!r}"):
        import mlflow
        from mlflow.exceptions import MlflowException

        client = mlflow.MlflowClient()
        found = client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(client.create_experiment(name, artifact_location=_artifacts_for(name)))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = client.get_experiment_by_name(name)  # someone else was faster
        if found is None or found.lifecycle_stage != "active":
            raise StoreError(
                f"expected an active experiment {name!r}, got a deleted one; restore it"
                " (mlflow experiments restore) or delete it for good (mlflow gc)"
            )
        return str(found.experiment_id)


@contextmanager
def store_errors(action: str) -> Iterator[None]:
    """Turns whatever MLflow, its database or its artifact store raises into one StoreError line.

    Wrap calls to the store only: any error counts as the store's.
    """
    try:
        yield
    except FlatauditError:
        raise
    except Exception as error:
        raise StoreError(
            f"could not {action}: {one_line(error)}; check the tracking URI and that the store"
            " can be reached and written"
        ) from error


def scratch_folder() -> str:
    """A new temporary folder, removed when the process ends."""
    return tempfile.mkdtemp(dir=_scratch_root())


def one_line(error: BaseException) -> str:
    """An error's first line, at most 200 characters, without passwords in URLs."""
    lines = str(error).strip().splitlines()
    if len(lines) > 1 and lines[0].startswith("(raised as a result of Query-invoked autoflush"):
        del lines[0]  # SQLAlchemy says what went wrong after that
    text = lines[0].strip() if lines else ""
    return without_password(text)[:200] or type(error).__name__


def without_password(text: str) -> str:
    """Text with `user:password@` removed from the URLs in it.

    >>> without_password("http://me:secret@host:5000/x failed")
    'http://host:5000/x failed'
    """
    return re.sub(r"(?<=://)[^/\s@]*@", "", text)


def _sqlite_file(uri: str) -> Path | None:
    """The database file of a sqlite URI, absolute; None for every other store."""
    if not uri.startswith(_SQLITE):
        return None
    name = uri.removeprefix(_SQLITE).partition("?")[0]
    return Path(name).absolute() if name and name != ":memory:" else None


def _artifacts_for(name: str) -> str | None:
    import mlflow

    database = _sqlite_file(mlflow.get_tracking_uri())
    if database is None:
        return None
    return (database.parent / ARTIFACTS / re.sub(r"[^\w.-]+", "-", name)).as_uri()


@cache
def _scratch_root() -> str:
    folder = tempfile.mkdtemp(prefix="flataudit-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
