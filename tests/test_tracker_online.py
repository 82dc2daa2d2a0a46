"""Weights & Biases online, against a stand-in for its server: what is asked of it, and what its loss costs.

The stand-in answers as much of the API as wandb's own process asks for a run without artifacts. Real accounts were
never used: that the server replaces a run whose id comes again is its documentation's word.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from test_tracker import contents

PROGRAM = """
import pathlib, sys, urllib.request
from left_bench.spec.record import Record
from left_bench.tracker import Attempt, Comparison, open_tracker

store = pathlib.Path(sys.argv[1])

def tell(number, loses_server=False):
    record = Record(cell_id="tiny-abc", attempt=number, status="ok", started_at="2026-01-01T12:00:00+00:00",
        finished_at="2026-01-01T12:00:09+00:00", choices={"peft": "lora"}, config={}, metrics={"eval_loss": 0.5},
        provenance={"sweep": "online", "launch": "20260101T120000"})
    tracker = open_tracker({"wandb": {"project": "p"}}, store=store)
    tracker.start(Attempt.of(record, run_dir=store / "tiny-abc"))
    tracker.log(1, time=1.0, loss=2.0)
    if loses_server:
        urllib.request.urlopen(f"{sys.argv[2]}/stop").read()
    tracker.finish(record)
    print("told", number, flush=True)

def save_workspace():
    # What `report` does beside its tables, which are artifacts, and those the stand-in does not take
    import types
    from left_bench.tracker.kinds.wandb import WandbTracker

    tracker = WandbTracker(store=store, project="p", entity=None, artifacts=False)
    tracker._run = types.SimpleNamespace(entity="me", project="p")
    tracker._save_workspace(Comparison(sweep="online", launch="20260101T120000", command="left-bench", plots=[],
        markdown=store / "online.md", columns=["cell", "run", "axis.peft", "exact_match"],
        rows=[["lora", "abc-1-20260101T120000", "lora", 0.5]]))

"""


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        return None

    def _answer(self, plain: Any) -> None:
        body = json.dumps(plain).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _body(self) -> bytes:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data

    def do_GET(self) -> None:
        if self.path == "/stop":
            self.server.lost = True  # type: ignore[attr-defined]
        self._answer({})

    def do_PUT(self) -> None:
        self._body()
        self._answer({})

    def do_POST(self) -> None:
        data = self._body()
        if self.server.lost:  # type: ignore[attr-defined]
            self.send_error(503)
            return
        seen: list[tuple[str, Any]] = self.server.seen  # type: ignore[attr-defined]
        if self.path != "/graphql":
            if self.path.startswith("/files/"):
                seen.append((self.path, json.loads(data)))
            self._answer({})
            return
        asked = json.loads(data)
        query, given = asked["query"], asked.get("variables") or {}
        if "upsertBucket" in query:
            seen.append(("upsert", given))
            project = {"name": given["project"], "id": "p", "entity": {"id": "e", "name": "me"}}
            bucket = {"id": f"b-{given['name']}", "name": given["name"], "displayName": given["displayName"]}
            told = {"bucket": bucket | {"project": project, "historyLineCount": 0}, "inserted": True}
            self._answer({"data": {"upsertBucket": told}})
        elif "viewer" in query:
            self._answer({"data": {"viewer": {"id": "u", "username": "me", "entity": "me", "flags": "{}"}}})
        elif "upsertView" in query:
            seen.append(("view", given))
            view = {"id": given.get("id") or "v1", "name": given["name"]}
            self._answer({"data": {"upsertView": {"view": view, "inserted": "id" not in given}}})
        elif "allViews" in query:
            kept = [told for kind, told in seen if kind == "view" and told["name"] == given["viewName"]]
            nodes = [{"node": {"id": "v1", "displayName": told["displayName"], "spec": told["spec"]}} for told in kept]
            self._answer({"data": {"project": {"allViews": {"edges": nodes[-1:]}}}})
        elif "createRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"http://{self.headers['Host']}/put"} for name in given["files"]]
            self._answer({"data": {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}})
        else:
            self._answer({"data": {}})


@pytest.fixture
def server() -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.daemon_threads = True
    server.seen, server.lost = [], False
    server.address = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def run(lines: str, store: Path, address: str, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    (store / "home").mkdir()
    mine = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": address, "HOME": str(store / "home"), "NETRC": "/dev/null"}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM + lines, str(store), address],
        env=kept | mine | variables,
        cwd=store,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_run_told_twice_is_one_run_and_its_address_is_said_once(server, tmp_path):
    done = run("tell(1); tell(1)", tmp_path, server.address)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    upserts = [given for kind, given in server.seen if kind == "upsert"]
    assert {(given["name"], given["project"]) for given in upserts} == {("abc-1-20260101T120000", "p")}
    assert {given["groupName"] for given in upserts} == {"online-20260101T120000"}
    assert {given["displayName"] for given in upserts} == {"lora · s0"}
    [path] = {kind for kind, _ in server.seen if kind.startswith("/files/")}
    assert path == "/files/me/p/abc-1-20260101T120000/file_stream"
    sent = json.dumps([told for kind, told in server.seen if kind == path])
    assert sent.count("train/loss") >= 2 and "eval_loss" in sent
    assert done.stdout.count("/groups/online-20260101T120000") == 1


def test_a_sweeps_workspace_is_saved_once_and_changed_when_the_sweep_is_told_again(server, tmp_path):
    pytest.importorskip("wandb_workspaces", reason="pip install 'left-bench[dashboard]' for workspaces")
    done = run("save_workspace(); save_workspace()", tmp_path, server.address)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    first, second = [given for kind, given in server.seen if kind == "view"]
    assert "id" not in first and (second["id"], second["name"]) == ("v1", first["name"])
    assert (first["entityName"], first["projectName"], first["displayName"]) == ("me", "p", "left_bench online")
    for view in (first, second):
        assert "eval/validation_loss" in view["spec"] and "summary:exact_match" in view["spec"]
        assert "abc-1-20260101T120000" in view["spec"]  # its method's colour
    assert done.stdout.count("nw=") == 1


def test_a_connection_lost_on_the_way_ends_the_wait_and_the_rest_is_kept_offline(server, tmp_path):
    done = run("tell(1, loses_server=True); tell(2)", tmp_path, server.address, WANDB_FINISH_TIMEOUT="2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["told 1", "told 2"]
    assert done.stderr.count("no answer from Weights & Biases") == 1
    assert "Traceback" not in done.stderr
    [path] = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert contents(path)["run"].run_id == "abc-2-20260101T120000"


def test_a_server_that_is_not_there_is_waited_for_once(tmp_path):
    done = run("tell(1); tell(2)", tmp_path, "http://127.0.0.1:9", WANDB_INIT_TIMEOUT="1")
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if "warning" in line] == done.stderr.splitlines()[:1]
    results = {contents(path)["run"].run_id for path in tmp_path.glob("wandb/offline-run-*/*.wandb")}
    assert results == {"abc-1-20260101T120000", "abc-2-20260101T120000"}


def test_wandbs_own_process_may_die(tmp_path):
    lines = """
import os, psutil
tell(1)
for child in psutil.Process().children(): child.kill()
tell(2)
"""
    done = run(lines, tmp_path, "http://127.0.0.1:9", WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert len(list(tmp_path.glob("wandb/offline-run-*/*.wandb"))) == 2


@pytest.mark.parametrize(("said", "folders"), [("offline", 1), ("disabled", 0)])
def test_what_wandbs_own_settings_say_is_done(said, folders, tmp_path):
    """`wandb offline` and `wandb disabled` write this file, and there is a login."""
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "settings").write_text(f"[default]\nmode = {said}\n")
    done = run("tell(1)", tmp_path, "http://127.0.0.1:9")
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == folders
