"""Names from outside are shown, never run: in the page, the terminal, Markdown and file names."""

from __future__ import annotations

import html.parser
import re
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from flataudit import sweeps, tracking
from flataudit.config import AuditOptions
from flataudit.errors import DeadlineError, FlatauditError, InputError
from flataudit.models.registry import resolve
from flataudit.report import terminal
from flataudit.stages import run_audit
from flataudit.versions import BEGIN, END, markdown_text
from tests.mlflow_store import make_store
from tests.mlflow_store import tracking as pointed_at
from tests.sklearn_cases import RNG, TIGHT

HTML = "<img src=x onerror=alert(1)>"
MARKDOWN = "[click](b) ![i](j) `c` **b** # h | t"
SHELL = "$(touch pwned) `touch pwned` ; touch pwned"
CONTROL = "\x1b[31mred\x1b]0;title\x07\r\x9b2J\u202e"
NAMES = {"html": HTML, "markdown": MARKDOWN, "shell": SHELL, "control": CONTROL, "newline": "a\nb"}


class Tags(html.parser.HTMLParser):
    """Every element and attribute of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))


def assert_nothing_runs(page):
    for tag, attributes in Tags(page).seen:
        assert tag not in ("script", "iframe", "object", "embed", "base", "form"), tag
        assert not [name for name in attributes if name.startswith("on")], attributes
        for key in ("src", "href", "xlink:href"):
            address = attributes.get(key) or "#"
            assert re.match(r"#|data:image/|https?://", address), address
    assert "src=x" not in page.replace("&lt;img src=x", "")


@pytest.fixture(scope="module", autouse=True)
def _store():
    with pointed_at(make_store().uri):
        yield


@pytest.fixture(scope="module")
def strange():
    """A table whose columns and classes have every kind of name."""
    names = [*NAMES.values(), "plain"]
    frame = pd.DataFrame(RNG.normal(size=(80, len(names))), columns=names)
    score = frame.to_numpy() @ RNG.normal(size=len(names))
    frame["label"] = np.where(score + RNG.logistic(size=80) > 0, HTML, MARKDOWN)
    return frame


@pytest.fixture(scope="module")
def audited(strange, tmp_path_factory):
    """An audit of a version with a name of HTML, Markdown and shell, with shifted held-out data."""
    folder = tmp_path_factory.mktemp("data")
    x, y = strange.drop(columns="label"), strange["label"]
    model = make_pipeline(StandardScaler(), LogisticRegression(**TIGHT)).fit(x, y)
    name = f"{HTML} [click](b) $(touch pwned)"
    with mlflow.start_run(
        experiment_id=mlflow.get_experiment_by_name("training").experiment_id, run_name=HTML
    ):
        mlflow.sklearn.log_model(
            model,
            name="escaped",
            registered_model_name=name,
            serialization_format="cloudpickle",
            pip_requirements=["scikit-learn"],
        )
    client = MlflowClient()
    client.set_model_version_tag(name, "1", "owner", HTML)
    client.update_model_version(name, "1", f"By hand: {HTML} {BEGIN}")
    train, held = folder / f"{HTML} {SHELL}.parquet", folder / "held.parquet"
    strange.to_parquet(train)
    shifted = strange.copy()
    shifted[list(NAMES.values())] += 5.0
    shifted.to_parquet(held)
    found = run_audit(f"models:/{name}/1", str(train), str(held), AuditOptions(target="label"))
    return name, found


def test_the_page_shows_names_and_runs_nothing(audited):
    name, found = audited
    path = mlflow.artifacts.download_artifacts(
        run_id=found["run_id"], artifact_path="flataudit/report.html"
    )
    page = Path(path).read_text(encoding="utf-8")
    assert_nothing_runs(page)
    assert name.replace("<", "&lt;").replace(">", "&gt;") in page


def test_the_terminal_gets_no_control_characters(audited):
    _, found = audited
    features = found["report"]["shift"]
    assert features is not None
    for report in (
        found["report"],
        found["report"] | {"model": found["report"]["model"] | {"uri": f"models:/{CONTROL}/1"}},
    ):
        report["penalty"]["assumptions"].append(f"classes {CONTROL}")
        text = terminal.render(report)
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text)
    assert r"\x1b[31mred" in text


def test_the_description_keeps_what_people_wrote_and_adds_no_name(audited):
    name, _ = audited
    description = MlflowClient().get_model_version(name, "1").description
    before, title, block = description.partition("**flataudit: ")
    assert title
    assert before.strip() == f"By hand: {HTML}"
    assert END in block
    assert "<img" not in block
    assert "click" not in block
    links = re.findall(r"\]\(<?([^)>]*)", block)
    assert all(link.startswith("#/experiments/") for link in links)


@pytest.mark.parametrize("kind", NAMES)
def test_a_failure_s_words_are_escaped_in_the_description(audited, kind):
    name, _ = audited
    source = resolve(f"models:/{name}/1")
    error = DeadlineError(f"expected {NAMES[kind]} http://evil.example {END}")
    assert tracking.log_error(source, str(error)) is not None
    description = MlflowClient().get_model_version(name, "1").description
    words = description.partition("The audit failed: ")[2].partition(BEGIN)[0]
    assert words.strip()
    assert "\n" not in words
    assert not re.search(r"(?<!\\)[\[\]`*|#]", words.replace("&#8203;", ""))
    assert "<" not in words
    assert "http:" not in words
    assert description.count(END) == description.count(BEGIN) == 1


@pytest.mark.parametrize("kind", NAMES)
def test_a_sweep_s_table_has_names_and_errors_as_text(kind):
    empty = dict.fromkeys(("verdict", "gap", "low", "high"))
    name, error = f"models:/{NAMES[kind]}/1", f"expected {NAMES[kind]}"
    table = sweeps.markdown([{"model": name, "state": "failed", "error": error} | empty])
    head, rule, row = table.splitlines()
    assert len(re.findall(r"(?<!\\)\|", row)) == head.count("|") == rule.count("|")
    cells = row.partition("|")[2]
    assert not re.search(r"(?<!\\)[\[\]`*#]", cells)
    assert "<" not in cells
    assert row.isprintable()


def test_plain_text_reads_the_same_once_rendered():
    text = "a_b * 2 [x](y) <b> & 100 % \\ `c`"
    shown = re.sub(r"\\([\\`*_{}\[\]()#+!|~$])", r"\1", markdown_text(text))
    assert html.unescape(shown) == text


@pytest.mark.parametrize("kind", NAMES)
def test_errors_are_one_printable_line(kind):
    text = str(FlatauditError(f"expected a model, got {NAMES[kind]}; check the name"))
    assert text.isprintable()
    assert text.startswith("expected a model, got ")
    with pytest.raises(InputError) as caught:
        resolve(f"models:/{NAMES[kind]}")
    assert str(caught.value).isprintable()


def test_artifact_paths_lead_nowhere_else(tmp_path):
    """A path in a model's URI stays inside the run; one in a file's name is refused."""
    run_id = make_store().run_id
    for path in ("../../secrets", "%2e%2e/%2e%2e/secrets", "/etc", HTML, SHELL):
        with pytest.raises(FlatauditError) as caught:
            resolve(f"runs:/{run_id}/{path}")
        assert str(caught.value).isprintable()
    for name in ("../out", "a/b", ".hidden", HTML, "a\nb", ""):
        with pytest.raises(InputError, match="a name of letters"):
            tracking.log_training_data(run_id, np.eye(2), [0, 1], name=name)
    assert not Path("pwned").exists()
    assert list(tmp_path.iterdir()) == []


def test_the_run_s_files_have_our_names_alone(audited):
    _, found = audited
    listed = MlflowClient().list_artifacts(found["run_id"], "flataudit")
    assert all(re.fullmatch(r"flataudit/[a-z_-]+\.(html|json|png)", item.path) for item in listed)
    run = mlflow.get_run(found["run_id"])
    assert run.info.status == "FINISHED"
