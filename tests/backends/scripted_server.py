"""An HTTP server on loopback that answers what a test tells it to."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = dict[str, Any] | bytes
Reply = Body | tuple[int, Body] | tuple[int, Body, dict[str, str]]


class Scripted:
    """Answers the n-th request with the n-th reply (the last one again after that), or by a function."""

    def __init__(self) -> None:
        self.replies: list[Reply] = []
        self.reply: Callable[[dict[str, Any]], Reply] | None = None
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.running = 0
        self.most_running = 0
        self.lock = threading.Lock()
        self.url = ""

    def next(self, path: str, body: dict[str, Any]) -> Reply:
        with self.lock:
            self.requests.append((path, body))
            self.running += 1
            self.most_running = max(self.most_running, self.running)
            k = min(len(self.requests), len(self.replies)) - 1
        return self.reply(body) if self.reply is not None else self.replies[k]


@contextmanager
def scripted_server() -> Iterator[Scripted]:
    """Run one until the block ends."""
    script = Scripted()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            reply = script.next(self.path, body)
            status, content, headers = (*reply, {})[:3] if isinstance(reply, tuple) else (200, reply, {})
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            with script.lock:
                script.running -= 1
            try:
                self.send_response(status)
                for name, value in {"content-type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            except OSError:
                self.close_connection = True  # the client gave up waiting

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.daemon_threads = True
        http.block_on_close = False
        script.url = f"http://127.0.0.1:{http.server_port}/v1"
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield script
        finally:
            http.shutdown()
            thread.join()
