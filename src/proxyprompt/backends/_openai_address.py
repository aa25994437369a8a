"""Where requests go: which addresses are allowed, and how an address is shown without credentials."""

from __future__ import annotations

import base64
import html
import ipaddress
import json
import re
import socket
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import SplitResult, quote, unquote, urlsplit

from proxyprompt.errors import BackendError, InputError

_METADATA_HOSTS = frozenset({"metadata.google.internal", "metadata", "instance-data"})
_METADATA = frozenset({ipaddress.ip_address("fd00:ec2::254"), ipaddress.ip_address("100.100.100.200")})
"""Cloud metadata services outside the link-local ranges."""


def public_url(url: str) -> str:
    """``scheme://host[:port]/path`` of ``url``: no user, password, query or fragment."""
    parts = _parts(url)
    host = parts.netloc.rpartition("@")[2].lower()
    return f"{parts.scheme}://{host}{parts.path.rstrip('/')}"


def _parts(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        valid = False
    if not valid:
        # The value may hold a password, so the message does not repeat it.
        raise InputError("base_url is not an http(s) URL.", hint="Give e.g. http://127.0.0.1:8080/v1")
    return parts


def check_address(url: str, *, allow_http: bool = False) -> None:
    """Refuse addresses that would show a key to the wrong party.

    Parameters
    ----------
    url : str
    allow_http : bool
        Whether plain HTTP may leave this machine.

    Raises
    ------
    InputError
        Plain HTTP to another machine; a link-local or cloud metadata address. Names are looked up by
        :func:`check_lookup`, at the first call.
    """
    parts = _parts(url)
    host = (parts.hostname or "").rstrip(".")
    address = _as_address(host)
    if host in _METADATA_HOSTS or (address is not None and _forbidden(address)):
        raise InputError(f"base_url: {host!r} is a link-local or metadata address, which is never asked.")
    loopback = host == "localhost" or host.endswith(".localhost")
    loopback = loopback or (address is not None and address.is_loopback)
    if parts.scheme == "http" and not loopback and not allow_http:
        raise InputError(
            f"base_url: plain http to {host!r} would show the key and the prompts to everyone on the way.",
            hint="Use https, or pass allow_http=True for a server on a network that you trust.",
        )


def check_lookup(url: str) -> None:
    """Refuse a name that leads to a link-local or metadata address; a name that leads nowhere fails later.

    A name can lead elsewhere at the next look-up; :class:`PeerCheck` sees where each connection really goes.
    """
    host = _parts(url).hostname or ""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return
    for *_, place in found:
        address = _as_address(str(place[0]))
        if address is not None and _forbidden(address):
            raise BackendError(f"base_url: {host!r} leads to {address}, a link-local or metadata address.")


class PeerCheck:
    """Looks at the address that each new connection has reached, before anything is sent on it.

    Whoever answers for a name can answer differently the second time: the address that was checked first says nothing
    about the one that is connected to. To be hooked into the client's requests; a connection to a proxy is not looked at.

    Parameters
    ----------
    url : str
    allow_http : bool
        Whether plain HTTP may leave this machine.
    """

    def __init__(self, url: str, *, allow_http: bool = False) -> None:
        parts = _parts(url)
        self._host = parts.hostname or ""
        self._stays = parts.scheme == "http" and not allow_http

    async def hook(self, request: Any) -> None:
        """An event hook of the HTTP library: watches the connection that is made for this request, if one is."""
        leads_to = ""

        async def trace(event: str, info: Mapping[str, Any]) -> None:
            nonlocal leads_to
            if event == "connection.connect_tcp.started":
                leads_to = info["host"]
            elif event == "connection.connect_tcp.complete" and leads_to.lower() == self._host:
                stream = info["return_value"]
                problem = self.problem(stream.get_extra_info("server_addr"))
                if problem:
                    await stream.aclose()
                    raise BackendError(f"base_url: {problem}; nothing was sent.")

        request.extensions["trace"] = trace

    def problem(self, peer: Sequence[Any] | None) -> str:
        """What is wrong with an address that was reached; empty if nothing is, or if it is not known."""
        address = None if not peer else _as_address(str(peer[0]))
        if address is None:
            return ""
        if _forbidden(address):
            return f"{self._host!r} now leads to {address}, a link-local or metadata address"
        if self._stays and not address.is_loopback:
            return f"{self._host!r} leads to {address}, another machine, over plain http"
        return ""


def _as_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        try:
            # 0xA9FEA9FE, 2852039166 and the like, which the system's resolver takes too
            return ipaddress.ip_address(socket.inet_aton(host))
        except (OSError, UnicodeEncodeError):
            return None
    mapped = getattr(address, "ipv4_mapped", None)
    return address if mapped is None else mapped


def _forbidden(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    return address.is_link_local or address in _METADATA


def credentials(url: str) -> list[str]:
    """User, password and values of the query of an address, as they are written and as they are meant."""
    parts = urlsplit(url)
    found = [parts.username or "", parts.password or "", *(v for _, _, v in _pairs(parts.query))]
    return [text for part in found for text in dict.fromkeys((part, unquote(part))) if text]


_TELLING = re.compile(r"(?i)key|token|secret|auth|pass|cookie|credential|signature")


def secrets_of(client: Any) -> list[str]:
    """Credentials that an ``openai`` client sends: its key, an Azure token, and what it was given in headers and query."""
    found = [getattr(client, "api_key", None), getattr(client, "_azure_ad_token", None)]
    for fields in (getattr(client, "_custom_headers", None), getattr(client, "_custom_query", None)):
        items = fields.items() if isinstance(fields, Mapping) else ()
        found += [value for name, value in items if _TELLING.search(str(name))]
    texts = [text for text in found if isinstance(text, str)]
    # "Bearer abc" is repeated as "abc", too.
    return [form for text in texts for form in dict.fromkeys((text, text.rpartition(" ")[2]))]


def _pairs(query: str) -> list[tuple[str, str, str]]:
    return [field.partition("=") for field in query.split("&")]


def redact(text: str, secrets: Sequence[str]) -> str:
    """``text`` without the secrets, however they are encoded, and anything else that looks like a credential."""
    for secret in sorted(secrets, key=len, reverse=True):
        for form in _forms(secret):
            text = text.replace(form, "***")
    text = re.sub(r"(?i)\b(sk-|hf_|bearer\s+)[\w.\-*]{4,}", r"\1***", text)
    text = re.sub(
        r"(?i)\b((?:api[-_]?key|password|secret|token)[\"']?\s*[=:]\s*[\"']?)[^\s&\"',;*]{6,}", r"\1***", text
    )
    return re.sub(r"(https?://)[^/@\s]+@", r"\1***@", text)


def _forms(secret: str) -> list[str]:
    """A secret as servers and loggers may repeat it. Short ones would cut ordinary words out of a message."""
    if len(secret) < 4:
        return []
    raw = secret.encode()
    escaped = json.dumps(secret)[1:-1]
    forms = [
        secret,
        escaped,
        escaped.replace("/", "\\/"),
        html.escape(secret),
        quote(secret),
        quote(secret, safe=""),
    ]
    forms += [repr(secret)[1:-1], raw.hex(), raw.hex().upper()]
    forms += [encode(raw).decode().rstrip("=") for encode in (base64.b64encode, base64.urlsafe_b64encode)]
    return sorted(dict.fromkeys(forms), key=len, reverse=True)


def one_line(text: str) -> str:
    """White space as single spaces, at most 300 characters."""
    return " ".join(text.split())[:300]
