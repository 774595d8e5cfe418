"""MLflow's transformers flavor: classifiers are audited, everything else refused by name."""

from __future__ import annotations

import json
import sys

import pytest
import yaml

from flataudit.errors import InputError
from flataudit.models.registry import load_model, resolve

SETTINGS = {
    "pipeline_model_type": "BertForSequenceClassification",
    "model_binary": "model",
    "task": "text-classification",
}


def saved(folder, *, weights=True, **changed):
    """An MLmodel file of the flavor; that real ones load is a row of docs/matrix.md."""
    flavors = {"transformers": SETTINGS | changed, "python_function": {"loader_module": "x"}}
    (folder / "MLmodel").write_text(yaml.safe_dump({"flavors": flavors}))
    if weights:
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    return resolve(str(folder))


def message(source):
    with pytest.raises(InputError) as caught:
        load_model(source)
    text = str(caught.value)
    assert text.startswith("expected")
    return text


def test_other_kinds_of_pipelines(tmp_path):
    source = saved(tmp_path, pipeline_model_type="GPT2LMHeadModel")
    assert "got GPT2LMHeadModel: what it was fitted to is not one label" in message(source)


def test_weights_that_are_not_among_the_files(tmp_path):
    assert "got a reference to a hub" in message(saved(tmp_path, weights=False))


def test_without_the_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "transformers.utils", None)
    assert "expected the transformers library" in message(saved(tmp_path))


def test_files_that_do_not_load(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "expected a transformers model that loads from" in message(saved(tmp_path))
