"""Verdicts as Prefect events, and the automation that alerts on them, by Prefect's own models."""

from datetime import UTC, datetime
from uuid import uuid4

import pytest
import yaml

from flataudit.results import AuditWarning
from tests.audited_store import make_report
from tests.shells import ROOT

FILE = ROOT / "docs" / "automations" / "verdict-fail.yaml"
WORSE = ROOT / "docs" / "automations" / "model-got-worse.yaml"


@pytest.fixture
def all_emitted(server, monkeypatch):
    """The events of a report, as Prefect receives them; the verdict's is the first."""
    from prefect.server.events.schemas.events import ReceivedEvent

    from flows import audit

    sent = []
    monkeypatch.setattr(audit, "emit_event", lambda **event: sent.append(event))

    def emit(uri="models:/churn/3", **changes):
        sent.clear()
        audit.emit_verdict(uri, make_report(**changes), "r1")
        return [ReceivedEvent(**event, id=uuid4(), occurred=datetime.now(UTC)) for event in sent]

    return emit


@pytest.fixture
def emitted(all_emitted):
    """The verdict's event, and none beside it."""

    def emit(*uri, **changes):
        (event,) = all_emitted(*uri, **changes)
        return event

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


def warned(*codes, severity="warn"):
    found = [AuditWarning(code, severity, f"what {code} says") for code in codes]
    return {"warnings": tuple(found)}


def test_each_warning_above_info_is_an_event(all_emitted):
    verdict, *others = all_emitted(**warned("gap_regressed", "high_leverage"))
    assert verdict.event == "flataudit.verdict.warn"
    names = [event.event for event in others]
    assert names == ["flataudit.warning.gap_regressed", "flataudit.warning.high_leverage"]
    assert others[0].resource == verdict.resource
    assert others[0].payload["message"] == "what gap_regressed says"
    assert len(all_emitted(**warned("underconfident", severity="info"))) == 1


def test_the_automation_alerts_on_a_model_that_got_worse(all_emitted):
    from prefect.server.events.schemas.automations import AutomationCore

    trigger = AutomationCore(**yaml.safe_load(WORSE.read_text())).trigger
    assert trigger.immediate
    for code, alerts in (("gap_regressed", 1), ("calibration_refuted", 1), ("overconfident", 0)):
        found = all_emitted(**warned(code, severity="high"))
        seen = [trigger.covers(e) and trigger.expects(e.event) for e in found]
        assert sum(seen) == alerts, code


def test_the_text_says_what_got_worse(all_emitted):
    from prefect.events.schemas.automations import AutomationCore
    from prefect.server.utilities.user_templates import render_user_template_sync

    (action,) = AutomationCore(**yaml.safe_load(WORSE.read_text())).actions
    _, event = all_emitted(**warned("gap_regressed"))
    shown = render_user_template_sync(action.body, {"event": event})
    assert "models:/churn/3: what gap_regressed says." in shown
    assert "MLflow run r1" in shown
    subject = render_user_template_sync(action.subject, {"event": event})
    assert subject == "flataudit: models:/churn/3: flataudit.warning.gap_regressed"


@pytest.mark.parametrize("file", [FILE, WORSE], ids=lambda file: file.stem)
def test_the_server_takes_the_automation(server, file):
    """As `prefect automation create --from-file` sends it, with a block that exists."""
    from prefect.blocks.notifications import CustomWebhookNotificationBlock
    from prefect.client.orchestration import get_client
    from prefect.events.schemas.automations import AutomationCore

    block = CustomWebhookNotificationBlock(
        name="Alerts", url="http://127.0.0.1:9/", json_data={"text": "{{body}}"}
    )
    saved = block.save("alerts", overwrite=True)
    asked = yaml.safe_load(file.read_text())
    asked["actions"][0]["block_document_id"] = str(saved)
    with get_client(sync_client=True) as client:
        made = client.create_automation(AutomationCore(**asked))
        try:
            (found,) = client.read_automations_by_name(asked["name"])
        finally:
            client.delete_automation(made)
    assert found.enabled
    assert set(found.trigger.expect) == set(asked["trigger"]["expect"])
