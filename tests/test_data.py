import itertools
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pandas as pd
import pytest
import torch
from mlflow.data.dataset_source import DatasetSource
from mlflow.data.dataset_source_registry import register_dataset_source
from mlflow.data.http_dataset_source import HTTPDatasetSource

from flataudit.data import digest_of, load_data
from flataudit.errors import InputError
from flataudit.models.registry import ModelSource, resolve
from flataudit.tensors import as_pair, digest
from tests.mlflow_store import make_store, tracking

X = np.arange(12.0, dtype=np.float32).reshape(4, 3)
Y = np.array([0, 1, 1, 0])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("good.npz", x=X, y=Y)
    frame = pd.DataFrame({"a": [1, 2, 3], "b": [0.5, 1.5, 2.5], "label": [0, 1, 1]})
    frame.to_csv("good.csv", index=False)
    frame.to_parquet("good.parquet")
    return tmp_path


def test_npz_keeps_the_dtypes(folder):
    data = load_data("good.npz")
    assert data.x.dtype == np.float32
    assert data.y.dtype == np.int64
    np.testing.assert_array_equal(data.x, X)
    np.testing.assert_array_equal(data.pair[1], Y)
    assert data.origin == str(folder / "good.npz")
    assert data.tag_sha256 is None


@pytest.mark.parametrize("name", ["good.csv", "good.parquet"])
def test_tables_give_float_features_and_typed_labels(folder, name):
    data = load_data(name, target="label")
    np.testing.assert_array_equal(data.x, [[1, 0.5], [2, 1.5], [3, 2.5]])
    np.testing.assert_array_equal(data.y, [0, 1, 1])
    assert (data.x.dtype, data.y.dtype) == (np.float64, np.int64)
    assert load_data(name, target="b").y.dtype == np.float64


def test_nullable_and_boolean_columns(folder):
    frame = pd.DataFrame({"a": pd.array([1, None, 3], dtype="Int64"), "t": [True, False, True]})
    frame.to_parquet("odd.parquet")
    data = load_data("odd.parquet", target="t")
    np.testing.assert_array_equal(data.x, [[1], [np.nan], [3]])
    assert data.y.dtype == np.bool_


def test_function(folder):
    (folder / "my_data.py").write_text(
        "import torch\n"
        "def train(): return torch.ones(4, 2, requires_grad=True), [0, 1, 0, 1]\n"
        "def three(): return 1, 2, 3\n"
        "def text(): return ['a'], ['b']\n"
        "def broken(): raise KeyError('speed')\n"
        "number = 3\n"
    )
    try:
        data = load_data("my_data:train")
        np.testing.assert_array_equal(data.x, np.ones((4, 2)))
        np.testing.assert_array_equal(data.y, [0, 1, 0, 1])
        for spec, message in {
            "my_data:three": "got tuple; return two arrays",
            "my_data:text": "got dtype <U1",
            "my_data:broken": "got KeyError: 'speed'",
            "my_data:number": "expected a function number in my_data, got int",
            "my_data:absent": "expected a function absent in my_data, got no such name",
            "no_such_module:f": "got: No module named 'no_such_module'",
        }.items():
            with pytest.raises(InputError) as caught:
                load_data(spec)
            assert message in str(caught.value)
            assert "\n" not in str(caught.value)
    finally:
        sys.modules.pop("my_data", None)
        sys.path[:] = [entry for entry in sys.path if entry != str(folder)]


BAD = {
    "missing.npz": (None, "expected a data file at missing.npz, got none"),
    "empty.npz": (None, "got an empty file"),
    "empty.csv": ("y", "got an empty file"),
    "broken.npz": (None, "expected a numpy .npz file"),
    "one_array.npz": (None, "got one array"),
    "names.npz": (None, "got a, b; add x and y"),
    "objects.npz": (None, "without pickled objects"),
    "broken.parquet": ("y", "expected a table in broken.parquet, got: "),
    "good.csv": (None, "got no --target; choose from: a, b, label"),
    "good.parquet": ("c", "got --target c; choose from: a, b, label"),
    "text.csv": ("y", "got text or dates in city"),
    "header.csv": ("y", "got 0 rows and 1 features"),
    "single.csv": ("y", "got 2 rows and 0 features"),
    "gaps.csv": ("y", "expected a value of y in each row of gaps.csv, got 1 missing"),
    "data.txt": (None, "got 'data.txt'"),
    "my_data:": (None, "got 'my_data:'"),
}


@pytest.mark.parametrize("spec", BAD)
def test_bad_data_is_one_line_of_input_error(folder, spec):
    for name in ("empty.npz", "empty.csv"):
        (folder / name).touch()
    (folder / "broken.npz").write_bytes(b"PK\x03\x04 not a zip")
    (folder / "broken.parquet").write_bytes(b"not a parquet file")
    np.save("array.npy", X)
    (folder / "array.npy").rename("one_array.npz")
    np.savez("names.npz", a=X, b=Y)
    np.savez("objects.npz", x=np.array([{}, {}]), y=Y, allow_pickle=True)
    (folder / "text.csv").write_text("city,y\nRome,1\nOslo,0\n")
    (folder / "header.csv").write_text("a,y\n")
    (folder / "single.csv").write_text("y\n1\n2\n")
    (folder / "gaps.csv").write_text("a,y\n1,0\n2,\n3,1\n")
    (folder / "data.txt").write_text("1 2 3")
    target, message = BAD[spec]
    with pytest.raises(InputError) as caught:
        load_data(spec, target=target)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_digest_is_the_report_s():
    assert digest_of(X, Y) == digest(*as_pair((X, Y), "train"))
    assert digest_of(torch.from_numpy(X), Y) == digest_of(X, Y) != digest_of(X + 1, Y)


# --- several inputs -----------------------------------------------------------------------------

IDS = np.arange(8).reshape(4, 2)
MASK = np.array([[True, False]] * 4)


def test_npz_with_named_inputs(folder):
    np.savez("named.npz", ids=IDS, mask=MASK, y=Y)
    data = load_data("named.npz")
    assert isinstance(data.x, dict)
    assert list(data.x) == ["ids", "mask"]
    assert (data.x["ids"].dtype, data.x["mask"].dtype) == (np.int64, np.bool_)
    np.testing.assert_array_equal(data.y, Y)
    # One array beside y is the model's one input, whatever it is called: it goes by position.
    np.savez("one.npz", features=X, y=Y)
    np.testing.assert_array_equal(load_data("one.npz").x, X)
    assert digest_of(*load_data("one.npz").pair) == digest_of(X, Y)
    np.savez("both.npz", x=X, ids=IDS, y=Y)
    np.testing.assert_array_equal(load_data("both.npz").x, X)


def test_function_with_several_inputs(folder):
    (folder / "my_inputs.py").write_text(
        "import numpy as np, torch\n"
        "def named(): return {'ids': torch.ones(3, 2).long(), 'scale': [1., 2., 3.]}, [0, 1, 0]\n"
        "def placed(): return (np.ones((3, 2)), torch.ones(3)), [0, 1, 0]\n"
        "def nested(): return ((1, 2), (3, 4), (5, 6)), [0, 1, 0]\n"
        "def text(): return {'ids': ['a'], 'mask': [1]}, [0]\n"
    )
    try:
        named = load_data("my_inputs:named")
        assert {k: (v.shape, v.dtype) for k, v in named.x.items()} == {
            "ids": ((3, 2), np.int64),
            "scale": ((3,), np.float64),
        }
        placed = load_data("my_inputs:placed").x
        assert isinstance(placed, tuple)
        assert [array.shape for array in placed] == [(3, 2), (3,)]
        assert load_data("my_inputs:nested").x.shape == (3, 2)
        with pytest.raises(InputError, match="numbers for ids in x of my_inputs:text, got dtype"):
            load_data("my_inputs:text")
    finally:
        sys.modules.pop("my_inputs", None)
        sys.path[:] = [entry for entry in sys.path if entry != str(folder)]


def test_digest_of_named_inputs():
    x = {"mask": MASK, "ids": IDS}
    assert digest_of(x, Y) == digest_of(dict(reversed(x.items())), Y) != digest_of((MASK, IDS), Y)


# --- mlflow -------------------------------------------------------------------------------------


@pytest.fixture
def store():
    made = make_store()
    with tracking(made.uri):
        yield made


@pytest.fixture
def run_with(store, tmp_path):
    """A new run with one logged dataset (its source, context and tags), as a model's source.

    Each dataset has its own name: in one experiment MLflow keeps a name and digest once, with the
    source that was logged first.
    """
    import mlflow

    numbers = itertools.count()

    def make(source, *, context="training", tags=None, times=1):
        client = mlflow.MlflowClient()
        run = client.create_run(client.get_experiment_by_name("training").experiment_id)
        with mlflow.start_run(run_id=run.info.run_id):
            for _ in range(times):
                name = f"{tmp_path.name}-{next(numbers)}"
                dataset = mlflow.data.from_numpy(X, targets=Y, source=source, name=name)
                mlflow.log_input(dataset, context=context, tags=tags)
        return ModelSource("models:/x/1", "registry", "pytorch", "/x", run_id=run.info.run_id)

    return make


def test_mlflow_finds_the_training_data_of_the_source_run(store):
    data = load_data("mlflow", source=resolve("models:/digits@champion"))
    np.testing.assert_array_equal(data.x, store.x)
    np.testing.assert_array_equal(data.y, store.y)
    assert data.x.dtype == np.float32
    assert data.tag_sha256 == digest_of(store.x, store.y)
    assert data.origin == f"mlflow: dataset train of run {store.run_id}"


def test_mlflow_local_files_and_target_tag(folder, run_with):
    table = run_with(str(folder / "good.csv"), tags={"target": "label"}, context="train")
    np.testing.assert_array_equal(load_data("mlflow", source=table).y, [0, 1, 1])
    assert load_data("mlflow", source=table, target="a").y.tolist() == [1, 2, 3]
    assert load_data("mlflow", source=table).tag_sha256 is None
    archive = run_with(str(folder / "good.npz"), tags={"sha256": "abc"})
    assert load_data("mlflow", source=archive).tag_sha256 == "abc"


def test_mlflow_that_cannot_be_loaded(folder, run_with, store):
    good = str(folder / "good.npz")
    cases = [
        (run_with(None), "got one logged without a source"),
        (run_with(good, context="validation"), "expected a dataset with the context 'training'"),
        (run_with(good, times=2), "got 2 ("),
        (run_with(str(folder / "gone.npz")), "gone.npz"),
        (run_with(str(folder / "good.csv")), "got no --target"),
        (None, "expected a model with a source run"),
        (ModelSource("/x", "folder", "pytorch", "/x"), "expected a model with a source run"),
        (
            ModelSource("/x", "folder", "pytorch", "/x", run_id="0" * 32),
            "got none in this store; give the file with --train",
        ),
    ]
    for source, message in cases:
        with pytest.raises(InputError) as caught:
            load_data("mlflow", source=source)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.fixture
def address(folder, monkeypatch):
    """The address of a server over the folder's files."""
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *args: None)
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_mlflow_data_from_an_address(run_with, address):
    table = run_with(HTTPDatasetSource(f"{address}/good.csv"), tags={"target": "label"})
    assert load_data("mlflow", source=table).y.tolist() == [0, 1, 1]
    archive = run_with(HTTPDatasetSource(f"{address}/good.npz"))
    np.testing.assert_array_equal(load_data("mlflow", source=archive).x, X)
    gone = run_with(HTTPDatasetSource(f"{address}/gone.npz"))
    with pytest.raises(InputError, match=r"to load the dataset .* got: .*404"):
        load_data("mlflow", source=gone)


def test_mlflow_data_in_a_folder(folder, run_with):
    (folder / "one").mkdir()
    (folder / "good.csv").rename(folder / "one" / "part.csv")
    found = load_data("mlflow", source=run_with(str(folder / "one")), target="label")
    assert found.y.tolist() == [0, 1, 1]
    with pytest.raises(InputError, match=r"expected a .npz, .csv or .parquet file"):
        load_data("mlflow", source=run_with(str(folder)), target="label")


class Loaded:
    """What a source of tables loads: Hugging Face has to_pandas, Spark toPandas."""

    def __init__(self, kind):
        frame = pd.DataFrame({"a": [1, 2, 3], "label": ["no", "yes", "yes"]})
        made = {"to_pandas": lambda: frame, "toPandas": lambda: frame, "fails": self.fails}
        if kind != "object":
            setattr(self, kind if kind != "fails" else "to_pandas", made[kind])

    def fails(self):
        raise RuntimeError("no session\nat all")


class TableSource(DatasetSource):
    """A source of MLflow's plugin interface that loads an object, not a file."""

    def __init__(self, kind):
        self.kind = kind

    @staticmethod
    def _get_source_type():
        return "table_of_a_test"

    def load(self, **kwargs):
        return Loaded(self.kind)

    @staticmethod
    def _can_resolve(raw_source):
        return False

    @classmethod
    def _resolve(cls, raw_source):
        return cls(raw_source)

    def to_dict(self):
        return {"kind": self.kind}

    @classmethod
    def from_dict(cls, source_dict):
        return cls(source_dict["kind"])


def test_mlflow_data_that_load_as_tables(run_with):
    register_dataset_source(TableSource)
    for kind in ("to_pandas", "toPandas"):
        found = load_data("mlflow", source=run_with(TableSource(kind)), target="label")
        assert found.x.tolist() == [[1.0], [2.0], [3.0]]
        assert found.y.tolist() == ["no", "yes", "yes"]
    for kind, message in {
        "object": "got Loaded from a table_of_a_test source",
        "fails": "as a table, got: no session;",
    }.items():
        with pytest.raises(InputError) as caught:
            load_data("mlflow", source=run_with(TableSource(kind)), target="label")
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="column of the dataset"):
        load_data("mlflow", source=run_with(TableSource("to_pandas")))
