"""GPUs: the limit on a real Prefect server, and that it holds. No GPU is needed to be counted."""

import logging
import threading
import time
import warnings

import pytest

from flataudit.errors import InputError, StoreError
from tests.sweep_store import make_fleet

AT_ONCE = 60  # seconds for what needs only that another thread gets its turn


@pytest.fixture
def gpu(server, monkeypatch, tmp_path):
    """The module, on a machine with one GPU as it says, with locks and a limit of its own."""
    from flows import gpu

    monkeypatch.setenv("FLATAUDIT_GPU_SLOTS", "1")
    monkeypatch.setattr(gpu.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(gpu.platform, "node", lambda: f"Box_{tmp_path.name}.lan")
    return gpu


@pytest.fixture
def limits(server):
    """A client of the server."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        yield client


def update(limits, name, **changes):
    from prefect.client.schemas.actions import GlobalConcurrencyLimitUpdate

    limits.update_global_concurrency_limit(name, GlobalConcurrencyLimitUpdate(**changes))


def run_tasks(gpu, number, inside):
    """`inside(slot)` in as many concurrent tasks of one flow, each in its own slot."""
    from prefect import flow, task
    from prefect.futures import wait
    from prefect.task_runners import ThreadPoolTaskRunner

    @task
    def one():
        with gpu.gpu_slot("auto") as slot:
            inside(slot)

    @flow(task_runner=ThreadPoolTaskRunner(max_workers=number))
    def several():
        futures = [one.submit() for _ in range(number)]
        wait(futures)
        return [future.state.name for future in futures]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return several()


class Counter:
    """How many were inside at once."""

    def __init__(self):
        self.lock, self.inside, self.most, self.total = threading.Lock(), 0, 0, 0

    def __call__(self, slot):
        with self.lock:
            self.inside += 1
            self.total += 1
            self.most = max(self.most, self.inside)
        time.sleep(0.3)  # time for another one to come in, if it can
        with self.lock:
            self.inside -= 1


def test_the_limit_is_made_once_and_keeps_its_number(gpu, limits, monkeypatch):
    name = gpu.limit_name()
    assert name.startswith("flataudit-gpu-box-")
    for _ in range(2):
        with gpu.gpu_slot("cuda"):
            found = limits.read_global_concurrency_limit_by_name(name)
            assert (found.limit, found.active, found.active_slots) == (1, True, 1)
        assert limits.read_global_concurrency_limit_by_name(name).active_slots == 0
    update(limits, name, limit=3)
    with gpu.gpu_slot("auto"):
        assert limits.read_global_concurrency_limit_by_name(name).limit == 3


def test_made_by_several_at_once(gpu, limits):
    together = threading.Barrier(4)
    failed = []

    def ensure():
        together.wait()
        try:
            gpu.ensure_limit(gpu.limit_name(), 2)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=ensure) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert limits.read_global_concurrency_limit_by_name(gpu.limit_name()).limit == 2


@pytest.mark.parametrize("alone", ["limit", "lock", "both"])
def test_one_at_a_time_is_held(gpu, limits, monkeypatch, alone):
    """By Prefect's limit without the lock, and by the lock with a limit that lets all in."""
    if alone == "limit":
        monkeypatch.setattr(gpu, "fcntl", None)
    if alone == "lock":
        gpu.ensure_limit(gpu.limit_name(), 9)
    seen = Counter()
    assert run_tasks(gpu, 3, seen) == ["Completed"] * 3
    assert (seen.total, seen.most) == (3, 1)


def test_two_slots_are_two_at_once_on_two_gpus(gpu, monkeypatch):
    monkeypatch.setenv("FLATAUDIT_GPU_SLOTS", "2")
    monkeypatch.setattr(gpu, "visible_gpus", lambda: 2)
    together, seen = threading.Barrier(2), []

    def inside(slot):
        together.wait(AT_ONCE)
        seen.append(slot)

    assert run_tasks(gpu, 2, inside) == ["Completed"] * 2
    assert sorted(seen) == [0, 1]


def test_without_the_limit_nothing_runs(gpu, limits, monkeypatch):
    """Deleted after it was made; Prefect itself would run without a limit."""
    monkeypatch.setattr(gpu, "ensure_limit", lambda *_: None)
    with pytest.raises(StoreError, match="expected a slot of Prefect's concurrency limit"):  # noqa: SIM117
        with gpu.gpu_slot("cuda"):
            pytest.fail("it ran")


def test_a_limit_that_is_switched_off_is_none(gpu, limits):
    name = gpu.limit_name()
    gpu.ensure_limit(name, 1)
    update(limits, name, active=False)
    with pytest.raises(StoreError, match="to be active"):  # noqa: SIM117
        with gpu.gpu_slot("auto"):
            pytest.fail("it ran")
    update(limits, name, active=True, limit=0)
    with pytest.raises(StoreError, match=r"got: .*422"):  # noqa: SIM117
        with gpu.gpu_slot("auto"):
            pytest.fail("it ran")


def test_who_needs_no_gpu_asks_for_none(gpu, limits, monkeypatch):
    from prefect.exceptions import ObjectNotFound

    with gpu.gpu_slot("cpu") as slot:
        assert slot is None
    monkeypatch.setenv("FLATAUDIT_GPU_SLOTS", "0")
    with gpu.gpu_slot("auto") as slot:
        assert slot is None
    with pytest.raises(ObjectNotFound):
        limits.read_global_concurrency_limit_by_name(gpu.limit_name())
    monkeypatch.setenv("FLATAUDIT_GPU_SLOTS", "one")
    with pytest.raises(InputError, match="expected FLATAUDIT_GPU_SLOTS to be a number"):
        gpu.gpu_slots()


def test_the_gpus_are_those_that_torch_sees(gpu, monkeypatch):
    import torch

    monkeypatch.delenv("FLATAUDIT_GPU_SLOTS")
    gpu.visible_gpus.cache_clear()
    assert gpu.gpu_slots() == torch.cuda.device_count()


@pytest.mark.slow
def test_two_audits_of_one_sweep_take_turns(gpu, monkeypatch, caplog):
    """Real audits in two threads: their estimates, by the lines of the stages, do not overlap."""
    from prefect.task_runners import ThreadPoolTaskRunner

    from flows.sweep import sweep_flow

    fleet = make_fleet()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", fleet.uri)
    asked = fleet.pipeline(name="gpu", model={"name": "fleet-[ab]", "select": "all"})
    flow = sweep_flow.with_options(task_runner=ThreadPoolTaskRunner(max_workers=2))
    held = []
    real = gpu._locked

    def locked(slots):
        held.append(time.monotonic())
        return real(slots)

    monkeypatch.setattr(gpu, "_locked", locked)
    with caplog.at_level(logging.INFO, logger="flataudit.stages"):
        found = flow(asked)
    assert found["counts"]["failed"] == 0
    lines = [r for r in caplog.records if r.name == "flataudit.stages"]
    steps = [r.getMessage().split()[:2] for r in lines if r.getMessage().startswith("estimate")]
    # Versions with the same weights may share an estimate.
    assert len(held) >= 2
    assert steps == [["estimate", "start"], ["estimate", "end"]] * len(held)
