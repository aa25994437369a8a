"""A server on loopback with ``/v1/files`` and ``/v1/batches`` in front of another one, which does the work.

Batches are worked off when they are looked at: ``looks`` says how many looks it takes. Requests can be made to expire, to
fail with a status, or to be answered in any order, and the connection can be cut in the middle of a creation.
"""

from __future__ import annotations

import email.parser
import email.policy
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class BatchServer:
    """What the account holds, and what shall go wrong."""

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.looks = 1
        self.outcome: Callable[[int, dict[str, Any]], int | str | None] = lambda number, line: None
        """For the n-th line a status to fail with, ``"expire"``, ``"lose"``, or ``None`` to answer."""
        self.refuse: str | None = None
        self.cut_creation = 0
        self.answers: dict[str, int] = {}
        """Statuses in place of what posting to a path would do."""
        self.live: list[dict[str, Any]] = []
        self.lines_run = 0
        self.lock = threading.RLock()
        self.url = ""

    # -- the account

    def upload(self, content: bytes) -> dict[str, Any]:
        name = f"file-{len(self.files) + 1}"
        self.files[name] = content
        return {"id": name, "object": "file", "bytes": len(content), "purpose": "batch", "created_at": 1,
                "filename": "x.jsonl", "status": "processed"}  # fmt: skip

    def create(self, body: dict[str, Any]) -> dict[str, Any]:
        name = f"batch_{len(self.batches) + 1}"
        self.batches[name] = {
            "id": name, "object": "batch", "endpoint": body["endpoint"], "input_file_id": body["input_file_id"],
            "completion_window": body["completion_window"], "created_at": int(time.time()),
            "metadata": body.get("metadata"), "status": "validating", "looks": 0,
            "output_file_id": None, "error_file_id": None, "errors": None,
        }  # fmt: skip
        return self.batches[name]

    def size(self, name: str) -> int:
        """Requests in a batch."""
        return len(self.files[self.batches[name]["input_file_id"]].splitlines())

    def look(self, name: str) -> dict[str, Any]:
        batch = self.batches[name]
        batch["looks"] += 1
        if self.refuse is not None and batch["status"] == "validating":
            batch["status"] = "failed"
            batch["errors"] = {"object": "list", "data": [{"code": "bad", "message": self.refuse}]}
        if batch["status"] in ("validating", "in_progress", "cancelling"):
            ready = batch["looks"] >= self.looks
            if batch["status"] == "cancelling":
                self.work(batch, "cancelled")
            elif ready:
                self.work(batch, "completed")
            else:
                batch["status"] = "in_progress"
        return batch

    def work(self, batch: dict[str, Any], status: str) -> None:
        """Run all lines; write the outputs in reverse order, and the errors to a file of their own."""
        good: list[bytes] = []
        bad: list[bytes] = []
        lines = [json.loads(line) for line in self.files[batch["input_file_id"]].splitlines()]
        assert len({line["custom_id"] for line in lines}) == len(lines)
        for number, line in enumerate(lines):
            assert (line["method"], line["url"]) == ("POST", batch["endpoint"])
            fate = self.outcome(number, line)
            if fate == "lose":
                continue
            if fate == "expire":
                status = "expired"
                error = {"code": "batch_expired", "message": "This request could not be executed in time."}
                bad.append(_line(line, None, error))
            elif isinstance(fate, int):
                body = {"error": {"message": f"no luck with {fate}", "type": "x"}}
                bad.append(_line(line, {"status_code": fate, "request_id": "r", "body": body}, None))
            else:
                self.lines_run += 1
                code, answer = forward(self.upstream + line["url"].removeprefix("/v1"), line["body"])
                reply = {"status_code": code, "request_id": "r", "body": answer}
                (good if code == 200 else bad).append(_line(line, reply, None))
        batch["status"] = status
        if good:
            batch["output_file_id"] = self.upload(b"\n".join(good[::-1]) + b"\n")["id"]
        if bad:
            batch["error_file_id"] = self.upload(b"\n".join(bad) + b"\n")["id"]


def _line(line: dict[str, Any], response: Any, error: Any) -> bytes:
    entry = {"id": "x", "custom_id": line["custom_id"], "response": response, "error": error}
    return json.dumps(entry).encode()


def forward(url: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Ask the server behind."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, json.loads(reply.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


@contextmanager
def batch_server(upstream: str) -> Iterator[BatchServer]:
    """Run one in front of ``upstream`` until the block ends."""
    account = BatchServer(upstream)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = self.path.removeprefix("/v1/").partition("?")[0]
            with account.lock:
                if path == "batches":
                    found = sorted(account.batches.values(), key=lambda b: int(b["id"][6:]), reverse=True)
                    self._send(200, {"object": "list", "data": found, "has_more": False})
                elif path.startswith("batches/"):
                    name = path.split("/")[1]
                    if name in account.batches:
                        self._send(200, account.look(name))
                    else:
                        self._send(404, {"error": {"message": "no such batch"}})
                else:
                    name = path.split("/")[1]
                    known = name in account.files
                    gone = {"error": {"message": f"No such File object: {name}"}}
                    self._send(200 if known else 404, account.files.get(name, gone))

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["content-length"]))
            path = self.path.removeprefix("/v1/")
            with account.lock:
                if path in account.answers:
                    self._send(account.answers[path], {"error": {"message": "no"}})
                elif path == "files":
                    self._send(200, account.upload(_part(self.headers["content-type"], raw)))
                elif path == "batches":
                    made = account.create(json.loads(raw))
                    if account.cut_creation > 0:
                        account.cut_creation -= 1
                        self.close_connection = True
                        return
                    self._send(200, made)
                elif path.endswith("/cancel"):
                    batch = account.batches[path.split("/")[1]]
                    batch["status"] = "cancelling"
                    self._send(200, batch)
                else:
                    body = json.loads(raw)
                    account.live.append(body)
                    self._send(*forward(f"{account.upstream}/{path}", body))

        def _send(self, status: int, content: dict[str, Any] | bytes) -> None:
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            try:
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            except OSError:
                self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.daemon_threads = True
        http.block_on_close = False
        account.url = f"http://127.0.0.1:{http.server_port}/v1"
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield account
        finally:
            http.shutdown()
            thread.join()


def _part(content_type: str, raw: bytes) -> bytes:
    """The file of a multipart form."""
    parser = email.parser.BytesParser(policy=email.policy.HTTP)
    form = parser.parsebytes(b"content-type: " + content_type.encode() + b"\r\n\r\n" + raw)
    for part in form.iter_parts():
        if part.get_filename():
            return part.get_payload(decode=True)  # type: ignore[no-any-return]
    raise AssertionError("no file in the form")
