"""The webhook receiver: a new version in MLflow starts its audit on Prefect.

`POST /mlflow` verifies the request, asks Prefect for a flow run of the audit deployment under the
delivery's id and answers; the audit itself runs elsewhere. Prefect keeps one run per id, so that a
delivery sent again, after a restart too, starts nothing. Where Prefect does not answer in time the
answer is 503, and MLflow sends the delivery again. `GET /health` is 200 while Prefect answers.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, Protocol
from uuid import UUID

from prefect.client.orchestration import PrefectClient, get_client
from prefect.exceptions import ObjectNotFound
from prefect.runner import Runner
from prefect.settings import PREFECT_API_URL
from prefect.types.entrypoint import EntrypointType
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from flataudit import webhooks
from flataudit.errors import AuditFailedError, InputError
from flataudit.store import one_line, without_password
from flataudit.webhooks import RefusedError
from flows.audit import audit_flow

PATH, HEALTH = "/mlflow", "/health"
ANSWER = 0.8  # seconds that Prefect gets: the answer must leave within one
BODY = 5.0  # seconds that a request's body may take to arrive
DEPLOYMENT = "webhook"  # the name of our own; in full flataudit-audit/webhook

log = logging.getLogger("flataudit.webhook")


class Starter(Protocol):
    """Starts audits; entered before the first request, left after the last."""

    async def __aenter__(self) -> Starter: ...
    async def __aexit__(self, *_: object) -> None: ...
    async def start(self, uri: str, delivery: str) -> str:
        """Starts the audit of a version, once per delivery; the id of its flow run."""
        ...

    async def healthy(self) -> bool:
        """Whether an audit could be started now."""
        ...


class DeploymentStarter:
    """Starts flow runs of one deployment, under the delivery's id as idempotency key."""

    def __init__(self, deployment: str, parameters: dict[str, Any]) -> None:
        self.deployment, self.parameters = deployment, parameters
        self._context: Any = None
        self._client: PrefectClient
        self._id: UUID

    async def __aenter__(self) -> DeploymentStarter:
        self._context = get_client()
        self._client = await self._context.__aenter__()
        try:
            self._id = (await self._client.read_deployment_by_name(self.deployment)).id
        except ObjectNotFound:
            await self.__aexit__()
            raise InputError(
                f"expected a deployment {self.deployment!r} on the Prefect server, got none; see"
                " prefect deployment ls, or leave out --deployment to run the audits here"
            ) from None
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._context.__aexit__(None, None, None)

    async def start(self, uri: str, delivery: str) -> str:
        run = await self._client.create_flow_run_from_deployment(
            self._id,
            parameters={**self.parameters, "model_uri": uri},
            idempotency_key=f"mlflow-delivery-{delivery}",
            tags=["mlflow-webhook"],
        )
        return str(run.id)

    async def healthy(self) -> bool:
        return await self._client.api_healthcheck() is None


def make_app(secret: str, starter: Starter, *, now: Callable[[], float] = time.time) -> Starlette:
    """The receiver's ASGI application; nothing but it reads the secret."""

    async def receive(request: Request) -> Response:
        try:
            delivery = webhooks.check_headers(request.headers, now())
            body = await _body(request)
            webhooks.check_signature(request.headers, body, secret)
            version = webhooks.new_version(body)
        except RefusedError as refused:
            host = request.client.host if request.client else "unknown"
            log.warning("refused a request from %s: %s", host, refused)
            return JSONResponse({"error": str(refused)}, refused.status)
        if version.is_test:
            return JSONResponse({"status": "test received; nothing was started"})
        try:
            run = await asyncio.wait_for(starter.start(version.uri, delivery), ANSWER)
        except Exception as error:  # of Prefect's client, its transport or the time limit
            log.error("could not start the audit of %s: %s", version.uri, type(error).__name__)
            return JSONResponse({"error": "could not reach Prefect; send again"}, 503)
        log.info("audit of %s: flow run %s (delivery %s)", version.uri, run, delivery)
        return JSONResponse({"status": "accepted", "model": version.uri, "flow_run": run}, 202)

    async def health(request: Request) -> Response:
        try:
            good = await asyncio.wait_for(starter.healthy(), ANSWER)
        except Exception:
            good = False
        return JSONResponse({"status": "ok" if good else "no Prefect"}, 200 if good else 503)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with starter:
            yield

    routes = [Route(PATH, receive, methods=["POST"]), Route(HEALTH, health, methods=["GET"])]
    return Starlette(routes=routes, lifespan=lifespan)


async def _body(request: Request) -> bytes:
    """The body, read no further than the limit; its length need not be announced."""
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY):
            async for part in request.stream():
                size += len(part)
                if size > webhooks.BODY_LIMIT:
                    raise webhooks.too_large()
                parts.append(part)
    except TimeoutError:
        raise RefusedError(408, f"expected the body within {BODY:g} s") from None
    except ClientDisconnect:
        raise RefusedError(400, "expected a whole body") from None
    return b"".join(parts)


# --- serving ------------------------------------------------------------------------------------


def serve(
    secret: str,
    parameters: dict[str, Any],
    *,
    host: str,
    port: int,
    deployment: str | None = None,
    limit: int = 1,
) -> None:
    """Serves the receiver until it is interrupted.

    Args:
        secret: Shared with MLflow.
        parameters: Of `audit_flow`, without model_uri: train and the options.
        host, port: Where to listen.
        deployment: An existing one, FLOW/NAME; None: this process has one of its own, and runs the
            audits in child processes.
        limit: Audits at the same time, of its own deployment.

    Raises:
        InputError: no Prefect server is named, or it has no such deployment.
        AuditFailedError: the address is taken, or Prefect cannot be reached.
    """
    if not PREFECT_API_URL.value():
        raise InputError(
            "expected the address of a Prefect server in PREFECT_API_URL, got none; start one with"
            " prefect server start and set PREFECT_API_URL=http://127.0.0.1:4200/api"
        )
    asyncio.run(_serve(secret, parameters, host, port, deployment, limit))


async def _serve(
    secret: str,
    parameters: dict[str, Any],
    host: str,
    port: int,
    deployment: str | None,
    limit: int,
) -> None:
    import uvicorn

    runner = None
    try:
        if deployment is None:
            runner = await _runner(limit)
            deployment = f"{audit_flow.name}/{DEPLOYMENT}"
        starter = DeploymentStarter(deployment, parameters)
        async with starter:  # once before listening: what is wrong is said in one line
            pass
    except InputError:
        raise
    except Exception as error:
        raise _unreachable(error) from error
    app = make_app(secret, starter)
    config = uvicorn.Config(
        app, host=host, port=port, log_config=None, access_log=False, server_header=False,
        timeout_keep_alive=5, limit_concurrency=100,
    )  # fmt: skip
    server = uvicorn.Server(config)
    ends = [] if runner is None else [_in_background(runner, server)]
    try:
        await server.serve()
    except SystemExit:  # uvicorn's, where it cannot listen
        raise AuditFailedError(
            f"expected to listen on {host}:{port}, got an address that is taken or not ours; choose"
            " another with --host and --port"
        ) from None
    finally:
        for end in ends:
            await end()
    if not server.started:
        raise AuditFailedError(
            "expected the receiver to start, got an error before it could listen; check the Prefect"
            f" server at {without_password(str(PREFECT_API_URL.value()))}"
        )


async def _runner(limit: int) -> Runner:
    """A runner with our own deployment of the audit flow, registered on the server."""
    runner = Runner(name="flataudit-webhook", limit=limit, pause_on_shutdown=False)
    ours: Any = audit_flow.to_deployment(
        DEPLOYMENT,
        description="Audits a version that MLflow's webhook announced.",
        entrypoint_type=EntrypointType.MODULE_PATH,  # from any working folder
    )
    await runner.aadd_deployment(await ours)
    return runner


def _in_background(runner: Runner, server: Any) -> Callable[[], Awaitable[None]]:
    """Runs the runner in a thread of its own, as it takes over the signals of a main thread.

    Returns what stops it. Where it ends by itself the server ends too.
    """
    loops: list[asyncio.AbstractEventLoop] = []

    async def run() -> None:
        loops.append(asyncio.get_running_loop())
        try:
            await runner.start()
        finally:
            server.should_exit = True

    thread = threading.Thread(target=lambda: asyncio.run(run()), name="audits", daemon=True)
    thread.start()

    async def end() -> None:
        if thread.is_alive() and loops:
            with suppress(Exception):
                stopped = asyncio.run_coroutine_threadsafe(runner.astop(), loops[0])
                await asyncio.wait_for(asyncio.wrap_future(stopped), 10)
        await asyncio.to_thread(thread.join, 10)

    return end


def _unreachable(error: Exception) -> AuditFailedError:
    where = without_password(str(PREFECT_API_URL.value()))
    return AuditFailedError(
        f"expected a Prefect server at {where}, got {type(error).__name__}: {one_line(error)};"
        " check PREFECT_API_URL"
    )
