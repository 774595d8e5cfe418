"""MLflow's webhooks: which requests are genuine, what they announce, and how one is registered.

MLflow signs `{X-MLflow-Delivery-Id}.{X-MLflow-Timestamp}.{body}` by HMAC-SHA256 with the
webhook's secret: `X-MLflow-Signature: v1,<base64>`. A retry has the same delivery id. The receiver
is `flows.webhook`.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flataudit.errors import InputError
from flataudit.store import store_errors, use_tracking, without_password

SECRET_VARIABLE = "FLATAUDIT_WEBHOOK_SECRET"
SECRET_LENGTH = 16  # characters, at least
BODY_LIMIT = 64 * 1024  # bytes
TOLERANCE = 300  # seconds that a request's timestamp may lie in the past or the future
# A version's alias is no event of its own: the version was audited when it was created, and the
# gate sets an alias after an audit.
EVENTS = ("model_version.created",)
DEFAULT_NAME = "flataudit"

_SIGNATURE, _TIMESTAMP, _DELIVERY = (
    f"x-mlflow-{name}" for name in ("signature", "timestamp", "delivery-id")
)
# What MLflow sends as a test of model_version.created: no version of that name need exist.
_EXAMPLE = {"name": "example_model", "source": "models:/123", "run_id": "abcd1234abcd5678"}


class RefusedError(Exception):
    """A request that starts nothing; `status` is the HTTP status of the answer."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True, slots=True)
class NewVersion:
    """A version that MLflow says was created; `is_test`: MLflow's example, nothing to audit."""

    name: str
    version: str
    is_test: bool = False

    @property
    def uri(self) -> str:
        """models:/name/version."""
        return f"models:/{self.name}/{self.version}"


def read_secret() -> str:
    """The secret shared with MLflow, from the environment only: it is in no file and no argument.

    Raises:
        InputError: not set, or too short to keep anyone out.
    """
    secret = os.environ.get(SECRET_VARIABLE, "")
    if len(secret) < SECRET_LENGTH:
        got = f"{len(secret)} characters" if secret else "nothing"
        raise InputError(
            f"expected a secret of at least {SECRET_LENGTH} characters in {SECRET_VARIABLE}, got"
            f" {got}; make one with: openssl rand -base64 32"
        )
    return secret


def check_headers(headers: Mapping[str, str], now: float) -> str:
    """The delivery id of a request that may be genuine: all that can be told without its body.

    Raises:
        RefusedError: 401 without signature, delivery id or a timestamp of the last or next 5
            minutes; 413 where the length is announced as too large; 415 for anything but JSON.
    """
    length = headers.get("content-length", "0")
    if not re.fullmatch(r"[0-9]{1,18}", length):
        raise RefusedError(400, "expected a number as Content-Length")
    if int(length) > BODY_LIMIT:
        raise too_large()
    if not headers.get(_SIGNATURE):
        raise RefusedError(401, "expected a signed request")
    delivery, timestamp = headers.get(_DELIVERY, ""), headers.get(_TIMESTAMP, "")
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,128}", delivery):
        raise RefusedError(401, "expected a delivery id")
    if not re.fullmatch(r"[0-9]{1,12}", timestamp):
        raise RefusedError(401, "expected a timestamp in seconds")
    if abs(now - int(timestamp)) > TOLERANCE:
        raise RefusedError(401, f"expected a timestamp within {TOLERANCE} s of now")
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise RefusedError(415, "expected application/json")
    return delivery


def too_large() -> RefusedError:
    """The refusal of a body above the limit."""
    return RefusedError(413, f"expected at most {BODY_LIMIT} bytes")


def sign(secret: str, delivery: str, timestamp: str, body: bytes) -> str:
    """The value of X-MLflow-Signature."""
    content = f"{delivery}.{timestamp}.".encode("latin-1") + body
    made = hmac.new(secret.encode(), content, hashlib.sha256).digest()
    return f"v1,{base64.b64encode(made).decode()}"


def check_signature(headers: Mapping[str, str], body: bytes, secret: str) -> None:
    """RefusedError (401) unless the body was signed with the secret; compared in constant time."""
    wanted = sign(secret, headers[_DELIVERY], headers[_TIMESTAMP], body)
    if not hmac.compare_digest(headers[_SIGNATURE].encode("latin-1"), wanted.encode()):
        raise RefusedError(401, "expected a signature made with the shared secret")


def new_version(body: bytes) -> NewVersion:
    """The version that the body announces.

    Raises:
        RefusedError: 400 for no JSON object, 422 for another event or without a name and version.
    """
    try:
        payload = json.loads(body)
    except (ValueError, RecursionError):
        raise RefusedError(400, "expected JSON") from None
    if not isinstance(payload, dict):
        raise RefusedError(400, "expected a JSON object")
    event = f"{payload.get('entity')}.{payload.get('action')}"
    if event not in EVENTS:
        raise RefusedError(422, f"expected the event {EVENTS[0]}")
    data = payload.get("data")
    found = data if isinstance(data, dict) else {}
    name, version = found.get("name"), found.get("version")
    if not isinstance(name, str) or not re.fullmatch(r"[^/:\x00-\x1f]{1,256}", name):
        raise RefusedError(422, "expected the name of a registered model")
    if not isinstance(version, str) or not re.fullmatch(r"[0-9]{1,10}", version):
        raise RefusedError(422, "expected the number of a version")
    example = all(found.get(key) == value for key, value in _EXAMPLE.items())
    return NewVersion(name, version, is_test=example)


# --- registering it with MLflow -----------------------------------------------------------------


def install(
    url: str, secret: str, *, name: str = DEFAULT_NAME, tracking_uri: str | None = None
) -> tuple[str, str]:
    """Registers the receiver at `url`, or brings the webhook of that name up to date.

    Returns:
        What was done ("created" or "updated"), and the webhook's id.

    Raises:
        InputError: no MLflow server (a webhook fires from a server only), or several of the name.
        StoreError: the server refused or failed.
    """
    if not re.match(r"https?://[^/\s]", url):
        raise InputError(
            f"expected the receiver's address as http(s)://HOST:PORT/mlflow, got {url!r}"
        )
    client = _client(tracking_uri)
    found = _named(client, name)
    wanted: dict[str, Any] = {
        "url": url,
        "events": list(EVENTS),
        "secret": secret,
        "status": "ACTIVE",
        "description": "Starts an audit by flataudit",
    }
    with store_errors(f"register the webhook {name!r}"):
        if found is None:
            return "created", str(client.create_webhook(name=name, **wanted).webhook_id)
        return "updated", str(client.update_webhook(found, name=name, **wanted).webhook_id)


def remove(*, name: str = DEFAULT_NAME, tracking_uri: str | None = None) -> str | None:
    """Deletes the webhook of that name; its id, None where there was none.

    Raises:
        InputError, StoreError: as `install`.
    """
    client = _client(tracking_uri)
    found = _named(client, name)
    if found is not None:
        with store_errors(f"delete the webhook {name!r}"):
            client.delete_webhook(found)
    return found


def send_test(webhook_id: str) -> tuple[bool, str]:
    """Lets the MLflow server send its example to the receiver: whether it arrived, and a line."""
    with store_errors("test the webhook"):
        from mlflow import MlflowClient

        found = MlflowClient().test_webhook(webhook_id)
    said = found.error_message or f"status {found.response_status}: {found.response_body}"
    return bool(found.success), " ".join(str(said).split())[:300]


def _client(tracking_uri: str | None) -> Any:
    uri = use_tracking(tracking_uri)
    if not re.match(r"https?://", uri):
        raise InputError(
            f"expected the address of an MLflow server, got {without_password(uri)}; start `mlflow"
            " server` on it and give its URL with --tracking-uri"
        )
    from mlflow import MlflowClient

    return MlflowClient()


def _named(client: Any, name: str) -> str | None:
    """The id of the webhook with that name; InputError where there are several."""
    found: list[str] = []
    token = None
    with store_errors("list the webhooks"):
        while True:
            page = client.list_webhooks(max_results=100, page_token=token)
            found += [str(hook.webhook_id) for hook in page if hook.name == name]
            token = page.token
            if not token:
                break
    if len(found) > 1:
        raise InputError(
            f"expected one webhook named {name!r}, got {', '.join(found)}; delete all but one"
        )
    return found[0] if found else None
