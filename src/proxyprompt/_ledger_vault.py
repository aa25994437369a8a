"""What of a call the ledger keeps: everything, numbers only, or everything encrypted.

``full``
    Prompts and answers as they are, in a file for the owner's eyes only.
``hash``
    Log-probabilities and token counts, and by what means the server gave them; no prompt, no generated text, no error
    text. The names of the calls are keyed
    hashes (HMAC-SHA-256): without the secret nobody can try out which prompt a row belongs to.
``encrypted``
    Names as with ``hash``; prompts, answers and errors under AES-256-GCM, each bound to its row.

In plain sight stay, in every mode: when calls were made, of which model, for which stage, their tokens and money; with
``hash`` also the log-probabilities.
"""

from __future__ import annotations

import hmac
import json
import os
import re
import stat
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypeAlias

from ._require import require
from .errors import InputError, LedgerCorruptError, LedgerError

__all__ = ["KEY_VARIABLE", "StoreMode", "Vault", "default_key_file", "read_secret"]

StoreMode: TypeAlias = Literal["full", "hash", "encrypted"]
MODES: tuple[StoreMode, ...] = ("full", "hash", "encrypted")
KEY_VARIABLE = "PROXYPROMPT_LEDGER_KEY"
_NONCE = 12


class Vault:
    """Turns keys and texts into what stands in the file, and back.

    Parameters
    ----------
    mode : {"full", "hash", "encrypted"}
    secret : bytes or None
        32 bytes; ``None`` with ``"full"``.
    salt : bytes
        Of this file, so that equal prompts in two ledgers of one secret do not look equal.
    """

    def __init__(self, mode: StoreMode, secret: bytes | None = None, salt: bytes = b"") -> None:
        self.mode = mode
        self._salt = salt
        self._names = self._cipher = None
        if mode != "full":
            assert secret is not None
            self._names = _derive(secret, b"names", salt)
        if mode == "encrypted":
            assert secret is not None
            aead = require("cryptography.hazmat.primitives.ciphers.aead", "encrypted")
            self._cipher = aead.AESGCM(_derive(secret, b"texts", salt))

    def __repr__(self) -> str:
        return f"Vault({self.mode!r})"

    @classmethod
    def new(cls, mode: StoreMode, secret: Callable[[bool], bytes]) -> Vault:
        """For a file that is about to be made; ``secret(create)`` gives the secret."""
        if mode == "full":
            return cls("full")
        if mode == "encrypted":
            require("cryptography", "encrypted")
        return cls(mode, secret(True), os.urandom(16))

    @classmethod
    def of_file(cls, meta: Mapping[str, Any], secret: Callable[[bool], bytes], where: Path) -> Vault:
        """For a file with these ``meta`` rows.

        Raises
        ------
        LedgerError
            If the secret is another one, or the file's mode is not known.
        """
        said, salt = meta.get("store"), meta.get("salt", b"")
        # Never taken for "full" by default: damage must not make an encrypted file one that takes plain text.
        if not isinstance(said, bytes) or not isinstance(salt, bytes):
            raise LedgerCorruptError(
                f"{where} does not say what it keeps of its calls: the table meta is damaged."
            )
        mode = said.decode("utf-8", "replace")
        if mode == "full":
            return cls("full")
        if mode not in MODES:
            raise LedgerError(f"{where} has the store mode {mode!r}, which this version does not know.")
        vault = cls(mode, secret(False), salt)
        if not hmac.compare_digest(vault._check(), bytes(meta.get("check") or b"")):
            raise LedgerError(
                f"{where} was written with another secret (store = {mode!r}).",
                hint=f"Give the one it was made with, in {KEY_VARIABLE} or as key_file.",
            )
        return vault

    def meta(self) -> dict[str, bytes]:
        """Rows of the table ``meta`` by which a later opening knows the mode and checks the secret."""
        rows = {"store": self.mode.encode()}
        if self.mode != "full":
            rows |= {"salt": self._salt, "check": self._check()}
        return rows

    def _check(self) -> bytes:
        return self._hmac(b"check")[:16]

    def _hmac(self, data: bytes) -> bytes:
        assert self._names is not None
        return hmac.digest(self._names, data, "sha256")

    def name(self, raw: bytes) -> bytes:
        """How a key stands in the file, 32 bytes."""
        return raw if self.mode == "full" else self._hmac(b"key" + raw)

    def conceal(self, text: str) -> str:
        """A text that is only ever compared, for example a hash of a query: as it is, or as a keyed hash."""
        return text if self.mode == "full" else self._hmac(b"text" + text.encode()).hex()[:32]

    def seal(self, text: bytes | None, name: bytes, column: str) -> bytes | None:
        """What is stored of a text; with ``hash`` that of a body only, which must hold numbers."""
        if text is None or self.mode == "full":
            return text
        if self.mode == "hash":
            return _numbers_of(text) if column == "body" else None
        assert self._cipher is not None
        nonce = os.urandom(_NONCE)
        return nonce + bytes(self._cipher.encrypt(nonce, text, column.encode() + b"|" + name))

    def open(self, stored: bytes | None, name: bytes, column: str) -> bytes | None:
        """The text again.

        Raises
        ------
        LedgerCorruptError
            If it was not sealed by this secret for this row and column.
        """
        if stored is None or self.mode != "encrypted":
            return stored
        assert self._cipher is not None
        try:
            opened = self._cipher.decrypt(stored[:_NONCE], stored[_NONCE:], column.encode() + b"|" + name)
        except Exception as error:
            # cryptography raises InvalidTag, or ValueError for what is too short to be sealed at all.
            raise LedgerCorruptError(
                f"The {column} of {name.hex()} cannot be decrypted: it was altered, or moved from another row."
            ) from error
        return bytes(opened)

    def seal_error(self, text: str, name: bytes) -> str | bytes:
        """An error message, which may quote prompt or answer."""
        if self.mode == "full":
            return text
        if self.mode == "hash":
            return f"{len(text)} characters, not stored"
        sealed = self.seal(text.encode("utf-8", "surrogatepass"), name, "error")
        assert sealed is not None
        return sealed

    def open_error(self, stored: str | bytes | None, name: bytes) -> str | None:
        """The message again."""
        if isinstance(stored, bytes):
            opened = self.open(stored, name, "error")
            return None if opened is None else opened.decode("utf-8", "replace")
        return stored


def _derive(secret: bytes, purpose: bytes, salt: bytes) -> bytes:
    return hmac.digest(secret, b"proxyprompt ledger 1|" + purpose + b"|" + salt, "sha256")


_EVIDENCE = ("logprobs", "decisions", "texts")
_FINGERPRINT = re.compile(r"[A-Za-z0-9._:+-]{1,64}")


def _numbers_of(body: bytes) -> bytes:
    """The body; refused with any text in it beyond the names of scores, their infinity, and the kind of evidence.

    The server's name for its configuration stays if it looks like one, and is left out otherwise: the answer is paid for.
    """
    try:
        data = json.loads(body)
    except ValueError:
        data = ""
    if isinstance(data, dict) and data.get("evidence", "logprobs") in _EVIDENCE:
        rest = {name: part for name, part in data.items() if name not in ("evidence", "fingerprint")}
        if all(_numeric(part) for part in rest.values()):
            mark = data.get("fingerprint", "-")
            if isinstance(mark, str) and _FINGERPRINT.fullmatch(mark):
                return body
            del data["fingerprint"]
            return json.dumps(data, allow_nan=False, separators=(",", ":")).encode()
    raise InputError(
        "store='hash' keeps numbers only, and this answer holds text.",
        hint="Use store='encrypted' or 'full' for tasks with generated text.",
    )


def _numeric(value: Any) -> bool:
    if isinstance(value, list):
        return all(_numeric(part) for part in value)
    return value is None or value == "-inf" or isinstance(value, bool | int | float)


def default_key_file() -> Path:
    """Where the secret is if neither the environment nor the caller names it."""
    import platformdirs

    return Path(platformdirs.user_config_path("proxyprompt")) / "ledger.key"


def read_secret(key_file: str | os.PathLike[str] | None, *, create: bool) -> bytes:
    """The 32 bytes from ``key_file``, else from the environment, else from the default file.

    Parameters
    ----------
    key_file : path or None
    create : bool
        Whether a missing file may be made, with a random secret, mode 0600.

    Raises
    ------
    LedgerError
        If it is missing, malformed, or readable by others.
    """
    given = os.environ.get(KEY_VARIABLE)
    if key_file is None and given is not None:
        return _parse(given, f"the environment variable {KEY_VARIABLE}")
    path = default_key_file() if key_file is None else Path(key_file).expanduser().absolute()
    try:
        if create:
            _make(path)
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0)), encoding="utf-8") as file:
            state = os.fstat(file.fileno())
            if os.name == "posix" and (state.st_mode & 0o077 or not stat.S_ISREG(state.st_mode)):
                raise LedgerError(
                    f"The key file {path} is open to others (mode {stat.S_IMODE(state.st_mode):04o}).",
                    hint=f"Run: chmod 600 {path}",
                )
            return _parse(file.read(200), str(path))
    except FileNotFoundError as error:
        raise LedgerError(
            f"The secret of this ledger is missing: {path} does not exist.",
            hint=f"Restore the file, or set {KEY_VARIABLE}; without it the ledger cannot be read.",
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise LedgerError(f"The key file {path} could not be read: {error}.") from error


def _make(path: Path) -> None:
    if path.exists():
        return
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(os.urandom(32).hex() + "\n")
            file.flush()
            os.fsync(file.fileno())
        # A link appears whole or not at all, and never in place of another process's secret.
        with suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        Path(temporary).unlink()


def _parse(text: str, where: str) -> bytes:
    text = text.strip()
    if len(text) != 64 or any(c not in "0123456789abcdefABCDEF" for c in text):
        # The text itself is never shown: it may be a real secret with a slip in it.
        raise LedgerError(
            f"The secret in {where} must be 64 hexadecimal digits.",
            hint='Make one with: python -c "import secrets; print(secrets.token_hex(32))"',
        )
    return bytes.fromhex(text)
