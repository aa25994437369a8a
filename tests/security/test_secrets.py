"""No key is written anywhere: the command line runs with canaries against servers that repeat what they are sent.

Every file of a run, its ledger included, and both streams are searched for the canaries as they are, in base64, in URL
encoding, in hexadecimal and with JSON escapes.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import openai
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "backends"))
from scripted_server import Reply, Scripted, scripted_server

from proxyprompt.backends._openai_address import credentials, redact
from proxyprompt.backends.base import ScoreRequest
from proxyprompt.backends.openai import OpenAIBackend
from proxyprompt.errors import BackendError

# Shapes of keys: OpenAI, Anthropic, Azure (32 hexadecimal digits), Hugging Face, AWS; the last needs escapes everywhere.
KEYS = {
    "openai": "sk-proj-CANARYa1B2c3D4e5F6g7H8",
    "anthropic": "sk-ant-api03-CANARYz9Y8x7W6v5U4",
    "azure": "c0ffee00d15ea5e5c0ffee00d15ea5e5",
    "huggingface": "hf_CANARYqwertyuiopasdfgh",
    "aws": "AKIACANARY7EXAMPLE99",
    "odd": 'CANARY/+="\\&<key>?',
}
USER, PASSWORD, QUERY = "canaryuser", "CANARY-pass.word", "CANARY0query1value2"


def forms(secret: str) -> set[bytes]:
    """The secret as it may stand in a file."""
    raw = secret.encode()
    texts = {
        secret,
        quote(secret),
        quote(secret, safe=""),
        json.dumps(secret)[1:-1],
        raw.hex(),
        repr(secret)[1:-1],
    }
    texts |= {
        json.dumps(json.dumps(secret))[3:-3],
        secret.replace('"', "&quot;"),
        "".join(f"\\u{ord(c):04x}" for c in secret),
    }
    # Base64 depends on where the secret begins; its middle is searched for at all three offsets.
    for pad in range(3):
        encoded = base64.b64encode(b"x" * pad + raw).decode().rstrip("=")
        texts.add(encoded[4 if pad else 0 : -2])
    return {t.encode() for t in texts}


def leaks(folder: Path, streams: str, secrets: dict[str, str]) -> list[tuple[str, str]]:
    places = {"streams": streams.encode()} | {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }
    assert len(places) > 1, "a run leaves files behind"
    return [
        (where, name)
        for where, data in places.items()
        for name, key in secrets.items()
        for f in forms(key)
        if f in data
    ]


@pytest.fixture
def server() -> Iterator[Scripted]:
    with scripted_server() as running:
        yield running


def project(folder: Path, url: str) -> Path:
    """A configuration whose address carries credentials in all places that an address has."""
    demos = [{"id": f"d{i}", "input": f"demo {i}", "label": "yes" if i % 2 else "no"} for i in range(3)]
    rows = [{"id": f"q{i}", "input": f"query {i}", "label": "yes" if i % 2 else "no"} for i in range(48)]
    (folder / "demos.jsonl").write_text("\n".join(map(json.dumps, demos)))
    (folder / "queries.jsonl").write_text("\n".join(map(json.dumps, rows)))
    address = url.replace("//", f"//{USER}:{PASSWORD}@") + f"?api-key={QUERY}"
    (folder / "config.toml").write_text(
        f"""output = "out"
[prompt]
demonstrations = "demos.jsonl"
demonstration_template = "In: {{input}}\\nOut: {{output}}"
[queries]
file = "queries.jsonl"
sizes = {{explain = 8, select = 12, sealed = 28}}
[task]
labels = ["yes", "no"]
[target]
model = "openai:m"
base_url = "{address}"
"""
    )
    return folder / "config.toml"


COUNT = itertools.count()


def answer(body: dict[str, Any], echo: str) -> dict[str, Any]:
    odd = int(re.findall(r"(?:query|demo) (\d+)", str(body["prompt"]))[-1]) % 2
    first, second = (" yes", " no") if odd else (" no", " yes")
    top = {first: -0.2, second: -1.8, f" {echo}": -9.0}
    choice = {"index": 0, "text": first, "finish_reason": "length",
              "logprobs": {"tokens": [first], "token_logprobs": [-0.2], "top_logprobs": [top]}}  # fmt: skip
    return {
        "id": f"{echo}-{next(COUNT)}", "object": "text_completion", "created": 1, "model": "m", "choices": [choice],
        "usage": {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10},
    }  # fmt: skip


def echoing(keys: list[str]) -> str:
    """Everything a careless server may say about credentials that it was sent."""
    said = [f"Incorrect API key provided: {k}; header 'Authorization: Bearer {k}'; api-key={k}" for k in keys]
    said += (
        [json.dumps(k) for k in keys] + [quote(k, safe="") for k in keys] + [k.encode().hex() for k in keys]
    )
    said += [base64.b64encode(k.encode()).decode() for k in keys]
    return " | ".join(said)


def run(config: Path, key: str, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable,
            "-X",
            "dev",
            "-W",
            "ignore",
            "-c",
            "from proxyprompt.cli import main; main()",
            *more,
            str(config),
        ],
        env={**os.environ, "OPENAI_API_KEY": key, "OPENAI_LOG": "debug", "NO_COLOR": "1", "COLUMNS": "4000"},
        cwd=config.parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.parametrize("name", ["huggingface", "odd"])
def test_a_whole_run_writes_no_key(server: Scripted, tmp_path: Path, name: str) -> None:
    key = KEYS[name]
    server.reply = lambda body: answer(body, key)
    done = run(project(tmp_path, server.url), key, "run")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / "report.html").is_file()
    assert server.requests
    secrets = {"key": key, "password": PASSWORD, "query": QUERY, "user": USER}
    assert leaks(tmp_path / "out", done.stdout + done.stderr, secrets) == []


FAILURES: dict[str, Any] = {
    "401": lambda said: (401, {"error": {"message": said, "code": "invalid_api_key"}}),
    "403 as text": lambda said: (403, said.encode()),
    "404": lambda said: (404, {"error": {"message": said, "param": said, "code": said, "type": said}}),
    "400": lambda said: (400, {"error": {"message": said}}),
    "quota": lambda said: (429, {"error": {"message": said, "code": "insufficient_quota"}}),
    "200 that is no answer": lambda said: (200, {"error": {"message": said}}),
    "200 that is not JSON": lambda said: (200, f"<html>{said}".encode()),
    "header": lambda said: (401, {"error": {"message": "no"}}, {"www-authenticate": said.replace("\n", " ")[:900]}),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAILURES)
def test_a_failing_run_writes_no_key_even_if_the_server_repeats_it(
    server: Scripted, tmp_path: Path, fault: str
) -> None:
    key = KEYS["odd"]
    reply: Reply = FAILURES[fault](echoing([key, PASSWORD, QUERY]))
    server.reply = lambda body: reply
    done = run(project(tmp_path, server.url), key, "run")
    assert done.returncode in (2, 4), done.stderr[-3000:]
    assert "Error:" in done.stderr
    secrets = {"key": key, "password": PASSWORD, "query": QUERY}
    assert leaks(tmp_path / "out", done.stdout + done.stderr, secrets) == []


def test_the_search_would_find_it(tmp_path: Path) -> None:
    for name, key in KEYS.items():
        for k, form in enumerate(forms(key)):
            (tmp_path / f"{name}-{k}").write_bytes(b"xx" + form + b"yy")
    found = leaks(tmp_path, "", KEYS)
    assert {where for where, _ in found} == {p.name for p in tmp_path.iterdir()}
    (tmp_path / "more").write_bytes(base64.b64encode(b"user:" + KEYS["aws"].encode()))
    assert ("more", "aws") in leaks(tmp_path, "", KEYS)


@pytest.mark.parametrize("name", KEYS)
def test_tracebacks_and_representations(server: Scripted, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    key = KEYS[name]
    monkeypatch.setenv("OPENAI_API_KEY", key)
    server.reply = lambda body: (401, {"error": {"message": echoing([key])}})
    model = OpenAIBackend(
        "m", base_url=server.url.replace("//", f"//{USER}:{PASSWORD}@") + f"?api-key={QUERY}"
    )
    with pytest.raises(BackendError) as caught:
        list(model.score([ScoreRequest("p", (" yes", " no"))]))
    # With the values of locals, as crash reporters print them, every object on the way is represented.
    shown = "".join(traceback.format_exception(caught.value)) + repr(model) + json.dumps(dict(model.identity))
    for secret in (key, PASSWORD, QUERY):
        assert not [f for f in forms(secret) if f in shown.encode()]


def test_credentials_in_headers_and_query_of_the_users_client(server: Scripted) -> None:
    canaries = ["CANARYgateway0key1", "CANARYquery2sig3", "CANARYazure4token5", "CANARYbearer6only7"]
    client = openai.AzureOpenAI(
        base_url=server.url,
        azure_ad_token=canaries[2],
        api_version="2026-01-01",
        default_headers={
            "Ocp-Apim-Subscription-Key": canaries[0],
            "X-Auth": f"Bearer {canaries[3]}",
            "X-Team": "no secret",
        },
        default_query={"sig-token": canaries[1]},
    )
    said = " ".join(f"invalid: {canary}" for canary in canaries) + " of no secret at 2026-01-01"
    server.reply = lambda body: (401, {"error": {"message": said}})
    with pytest.raises(BackendError) as caught:
        list(OpenAIBackend("m", client=client).score([ScoreRequest("p", (" yes", " no"))]))
    client.close()
    shown = "".join(traceback.format_exception(caught.value))
    assert not [canary for canary in canaries for f in forms(canary) if f in shown.encode()]
    assert "invalid: *** of no secret at 2026-01-01" in shown


def test_redaction_leaves_words_alone() -> None:
    text = "max_tokens: the token limit of this model is 4096; no secret about it, see https://x.example/a@b"
    assert redact(text, ["", "a", "no"]) == text
    assert redact("api_key=0123456789abcdef&x=1", []) == "api_key=***&x=1"
    assert redact("hf_abcdefghij sk-abcdef Bearer abcdef", []) == "hf_*** sk-*** Bearer ***"
    assert credentials("https://u%40x:p%2Fw@h.example/v1?api-key=k%3D1&v=2") == [
        "u%40x", "u@x", "p%2Fw", "p/w", "k%3D1", "k=1", "2",
    ]  # fmt: skip
