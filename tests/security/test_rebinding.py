"""A name that is answered differently after it was checked: nothing is sent to where it then leads."""

from __future__ import annotations

import ipaddress
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from llama import llama_server

from proxyprompt.backends import _openai_address
from proxyprompt.backends._openai_address import PeerCheck
from proxyprompt.backends.base import ScoreRequest
from proxyprompt.backends.openai import OpenAIBackend
from proxyprompt.errors import BackendError
from proxyprompt.ledger import Ledger
from proxyprompt.metering import Meter

KEY = "canary-key-7c1f"
REQUEST = ScoreRequest("Review: a canary film\nSentiment:", (" positive", " negative"))
METADATA = "127.0.0.2"  # stands for a metadata service that can really be connected to


@pytest.fixture(scope="module")
def llama() -> Iterator[str]:
    yield from llama_server()


@contextmanager
def listener(host: str, port: int) -> Iterator[list[bytes]]:
    """What arrives at an address, connection by connection."""
    arrived: list[bytes] = []
    with socket.create_server((host, port)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    connection.settimeout(1)
                    try:
                        arrived.append(connection.recv(65536))
                    except OSError:
                        arrived.append(b"")

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield arrived
        finally:
            server.shutdown(socket.SHUT_RDWR)
    thread.join(5)


class Resolver:
    """Answers for one name, the first time with a good address."""

    def __init__(self, answers: list[str]) -> None:
        self.answers = answers
        self.asked = 0
        self._system = socket.getaddrinfo

    def __call__(self, host: Any, port: Any, *arguments: Any, **options: Any) -> Any:
        if host in ("model.test", b"model.test"):
            host = self.answers[min(self.asked, len(self.answers) - 1)]
            self.asked += 1
        return self._system(host, port, *arguments, **options)


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    forbidden = frozenset({*_openai_address._METADATA, ipaddress.ip_address(METADATA)})
    monkeypatch.setattr(_openai_address, "_METADATA", forbidden)


@pytest.mark.parametrize("answers", [["127.0.0.1", METADATA], ["127.0.0.1", "127.0.0.1"]])
def test_the_address_that_is_connected_to_is_the_one_that_counts(
    llama: str, metadata: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: list[str]
) -> None:
    resolver = Resolver(answers)
    monkeypatch.setattr(socket, "getaddrinfo", resolver)
    port = int(llama.rsplit(":", 1)[1].split("/")[0])
    backend = OpenAIBackend("smol", base_url=f"http://model.test:{port}/v1", allow_http=True)
    with listener(METADATA, port) as arrived, Ledger(tmp_path / "l.db") as ledger:
        meter = Meter(backend, ledger, role="target", run="r")
        if METADATA not in answers:
            [result] = meter.score([REQUEST], stage="s")
            assert (result.error, arrived) == (None, [])
            return
        with pytest.raises(
            BackendError, match=r"^base_url: 'model.test' now leads to 127\.0\.0\.2.*nothing was sent"
        ):
            meter.score([REQUEST], stage="s")
        assert resolver.asked >= 2
        deadline = time.monotonic() + 5
        while not arrived and time.monotonic() < deadline:
            time.sleep(0.01)
        assert arrived == [b""], "it was connected to, and told nothing"
        totals = ledger.totals()
        assert (totals.done, totals.failed, totals.unknown) == (0, 1, 0)


def test_batches_are_guarded_too(llama: str, metadata: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", Resolver(["127.0.0.1", METADATA]))
    port = int(llama.rsplit(":", 1)[1].split("/")[0])
    backend = OpenAIBackend("smol", base_url=f"http://model.test:{port}/v1", allow_http=True, batch=True)
    with listener(METADATA, port) as arrived:
        backend._connection.open()
        with pytest.raises(BackendError, match=r"^base_url: .*nothing was sent"):
            backend._connection.manage(lambda client: client.batches.list())
        time.sleep(0.1)
        assert set(arrived) <= {b""}


@pytest.mark.parametrize(
    ("url", "allow_http", "peer", "problem"),
    [
        ("https://model.test/v1", False, "93.184.216.34", ""),
        ("https://model.test/v1", False, "169.254.169.254", "now leads to 169.254.169.254"),
        ("https://model.test/v1", True, "::ffff:169.254.169.254", "now leads to 169.254.169.254"),
        ("https://model.test/v1", False, "fe80::1%eth0", "now leads to fe80::1"),
        ("http://model.test/v1", True, "10.0.0.7", ""),
        ("http://model.localhost/v1", False, "127.0.0.1", ""),
        ("http://localhost/v1", False, "::1", ""),
        (
            "http://model.localhost/v1",
            False,
            "10.0.0.7",
            "leads to 10.0.0.7, another machine, over plain http",
        ),
        ("https://model.test/v1", False, None, ""),
    ],
)
def test_addresses(url: str, allow_http: bool, peer: str | None, problem: str) -> None:
    found = PeerCheck(url, allow_http=allow_http).problem(None if peer is None else (peer, 443))
    assert problem in found
    assert bool(found) == bool(problem)
