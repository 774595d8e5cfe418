"""The webhook receiver: what it refuses, and a real MLflow server's delivery to a real audit."""

import asyncio
import base64
import hashlib
import hmac
import http.client
import itertools
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest
from mlflow import MlflowClient

from flataudit import cli
from tests.mlflow_store import make_store
from tests.servers import free_port
from tests.shells import environment

SECRET = "a secret for the tests only"
NOW = 1_800_000_000
DATA = {"name": "churn", "version": "3", "source": "models:/m-1", "run_id": "r", "tags": {},
        "description": None}  # fmt: skip
EVENT = {"entity": "model_version", "action": "created", "timestamp": "t", "data": DATA}


class Fake:
    """Counts what is started, under the delivery's id, as Prefect does."""

    def __init__(self):
        self.started, self.error, self.delay, self.entered = {}, None, 0.0, 0

    async def __aenter__(self):
        self.entered += 1
        return self

    async def __aexit__(self, *_):
        self.entered -= 1

    async def start(self, uri, delivery):
        await asyncio.sleep(self.delay)
        if self.error:
            raise self.error
        return self.started.setdefault(delivery, f"run of {uri}")

    async def healthy(self):
        return self.error is None


@pytest.fixture
def fake():
    return Fake()


@pytest.fixture
def app(fake):
    from starlette.testclient import TestClient

    from flows.webhook import make_app

    with TestClient(make_app(SECRET, fake, now=lambda: NOW)) as client:
        yield client


def signature(secret, delivery, timestamp, body):
    """As MLflow documents it, written anew."""
    content = f"{delivery}.{timestamp}.".encode() + body
    digest = hmac.new(secret.encode(), content, hashlib.sha256).digest()
    return "v1," + base64.b64encode(digest).decode()


def signed(payload=EVENT, *, secret=SECRET, delivery="d-1", timestamp=NOW, **headers):
    """Body and headers of a signed request."""
    body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    found = {
        "Content-Type": "application/json",
        "X-MLflow-Delivery-Id": delivery,
        "X-MLflow-Timestamp": str(timestamp),
        "X-MLflow-Signature": signature(secret, delivery, timestamp, body),
    }
    found |= {name.replace("_", "-"): value for name, value in headers.items()}
    return {"content": body, "headers": {k: v for k, v in found.items() if v is not None}}


# --- what is accepted ---------------------------------------------------------------------------


def test_a_signed_delivery_starts_one_audit(app, fake):
    first = app.post("/mlflow", **signed())
    assert first.status_code == 202
    assert first.json() == {
        "status": "accepted",
        "model": "models:/churn/3",
        "flow_run": "run of models:/churn/3",
    }
    assert app.post("/mlflow", **signed()).json() == first.json()
    assert fake.started == {"d-1": "run of models:/churn/3"}
    app.post("/mlflow", **signed(delivery="d-2"))
    assert list(fake.started) == ["d-1", "d-2"]


@pytest.mark.parametrize("skew", [-300, 299, 300])
def test_five_minutes_either_way(app, skew):
    assert app.post("/mlflow", **signed(timestamp=NOW + skew)).status_code == 202


def test_mlflow_s_example_starts_nothing(app, fake):
    from mlflow.webhooks.types import ModelVersionCreatedPayload

    body = {**EVENT, "data": ModelVersionCreatedPayload.example()}
    answer = app.post("/mlflow", **signed(body))
    assert (answer.status_code, fake.started) == (200, {})
    assert "nothing was started" in answer.json()["status"]


def test_health(app, fake):
    assert app.get("/health").status_code == 200
    fake.error = ConnectionError("down")
    assert app.get("/health").status_code == 503


# --- what is refused ----------------------------------------------------------------------------

BAD = {
    "unsigned": (401, {"X_MLflow_Signature": None}),
    "empty signature": (401, {"X_MLflow_Signature": ""}),
    "another secret": (401, {"secret": SECRET + "!"}),
    "signature without its version": (401, {"X_MLflow_Signature": "AAAA"}),
    "signature that is not ASCII": (401, {"X_MLflow_Signature": "v1,\xe9".encode("latin-1")}),
    "another delivery id than signed": (401, {"X_MLflow_Delivery_Id": "d-2"}),
    "another timestamp than signed": (401, {"X_MLflow_Timestamp": str(NOW + 1)}),
    "no delivery id": (401, {"X_MLflow_Delivery_Id": None}),
    "delivery id with other signs": (401, {"delivery": "d 1/../"}),
    "no timestamp": (401, {"X_MLflow_Timestamp": None}),
    "timestamp that is no number": (401, {"timestamp": "soon"}),
    "timestamp that is not finite": (401, {"timestamp": "inf"}),
    "negative timestamp": (401, {"timestamp": -NOW}),
    "old": (401, {"timestamp": NOW - 301}),
    "of the future": (401, {"timestamp": NOW + 301}),
    "text": (415, {"Content_Type": "text/plain"}),
    "a form": (415, {"Content_Type": "application/x-www-form-urlencoded"}),
    "no content type": (415, {"Content_Type": None}),
    "not JSON": (400, {"payload": b"{"}),
    "empty": (400, {"payload": b""}),
    "not UTF-8": (400, {"payload": b'{"a": "\xff"}'}),
    "nested without end": (400, {"payload": b"[" * 60_000}),
    "a list": (400, {"payload": [EVENT]}),
    "another entity": (422, {"payload": {**EVENT, "entity": "registered_model"}}),
    "another action": (422, {"payload": {**EVENT, "action": "deleted"}}),
    "no entity": (422, {"payload": {"data": DATA}}),
    "no data": (422, {"payload": {**EVENT, "data": None}}),
    "no name": (422, {"payload": {**EVENT, "data": {**DATA, "name": None}}}),
    "a path as name": (422, {"payload": {**EVENT, "data": {**DATA, "name": "../a"}}}),
    "an empty name": (422, {"payload": {**EVENT, "data": {**DATA, "name": ""}}}),
    "a version that is no number": (422, {"payload": {**EVENT, "data": {**DATA, "version": "x"}}}),
    "too large": (413, {"payload": b" " * (64 * 1024 + 1)}),
    "length that is no number": (400, {"Content_Length": "1e3"}),
}


@pytest.mark.parametrize("name", BAD)
def test_refused(app, fake, name, caplog):
    status, changed = BAD[name]
    with caplog.at_level(logging.DEBUG):
        answer = app.post("/mlflow", **signed(**changed))
    assert answer.status_code == status
    assert list(answer.json()) == ["error"]
    assert answer.json()["error"].startswith("expected ")
    assert fake.started == {}
    assert "refused a request" in caplog.text
    assert SECRET not in caplog.text + answer.text


def test_the_largest_body_is_read(app):
    padded = json.dumps(EVENT).encode().ljust(64 * 1024)
    assert app.post("/mlflow", **signed(padded)).status_code == 202


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/mlflow", 405), ("PUT", "/mlflow", 405), ("POST", "/", 404), ("POST", "/health", 405),
     ("POST", "/mlflow/x", 404)],
)  # fmt: skip
def test_other_methods_and_paths(app, fake, method, path, status):
    body = signed() if method != "GET" else {}
    assert app.request(method, path, **body).status_code == status
    assert fake.started == {}


def test_prefect_that_fails_or_hangs_is_503(app, fake, caplog):
    """MLflow sends a delivery again after a 503."""
    fake.error = ConnectionError(f"with {SECRET}")
    assert app.post("/mlflow", **signed()).status_code == 503
    fake.error, fake.delay = None, 60.0
    assert app.post("/mlflow", **signed()).status_code == 503
    fake.delay = 0.0
    assert app.post("/mlflow", **signed()).status_code == 202
    assert SECRET not in caplog.text


@contextmanager
def listening(fake):
    """The application under uvicorn, on a free port."""
    import uvicorn

    from flows.webhook import make_app

    port = free_port()
    config = uvicorn.Config(make_app(SECRET, fake, now=lambda: NOW), port=port, log_config=None)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.02)
        yield port
    finally:
        server.should_exit = True
        thread.join(20)


def test_a_body_without_announced_length(fake, monkeypatch):
    """Chunked: what fits is read, what does not is cut off at the limit, what stalls is dropped."""
    import flows.webhook

    monkeypatch.setattr(flows.webhook, "BODY", 2.0)
    good, big = signed(), signed(b" " * 1_000_000)
    with listening(fake) as port:
        for made, status in ((good, 202), (big, 413)):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            parts = [made["content"][i : i + 9000] for i in range(0, len(made["content"]), 9000)]
            try:
                connection.request(
                    "POST", "/mlflow", iter(parts), made["headers"], encode_chunked=True
                )
            except (BrokenPipeError, ConnectionResetError):
                assert status == 413  # it answered before all was sent
            else:
                assert connection.getresponse().status == status
            connection.close()
        with socket.create_connection(("127.0.0.1", port), timeout=30) as stalled:
            head = "".join(f"{k}: {v}\r\n" for k, v in good["headers"].items())
            stalled.sendall(
                f"POST /mlflow HTTP/1.1\r\nHost: a\r\n{head}Content-Length: 99\r\n\r\n{{".encode()
            )
            assert b" 408 " in stalled.recv(1000)
    assert list(fake.started) == ["d-1"]
    assert fake.entered == 0


# --- the command --------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch, capfd):
    """Runs the command line in this process: exit code, stdout, stderr."""
    monkeypatch.setattr(cli, "_quiet", lambda: None)
    monkeypatch.setenv("FLATAUDIT_WEBHOOK_SECRET", SECRET)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")

    def command(*args):
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["flataudit", "webhook", *map(str, args)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return caught.value.code, *capfd.readouterr()

    return command


@pytest.mark.parametrize("args", [("serve",), ("install", "http://127.0.0.1:1/mlflow")])
@pytest.mark.parametrize("secret", [None, "", "short"])
def test_needs_a_secret_in_the_environment(run, monkeypatch, args, secret):
    if secret is None:
        monkeypatch.delenv("FLATAUDIT_WEBHOOK_SECRET")
    else:
        monkeypatch.setenv("FLATAUDIT_WEBHOOK_SECRET", secret)
    code, out, err = run(*args)
    assert (code, out) == (2, "")
    assert "16 characters in FLATAUDIT_WEBHOOK_SECRET" in err
    assert len(err.splitlines()) == 1


def test_bad_ways_to_serve_and_install(run, server, tmp_path, monkeypatch):
    options = tmp_path / "options.yaml"
    options.write_text("pennalty: 1\n")
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    for args, code, expected in [
        (("serve", "--config", options), 2, "unknown option 'pennalty'"),
        (("serve", "--deployment", "a/b"), 2, "expected a deployment 'a/b'"),
        (("serve", "--limit", "0"), 2, "--limit"),
        (("serve", "--port", taken.getsockname()[1]), 3, "expected to listen on 127.0.0.1:"),
        (("install", "127.0.0.1:1"), 2, "expected the receiver's address"),
        (("install", "http://127.0.0.1:1/mlflow"), 3, "could not list the webhooks"),
        (("remove", "--tracking-uri", f"sqlite:///{tmp_path}/no.db"), 3, "expected an MLflow data"),
    ]:
        monkeypatch.setenv("FLATAUDIT_WEBHOOK_SECRET", SECRET)
        found, _, err = run(*args)
        assert (found, expected in err.splitlines()[-1]) == (code, True), err
    assert "FLATAUDIT_WEBHOOK_SECRET" in os.environ  # `remove` needs none
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    code, _, err = run("serve")
    assert (code, "MLFLOW_TRACKING_URI" in err) == (2, True)
    assert "FLATAUDIT_WEBHOOK_SECRET" not in os.environ  # nothing that serve starts gets it
    taken.close()


def test_install_is_idempotent(run, mlflow_url):
    """Against a server with each kind of database; the secret is written and never printed."""
    where = ["--tracking-uri", mlflow_url, "--name", "twice"]
    client = MlflowClient(mlflow_url)

    def named():
        return [hook for hook in client.list_webhooks() if hook.name == "twice"]

    code, out, err = run("install", "http://127.0.0.1:9/mlflow", *where)
    assert (code, err) == (0, "")
    assert out.startswith("created webhook twice (")
    code, out, err = run("install", "http://127.0.0.1:8/mlflow", *where)
    (hook,) = named()
    assert out.startswith(f"updated webhook twice ({hook.webhook_id}): model_version.created")
    assert hook.url == "http://127.0.0.1:8/mlflow"
    code, _, err = run("install", "http://127.0.0.1:8/mlflow", *where, "--test")
    assert (code, "expected the receiver to answer" in err) == (3, True)
    assert SECRET not in out + err
    assert run("remove", *where)[1] == f"deleted webhook twice ({hook.webhook_id})\n"
    assert named() == []
    assert run("remove", *where)[1] == "no webhook twice; nothing to do\n"


# --- from MLflow to the audit -------------------------------------------------------------------


@contextmanager
def receiver(url, api, folder):
    """`flataudit webhook serve` in a process of its own; its port, and its log afterwards."""
    port = free_port()
    env = environment(
        FLATAUDIT_WEBHOOK_SECRET=SECRET,
        MLFLOW_TRACKING_URI=url,
        PREFECT_API_URL=api,
        PREFECT_RUNNER_POLL_FREQUENCY="1",
        PREFECT_LOCAL_STORAGE_PATH=str(folder / "storage"),
        PREFECT_HOME=str(folder),
    )
    (folder / "options.yaml").write_text("penalty: 0.02\nsensitivity: false\n")
    log = folder / "receiver.log"
    command = [sys.executable, "-m", "flataudit", "webhook", "serve", "--port", str(port),
               "--config", str(folder / "options.yaml")]  # fmt: skip
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=env, cwd=folder, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            wait(lambda: status(port, "GET", "/health") == 200, lambda: log.read_text(), process)
            yield port, log
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                raise


def status(port, method, path, content=None, headers=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path, content, headers or {})
        return connection.getresponse().status
    except OSError:
        return None
    finally:
        connection.close()


def wait(ready, explain, process=None, seconds=300):
    until = time.monotonic() + seconds
    while not ready():
        assert process is None or process.poll() is None, explain()
        assert time.monotonic() < until, explain()
        time.sleep(0.2)


def flow_runs(api):
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.filters import FlowRunFilter

    with SyncPrefectClient(api) as client:
        tagged = FlowRunFilter(tags={"all_": ["mlflow-webhook"]})
        return client.read_flow_runs(flow_run_filter=tagged)


def test_a_new_version_is_audited_and_a_forged_one_is_not(run, server, mlflow_url, tmp_path):
    store = make_store(mlflow_url)
    client = MlflowClient(mlflow_url)
    before = len(flow_runs(server))
    with receiver(mlflow_url, server, tmp_path) as (port, log):
        where = ["--tracking-uri", mlflow_url, "--name", f"hook-{port}"]
        code, out, err = run("install", f"http://127.0.0.1:{port}/mlflow", *where, "--test")
        assert (code, "test received" in out) == (0, True), err
        assert len(flow_runs(server)) == before
        found = client.copy_model_version("models:/digits/1", f"hooked-{port}")
        try:
            wait(
                lambda: (
                    "flataudit.verdict" in client.get_model_version(found.name, found.version).tags
                ),
                lambda: f"{log.read_text()}\n{[r.state for r in flow_runs(server)]}",
            )
        finally:
            assert run("remove", *where)[0] == 0
        version = client.get_model_version(found.name, found.version)
        assert version.tags["flataudit.verdict"] in ("pass", "warn", "fail")
        assert version.tags["flataudit.model_id"] == store.pickle_id
        audit = client.get_run(version.tags["flataudit.run_id"])
        assert audit.data.params["penalty"] == "0.02"
        assert audit.data.params["train"] == "mlflow"
        assert len(flow_runs(server)) == before + 1

        # The same version announced by someone without the secret, and by no one at all.
        stamp = int(time.time())
        body = {**EVENT, "data": {**DATA, "name": found.name, "version": found.version}}
        forged = signed(body, secret="a guess of the secret", timestamp=stamp)
        assert status(port, "POST", "/mlflow", forged["content"], forged["headers"]) == 401
        unsigned = signed(body, timestamp=stamp, X_MLflow_Signature=None)
        assert status(port, "POST", "/mlflow", unsigned["content"], unsigned["headers"]) == 401
        assert len(flow_runs(server)) == before + 1
        assert client.get_model_version(found.name, found.version).tags == version.tags
        # With it: one run, however often it is sent; again after a 503, as MLflow does.
        real = signed(body, timestamp=stamp, delivery=f"again-{port}")
        request_again = ("POST", "/mlflow", real["content"], real["headers"])
        for _ in range(3):
            answers = iter(lambda: status(port, *request_again), 202)
            assert set(itertools.islice(answers, 60)) <= {503}
        assert len(flow_runs(server)) == before + 2
        text = log.read_text()
    assert text.count("refused a request from 127.0.0.1") == 2
    assert text.count(f"audit of models:/{found.name}/{found.version}: flow run") == 4
    assert SECRET not in log.read_text()
