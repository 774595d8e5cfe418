"""Verdicts as Prefect events, and the automation that alerts on them, by Prefect's own models."""

from datetime import UTC, datetime
from uuid import uuid4

import pytest
import yaml

from tests.audited_store import make_report
from tests.shells import ROOT

FILE = ROOT / "docs" / "automations" / "verdict-fail.yaml"


@pytest.fixture
def emitted(server, monkeypatch):
    """The event of a report, as Prefect receives it."""
    from prefect.server.events.schemas.events import ReceivedEvent

    from flows import audit

    sent = []
    monkeypatch.setattr(audit, "emit_event", lambda **event: sent.append(event))

    def emit(uri="models:/churn/3", **changes):
        sent.clear()
        audit.emit_verdict(uri, make_report(**changes), "r1")
        (event,) = sent
        return ReceivedEvent(**event, id=uuid4(), occurred=datetime.now(UTC))

    return emit


def test_the_automation_alerts_on_fail_alone(emitted):
    from prefect.server.events.schemas.automations import AutomationCore

    automation = AutomationCore(**yaml.safe_load(FILE.read_text()))
    trigger = automation.trigger
    assert trigger.covers(emitted(confidence="refused"))
    assert not trigger.covers(emitted(confidence="low"))
    assert not trigger.covers(emitted())
    assert trigger.immediate
    assert trigger.expects("flataudit.verdict.fail")


def test_its_text_says_which_model_and_why(emitted):
    from prefect.events.schemas.automations import AutomationCore
    from prefect.server.utilities.user_templates import render_user_template_sync

    (action,) = AutomationCore(**yaml.safe_load(FILE.read_text())).actions
    event = emitted(confidence="refused")
    shown = render_user_template_sync(action.body, {"event": event})
    assert "models:/churn/3: gap 0.050 [0.040, 0.060] nats per example" in shown
    assert "high_leverage" in shown
    assert "MLflow run r1" in shown
    subject = render_user_template_sync(action.subject, {"event": event})
    assert subject == "flataudit: models:/churn/3 fails its audit"


def test_no_password_in_the_event(emitted):
    event = emitted("http://me:hunter2@host/model")
    assert "hunter2" not in event.model_dump_json()
    assert event.resource.id == "flataudit.model.http://host/model"
