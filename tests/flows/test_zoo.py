"""The zoo's flow: every model by its name, and none that stops the others."""

import sys
import types


def test_rows_in_order_and_failures_kept_apart(server, monkeypatch):
    from flows.zoo import zoo_flow, zoo_task

    calls = []

    def work(name, options):
        calls.append((name, options["factor"]))
        if name == "bad":
            raise ValueError("no such\nmodel")
        return {"name": name, "state": "done", "value": len(name) * options["factor"]}

    module = types.ModuleType("zoo_work")
    module.work = work
    monkeypatch.setitem(sys.modules, "zoo_work", module)
    monkeypatch.setattr(zoo_task, "retry_delay_seconds", 0)
    rows = zoo_flow("zoo_work:work", ["a", "bad", "ccc"], {"factor": 2})
    assert rows == [
        {"name": "a", "state": "done", "value": 2},
        {"name": "bad", "state": "failed", "error": "ValueError: no such model"},
        {"name": "ccc", "state": "done", "value": 6},
    ]
    assert calls.count(("bad", 2)) == 2  # tried once more
