"""Pipelines over tables: columns by name, from the registry to the finished audit."""

from __future__ import annotations

import sys

import mlflow
import numpy as np
import pandas as pd
import pytest
from sklearn.compose import ColumnTransformer
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

import flataudit
from flataudit.config import AuditOptions
from flataudit.errors import InputError
from flataudit.stages import run_audit
from tests.mlflow_store import make_store, tracking
from tests.sklearn_cases import RNG, TIGHT

N = 90
TRUSTED = ["numpy.dtype", "sklearn.compose._column_transformer._RemainderColsList"]
NUMBERS, WORDS = ["age", "income"], ["city", "plan"]


@pytest.fixture(scope="module", autouse=True)
def _store():
    with tracking(make_store().uri):
        yield


@pytest.fixture(scope="module")
def frame():
    """Numbers with gaps, words, and a label as text."""
    made = pd.DataFrame(
        {
            "age": RNG.normal(40, 9, N),
            "city": RNG.choice(["Oslo", "Rome", "Łódź"], N),
            "income": RNG.normal(3, 1, N),
            "plan": RNG.choice(["a", "b"], N),
        }
    )
    score = made["age"] / 9 + 2 * (made["city"] == "Oslo") + RNG.logistic(size=N)
    made["left"] = np.where(score > score.median(), "yes", "no")
    made.loc[::7, "income"] = np.nan
    return made


def pipeline(frame):
    columns = ColumnTransformer(
        [
            ("numbers", make_pipeline(SimpleImputer(), StandardScaler()), NUMBERS),
            ("words", OneHotEncoder(handle_unknown="ignore"), WORDS),
        ]
    )
    model = make_pipeline(columns, LogisticRegression(C=0.4, **TIGHT))
    return model.fit(frame.drop(columns="left"), frame["left"])


def registered(model, name, serialization_format):
    with mlflow.start_run(
        experiment_id=mlflow.get_experiment_by_name("training").experiment_id
    ) as run:
        mlflow.sklearn.log_model(
            model,
            name=name,
            registered_model_name=name,
            serialization_format=serialization_format,
            pip_requirements=["scikit-learn"],
            skops_trusted_types=[
                "numpy.dtype",
                "sklearn.compose._column_transformer._RemainderColsList",
            ],
        )
    return run.info.run_id


def audited(name, train, heldout=None, **options):
    options = {"target": "left", "training": "auto"} | options
    return run_audit(f"models:/{name}/1", train, heldout, AuditOptions(**options))["report"]


@pytest.mark.parametrize("serialization_format", ["skops", "cloudpickle"])
def test_a_table_is_audited_by_its_columns(frame, tmp_path, serialization_format):
    model, name = pipeline(frame), f"table_{serialization_format}"
    registered(model, name, serialization_format)
    wanted = flataudit.audit(model, (frame.drop(columns="left"), frame["left"].to_numpy()))
    frame.to_csv(tmp_path / "train.csv", index=False)
    frame[:40].to_parquet(tmp_path / "held.parquet")
    # Another order, and columns that the model does not know.
    shuffled = frame[["left", "plan", "income", "city", "age"]].assign(id=range(N))
    shuffled.to_parquet(tmp_path / "train.parquet")
    held = str(tmp_path / "held.parquet")
    for file, notes in (("train.csv", 1), ("train.parquet", 2)):
        report = audited(name, str(tmp_path / file), held)
        assert report["gap"]["value"] == pytest.approx(wanted.gap.value, rel=1e-9)
        assert report["penalty"]["source"] == "estimator"
        assert report["penalty"]["stationarity"] < 1e-4
        assert report["model"]["n_params"] == 8
        assert report["data"]["heldout_samples"] == 40
        assert len(report["model"]["notes"]) == notes
    assert "'id'" in report["model"]["notes"][1]
    tags = mlflow.MlflowClient().get_model_version(name, "1").tags
    assert tags["flataudit.verdict"] in ("pass", "warn")


def test_a_table_that_lacks_a_column(frame, tmp_path):
    registered(pipeline(frame), "lacking", "cloudpickle")
    frame.drop(columns="plan").to_csv(tmp_path / "train.csv", index=False)
    with pytest.raises(InputError, match="expected a column 'plan' in train x, which the") as error:
        audited("lacking", str(tmp_path / "train.csv"))
    assert "\n" not in str(error.value)


def test_a_city_that_was_never_seen(frame, tmp_path):
    """The transformer refuses it: its own words, in one line."""
    strict = make_pipeline(
        ColumnTransformer([("words", OneHotEncoder(), WORDS)]), LogisticRegression(**TIGHT)
    ).fit(frame.drop(columns="left"), frame["left"])
    registered(strict, "strict", "cloudpickle")
    frame.to_csv(tmp_path / "train.csv", index=False)
    frame[:9].assign(city="Paris").to_csv(tmp_path / "held.csv", index=False)
    with pytest.raises(InputError, match="expected heldout x that the estimator accepts") as error:
        audited("strict", str(tmp_path / "train.csv"), str(tmp_path / "held.csv"))
    assert "Paris" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_search_over_numbers_fitted_without_names(frame, tmp_path):
    """An estimator fitted to arrays takes the table's columns in their order."""
    numbers = frame[[*NUMBERS, "left"]].fillna(3.0)
    inner = make_pipeline(StandardScaler(), LogisticRegression(**TIGHT))
    search = GridSearchCV(inner, {"logisticregression__C": [0.1, 1.0]}, cv=3)
    x, y = numbers[NUMBERS].to_numpy(), numbers["left"].to_numpy()
    search.fit(x, y)
    registered(search, "unnamed", "cloudpickle")
    numbers.to_csv(tmp_path / "train.csv", index=False)
    report = audited("unnamed", str(tmp_path / "train.csv"))
    wanted = flataudit.audit(search, (x, y))
    assert report["gap"]["value"] == pytest.approx(wanted.gap.value, rel=1e-9)
    assert report["data"]["sha256"] == wanted.data.sha256


def test_the_dataset_of_the_source_run(frame, tmp_path):
    """`--train mlflow` with a table behind it, and the column named by the dataset's tag."""
    run_id = registered(pipeline(frame), "logged_table", "cloudpickle")
    frame.to_parquet(tmp_path / "train.parquet")
    with mlflow.start_run(run_id=run_id):
        data = mlflow.data.from_pandas(
            frame,
            source=str(tmp_path / "train.parquet"),
            targets="left",
            name="people",
            digest="a",  # MLflow's own computation warns under pandas 3
        )
        mlflow.log_input(data, context="training", tags={"target": "left", "sha256": "of the file"})
    report = audited("logged_table", "mlflow", target=None)
    assert report["penalty"]["source"] == "estimator"
    assert "data_mismatch" not in [warning["code"] for warning in report["warnings"]]


def test_a_written_record_wins_over_the_estimator_s_settings(frame, tmp_path):
    run_id = registered(pipeline(frame), "recorded", "cloudpickle")
    record = {"optimizer": "sgd", "sum_lr": 100.0, "weight_decay": 0.02}
    mlflow.MlflowClient().log_dict(run_id, record, "flataudit/training.json")
    frame.to_csv(tmp_path / "train.csv", index=False)
    penalty = audited("recorded", str(tmp_path / "train.csv"))["penalty"]
    assert (penalty["source"], penalty["value"]) == ("training", pytest.approx(0.03))


@pytest.fixture
def texts():
    words = np.array(["good", "bad", "film", "plot", "long"])
    made = [" ".join(RNG.choice(words, 6)) for _ in range(60)]
    return made, ["yes" if text.count("good") > text.count("bad") else "no" for text in made]


def test_texts_from_a_file_and_from_a_function(texts, tmp_path, monkeypatch):
    model = make_pipeline(TfidfVectorizer(), LogisticRegression(**TIGHT)).fit(*texts)
    registered(model, "texts", "cloudpickle")
    wanted = flataudit.audit(model, texts)
    pd.DataFrame({"left": texts[1], "text": texts[0]}).to_csv(tmp_path / "t.csv", index=False)
    (tmp_path / "texts_of_a_test.py").write_text(f"def load(): return {texts!r}\n")
    monkeypatch.syspath_prepend(tmp_path)
    for train in (str(tmp_path / "t.csv"), "texts_of_a_test:load"):
        report = audited("texts", train)
        assert report["gap"]["value"] == pytest.approx(wanted.gap.value, rel=1e-9)
        assert report["data"]["n_samples"] == 60
    assert "texts_of_a_test" not in sys.modules  # only the audit's own process imports it


def test_tables_and_sparse_matrices_from_a_function(frame, tmp_path, monkeypatch):
    registered(pipeline(frame), "by_function", "cloudpickle")
    frame.to_pickle(tmp_path / "frame.pkl")
    (tmp_path / "tables_of_a_test.py").write_text(
        "import numpy as np, pandas as pd\n"
        "from scipy import sparse\n"
        f"frame = pd.read_pickle({str(tmp_path / 'frame.pkl')!r})\n"
        "def table(): return frame.drop(columns='left'), frame['left'].to_numpy()\n"
        "def matrix(): return sparse.csr_array(np.eye(30, 4)), np.arange(30) % 2\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    wanted = flataudit.audit(
        pipeline(frame), (frame.drop(columns="left"), frame["left"].to_numpy())
    )
    report = audited("by_function", "tables_of_a_test:table")
    assert report["gap"]["value"] == pytest.approx(wanted.gap.value, rel=1e-9)
    x, y = np.eye(30, 4), np.arange(30) % 2
    registered(LogisticRegression(**TIGHT).fit(x, y), "sparse", "cloudpickle")
    report = audited("sparse", "tables_of_a_test:matrix")
    assert report["penalty"]["stationarity"] < 1e-4
