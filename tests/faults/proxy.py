"""Stands between the client and a real server, breaks what it is told to break, and keeps its own bill.

What a request meets is decided by the seed, the request's own bytes and how often it has come: not by the order in
which threads arrive, so a schedule plays back the same at any concurrency. The real server computes the answer to each
distinct request once; the proxy passes on its very bytes afterwards, so that answers can be compared to the last bit.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import math
import random
import select
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import urlsplit

HOLD = 20.0
"""Longest silence in seconds; a client that waits longer has no time limit of its own."""

Answer = dict[str, Any]


@dataclass(frozen=True)
class Price:
    """Dollars per million tokens."""

    prompt: Fraction = Fraction(3)
    completion: Fraction = Fraction(15)

    def of(self, prompt: int, completion: int) -> Fraction:
        """Dollars, exactly."""
        return (self.prompt * prompt + self.completion * completion) / 1_000_000


@dataclass(frozen=True)
class Charge:
    """One line of the provider's bill; ``told`` says whether the client could read what it was charged."""

    request: str
    fault: str
    told: bool
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Fault:
    """One way to answer wrongly.

    Parameters
    ----------
    name : str
    act : callable
        Does it, on an :class:`Exchange`.
    billed : bool
        Whether the provider computes the answer and charges for it.
    told : bool
        Whether the client is told the true usage.
    """

    name: str
    act: Callable[[Exchange], None]
    billed: bool
    told: bool = False


@dataclass
class Exchange:
    """One request on its way through the proxy."""

    proxy: FaultProxy
    path: str
    body: dict[str, Any]
    socket: socket.socket
    close: bool = False

    def answer(self) -> tuple[int, bytes]:
        """Status and bytes of the real server's answer."""
        return self.proxy.ask(self.path, self.body)

    def good(self) -> Answer:
        """The real answer, decoded, to be tampered with."""
        return dict(json.loads(self.answer()[1]))

    def send(self, status: int, content: bytes | Answer, headers: Mapping[str, str] | None = None) -> None:
        """A whole response."""
        self.socket.sendall(response(status, content, headers))

    def hold(self) -> None:
        """Say nothing until the client goes away."""
        self.close = True
        for _ in range(int(HOLD / 0.02)):
            readable, _, _ = select.select([self.socket], [], [], 0.02)
            if self.proxy.closing.is_set() or (readable and not self.socket.recv(1, socket.MSG_PEEK)):
                return

    def cut(self) -> None:
        """Close as if all had been said."""
        self.close = True

    def reset(self) -> None:
        """Close with a reset instead of an end."""
        self.close = True
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def response(status: int, content: bytes | Answer, headers: Mapping[str, str] | None = None) -> bytes:
    """The bytes of an HTTP response. JSON may hold NaN and infinities, as real servers' does."""
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    named = {"content-type": "application/json", "content-length": str(len(data)), **(headers or {})}
    lines = [f"HTTP/1.1 {status} Whatever", *(f"{name}: {value}" for name, value in named.items() if value)]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


def error(
    status: int, code: str | None = None, message: str = "no", **headers: str
) -> Callable[[Exchange], None]:
    """A refusal, as providers word it; header names with underscores."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    body = {"error": {"message": message, "code": code, "type": "x", "param": None}}
    return lambda exchange: exchange.send(status, body, named)


def tampered(change: Callable[[Answer], None]) -> Callable[[Exchange], None]:
    """The real answer, changed."""

    def act(exchange: Exchange) -> None:
        body = exchange.good()
        change(body)
        exchange.send(200, body)

    return act


def top(body: Answer) -> list[dict[str, Any]]:
    """The first position's list of likely tokens."""
    listed: list[dict[str, Any]] = body["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    return listed


def _values(value: object, which: slice = slice(None)) -> Callable[[Exchange], None]:
    def change(body: Answer) -> None:
        for entry in top(body)[which]:
            entry["logprob"] = value

    return tampered(change)


def _choice(**fields: object) -> Callable[[Exchange], None]:
    return tampered(lambda body: body["choices"][0].update(fields))


def _usage(**fields: object) -> Callable[[Exchange], None]:
    def change(body: Answer) -> None:
        body["usage"].update(fields)
        for name in [name for name, value in fields.items() if value is None]:
            del body["usage"][name]

    return tampered(change)


def _strange_tokens(body: Answer) -> None:
    for number, entry in enumerate(top(body)):
        entry.update(token=f" zz{number}", bytes=list(f" zz{number}".encode()))


def _cut_to(part: float, end: Callable[[Exchange], None]) -> Callable[[Exchange], None]:
    def act(exchange: Exchange) -> None:
        data = response(*exchange.answer())
        exchange.socket.sendall(data[: int(len(data) * part)])
        end(exchange)

    return act


def _drip(seconds: float) -> Callable[[Exchange], None]:
    def act(exchange: Exchange) -> None:
        data = response(*exchange.answer())
        steps = 25
        for k in range(steps):
            exchange.socket.sendall(data[len(data) * k // steps : len(data) * (k + 1) // steps])
            if exchange.proxy.closing.wait(seconds / steps):
                return

    return act


def _silence_after(exchange: Exchange) -> None:
    exchange.answer()
    exchange.hold()


def _reset_after(exchange: Exchange) -> None:
    exchange.answer()
    exchange.reset()


def _broken_chunks(exchange: Exchange) -> None:
    _, data = exchange.answer()
    exchange.socket.sendall(
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n%x\r\n" % len(data) + data[: len(data) // 2]
    )
    exchange.cut()


def _twice(exchange: Exchange) -> None:
    data = response(*exchange.answer())
    exchange.socket.sendall(data + data)


def _malformed(exchange: Exchange) -> None:
    _, data = exchange.answer()
    exchange.send(200, data[:-2] + b",}")


def _wrong_type(exchange: Exchange) -> None:
    exchange.send(200, json.dumps([exchange.good()]).encode())


def _redirect(status: int) -> Callable[[Exchange], None]:
    def act(exchange: Exchange) -> None:
        exchange.send(status, b"", {"location": exchange.proxy.elsewhere + exchange.path})

    return act


def _close_quietly(exchange: Exchange) -> None:
    exchange.send(*exchange.answer())
    exchange.cut()


def _pass(exchange: Exchange) -> None:
    exchange.send(*exchange.answer())


PASS = Fault("none", _pass, billed=True, told=True)


def _faults() -> Iterator[Fault]:
    waits = {"0": "0", "1": "1", "121": "121", "inf": "inf", "nan": "nan", "1e38": "1e38", "-5": "-5"}
    waits |= {"past date": "Wed, 21 Oct 2015 07:28:00 GMT", "far date": "Wed, 21 Oct 2099 07:28:00 GMT"}
    waits |= {"garbage": "soon, I hope", "empty": ""}
    for name, value in waits.items():
        yield Fault(f"429, wait {name}", error(429, retry_after=value), billed=False)
    yield Fault("429, quota gone", error(429, "insufficient_quota", "You exceeded your quota"), billed=False)
    for status in (408, 409, 500, 502, 503, 504, 529):
        yield Fault(f"{status}", error(status), billed=False)
    yield Fault(
        "500, HTML", lambda e: e.send(500, b"<html>oops</html>", {"content-type": "text/html"}), billed=False
    )
    for status in (400, 401, 403, 404, 413, 422):
        yield Fault(f"{status}", error(status), billed=False)
    yield Fault("400, content filter", error(400, "content_filter", "The prompt was filtered"), billed=False)
    yield Fault(
        "400, too long", error(400, "context_length_exceeded", "maximum context length"), billed=False
    )
    yield Fault("silence before", lambda e: e.hold(), billed=False)
    yield Fault("silence after", _silence_after, billed=True)
    yield Fault("reset before", lambda e: e.reset(), billed=False)
    yield Fault("reset after", _reset_after, billed=True)
    yield Fault("closed before", lambda e: e.cut(), billed=False)
    yield Fault("cut in the head", _cut_to(0.05, Exchange.cut), billed=True)
    yield Fault("cut in the body", _cut_to(0.7, Exchange.cut), billed=True)
    yield Fault("reset in the body", _cut_to(0.7, Exchange.reset), billed=True)
    yield Fault("silence in the body", _cut_to(0.7, Exchange.hold), billed=True)
    yield Fault("broken chunks", _broken_chunks, billed=True)
    yield Fault("malformed JSON", _malformed, billed=True)
    yield Fault("a list for an object", _wrong_type, billed=True)
    yield Fault("empty body", lambda e: e.send(200, b""), billed=False)
    yield Fault("204", lambda e: e.send(204, b"", {"content-length": ""}), billed=False)
    yield Fault("null", lambda e: e.send(200, b"null"), billed=False)
    yield Fault(
        "HTML with 200",
        lambda e: e.send(200, b"<html>hello</html>", {"content-type": "text/html"}),
        billed=False,
    )
    yield Fault(
        "no HTTP at all", lambda e: (e.socket.sendall(b"SSH-2.0-x\r\n\r\n"), e.cut())[1], billed=False
    )
    yield Fault("redirect 307", _redirect(307), billed=False)
    yield Fault("redirect 302", _redirect(302), billed=False)
    yield Fault("told twice", _twice, billed=True, told=True)
    yield Fault("closed after", _close_quietly, billed=True, told=True)
    yield Fault("slow drip", _drip(0.2), billed=True, told=True)
    yield Fault("endless drip", _drip(15.0), billed=True)
    for name, value in {
        "NaN": math.nan,
        "-inf": -math.inf,
        "inf": math.inf,
        "0.5": 0.5,
        "null": None,
        "text": "x",
    }.items():
        yield Fault(f"log-probabilities {name}", _values(value), billed=True, told=True)
    yield Fault("log-probabilities -9999", _values(-9999.0, slice(1, None)), billed=True, told=True)
    yield Fault("no log-probabilities", _choice(logprobs=None), billed=True, told=True)
    yield Fault("empty log-probabilities", _choice(logprobs={"content": []}), billed=True, told=True)
    yield Fault(
        "one token listed", tampered(lambda b: top(b).__delitem__(slice(1, None))), billed=True, told=True
    )
    yield Fault("no label listed", tampered(_strange_tokens), billed=True, told=True)
    yield Fault("no choices", tampered(lambda b: b.update(choices=[])), billed=True, told=True)
    filtered = {"finish_reason": "content_filter", "text": "", "logprobs": None}
    yield Fault("content filter", _choice(**filtered, message={"content": None}), billed=True, told=True)
    yield Fault("another model", tampered(lambda b: b.update(model="other-model-9")), billed=True, told=True)
    yield Fault("no usage", tampered(lambda b: b.pop("usage")), billed=True)
    yield Fault("usage null", tampered(lambda b: b.update(usage=None)), billed=True)
    yield Fault("usage negative", _usage(prompt_tokens=-7, completion_tokens=-1), billed=True)
    yield Fault("usage zero", _usage(prompt_tokens=0, completion_tokens=0), billed=True)
    yield Fault("usage huge", _usage(prompt_tokens=10**15), billed=True)
    yield Fault("usage beyond 64 bits", _usage(prompt_tokens=10**30), billed=True)
    yield Fault("usage NaN", _usage(prompt_tokens=math.nan), billed=True)
    yield Fault("usage as text", _usage(prompt_tokens="77"), billed=True)


FAULTS: dict[str, Fault] = {fault.name: fault for fault in (PASS, *_faults())}


class Schedule:
    """Which fault the ``k``-th arrival of a request meets.

    Parameters
    ----------
    seed : int
    names : sequence of str
        Faults to choose from.
    rate : float
        Share of arrivals that meet one.
    """

    def __init__(self, seed: int, names: Sequence[str], rate: float) -> None:
        self._seed, self._names, self._rate = seed, list(names), rate

    def __call__(self, request: str, arrival: int) -> Fault:
        rng = random.Random(f"{self._seed} {request} {arrival}")
        return FAULTS[rng.choice(self._names)] if rng.random() < self._rate else PASS


class Once:
    """The first arrivals meet the named faults, in order; all later ones pass."""

    def __init__(self, *names: str) -> None:
        self._left = list(names)
        self._lock = threading.Lock()

    def __call__(self, request: str, arrival: int) -> Fault:
        with self._lock:
            return FAULTS[self._left.pop(0)] if self._left else PASS


@dataclass(repr=False)
class FaultProxy:
    """A proxy on loopback in front of ``upstream``; see :func:`fault_proxy`.

    Attributes
    ----------
    url : str
        Base URL for clients.
    plan : callable
        ``plan(request, arrival)`` gives the fault.
    bill : list of Charge
        What the provider charges for.
    met : Counter
        How often each fault was injected.
    strays : list of str
        Requests that followed a redirect to another origin: method and headers.
    """

    upstream: str
    plan: Callable[[str, int], Fault] = field(default_factory=Once)
    url: str = ""
    elsewhere: str = ""
    bill: list[Charge] = field(default_factory=list)
    met: Counter[str] = field(default_factory=Counter)
    strays: list[str] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    running: int = 0
    most_running: int = 0
    closing: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._upstream_lock = threading.Lock()
        self._memory: dict[str, tuple[int, bytes]] = {}
        self._arrivals: Counter[str] = Counter()
        self._connections: set[socket.socket] = set()
        self._listener: socket.socket | None = None
        self._port = 0

    def listen(self) -> None:
        """Accept connections; at the same port as before."""
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self._port))
        listener.listen(128)
        self._port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}/v1"
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def hang_up(self) -> None:
        """Refuse connections until :meth:`listen` is called, and end those that are open."""
        listener, self._listener = self._listener, None
        if listener is not None:
            # Closing alone would leave accept() waiting on the old socket.
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        with self._lock:
            for connection in self._connections:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, address = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection, address), daemon=True).start()

    def _serve(self, connection: socket.socket, address: Any) -> None:
        with self._lock:
            self._connections.add(connection)
        with connection:
            connection.settimeout(HOLD)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with suppress(OSError):  # the client is gone
                _Handler(connection, address, self)  # type: ignore[arg-type]
            with self._lock:
                self._connections.discard(connection)

    def ask(self, path: str, body: dict[str, Any]) -> tuple[int, bytes]:
        """The real server's answer, computed once per distinct request."""
        name = fingerprint(body, path)
        with self._upstream_lock:
            if name not in self._memory:
                host = urlsplit(self.upstream)
                line = http.client.HTTPConnection(host.hostname or "", host.port, timeout=60)
                try:
                    text = json.dumps(body)
                    line.request("POST", path, text, {"content-type": "application/json"})
                    reply = line.getresponse()
                    self._memory[name] = (reply.status, reply.read())
                finally:
                    line.close()
            return self._memory[name]

    def take(self, path: str, body: dict[str, Any]) -> Fault:
        """Count an arrival and charge for it if it is billed, before anything is answered."""
        request = fingerprint(body)
        with self._lock:
            fault = self.plan(request, self._arrivals[request])
            self._arrivals[request] += 1
            self.met[fault.name] += 1
        if fault.billed:
            status, data = self.ask(path, body)
            if status == 200:
                usage = json.loads(data)["usage"]
                charge = Charge(
                    request, fault.name, fault.told, usage["prompt_tokens"], usage["completion_tokens"]
                )
                with self._lock:
                    self.bill.append(charge)
        return fault

    def count(self, more: int) -> None:
        with self._lock:
            self.running += more
            self.most_running = max(self.most_running, self.running)

    def owed(self, price: Price, *, told: bool | None = None) -> Fraction:
        """Dollars on the bill; with ``told``, of those charges only."""
        with self._lock:
            lines = [line for line in self.bill if told is None or line.told is told]
        return sum((price.of(line.prompt_tokens, line.completion_tokens) for line in lines), Fraction(0))


def fingerprint(body: Mapping[str, Any], path: str = "") -> str:
    """Names a request by its bytes; without ``path`` by its prompt alone, whatever else is asked of it."""
    kept: Any = body if path else body.get("prompt", body.get("messages"))
    return hashlib.sha256(f"{path} {json.dumps(kept, sort_keys=True)}".encode()).hexdigest()[:16]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultProxy  # type: ignore[assignment]

    def do_POST(self) -> None:
        length = int(self.headers.get("content-length") or 0)
        data = self.rfile.read(length)
        if len(data) < length:  # the client died while it was sending
            self.close_connection = True
            return
        proxy = self.server
        with proxy._lock:
            proxy.headers.append({name.lower(): value for name, value in self.headers.items()})
        body = json.loads(data)
        proxy.count(1)
        exchange = Exchange(proxy, self.path, body, self.connection)
        try:
            proxy.take(self.path, body).act(exchange)
        finally:
            proxy.count(-1)
        self.close_connection = exchange.close

    def do_GET(self) -> None:
        exchange = Exchange(self.server, self.path, {}, self.connection)
        exchange.send(404, {"error": {"message": "nothing here"}})

    def log_message(self, format: str, *args: object) -> None:
        pass


class _Stray(BaseHTTPRequestHandler):
    server: FaultProxy  # type: ignore[assignment]

    def _note(self) -> None:
        self.server.strays.append(f"{self.command} {self.path}\n{self.headers}")
        self.connection.sendall(response(404, {"error": {"message": "stray"}}, {"connection": "close"}))
        self.close_connection = True

    do_POST = do_GET = _note

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def fault_proxy(upstream: str, plan: Callable[[str, int], Fault] | None = None) -> Iterator[FaultProxy]:
    """Run a proxy, and the origin that its redirects point to, until the block ends."""
    proxy = FaultProxy(upstream, plan or Once())
    other = FaultProxy(upstream)
    other._serve = lambda connection, address: _stray(connection, address, proxy)  # type: ignore[method-assign]
    other.listen()
    proxy.elsewhere = other.url.removesuffix("/v1")
    proxy.listen()
    try:
        yield proxy
    finally:
        proxy.closing.set()
        proxy.hang_up()
        other.hang_up()


def _stray(connection: socket.socket, address: Any, proxy: FaultProxy) -> None:
    with connection, suppress(OSError):
        _Stray(connection, address, proxy)  # type: ignore[arg-type]
