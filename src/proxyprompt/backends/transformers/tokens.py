"""From rendered prompts to token ids, whole prompts at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from proxyprompt._require import require
from proxyprompt.backends.base import Message, Rendered, ScoreRequest
from proxyprompt.errors import BackendError, InputError

from .pieces import PieceEncoder, may_cut
from .trie import IntArray, Trie, build_trie

__all__ = [
    "Batch",
    "EncodedRequest",
    "TextTokenizer",
    "batch_trie",
    "encode_requests",
    "make_batch",
]

_CHUNK = 2048
# Below this many texts, looking through the vocabulary costs more than it saves.
_MANY = 500
Template = Callable[[list[dict[str, str]]], str]


@dataclass(frozen=True, slots=True)
class EncodedRequest:
    """Token ids of a request.

    Attributes
    ----------
    n_prompt : int
        Tokens of the prompt alone.
    body : ndarray of int64
        The tokens that the prompt has in common with every prompt-and-candidate.
    tails : tuple of ndarray of int64
        What follows the body, per candidate; its log-probability is the candidate's.
    """

    n_prompt: int
    body: IntArray
    tails: tuple[IntArray, ...]

    @property
    def n_read(self) -> int:
        """Most tokens the network reads for one candidate; the last one is predicted, never read."""
        return int(self.body.size) + max(int(tail.size) for tail in self.tails) - 1

    @property
    def n_naive(self) -> int:
        """Tokens that one pass per candidate would read."""
        return sum(int(self.body.size + tail.size) - 1 for tail in self.tails)


@dataclass(frozen=True, slots=True)
class Batch:
    """What a batch of requests asks of an engine.

    Attributes
    ----------
    trie : Trie
        One owner per request, one slot per candidate.
    n_prompt : tuple of int
        Tokens of each prompt.
    n_candidates : tuple of int
    n_naive : int
        Tokens that one full pass per prompt and candidate would read.
    """

    trie: Trie
    n_prompt: tuple[int, ...]
    n_candidates: tuple[int, ...]
    n_naive: int


class TextTokenizer:
    """A fast tokenizer and a chat template.

    Parameters
    ----------
    raw : tokenizers.Tokenizer
        Truncation and padding are switched off.
    template : callable or None
        Renders chat turns to text up to the assistant's turn; ``None`` where the model has no template.
    """

    def __init__(self, raw: Any, template: Template | None) -> None:
        raw.no_truncation()
        raw.no_padding()
        self.raw = raw
        self.template = template
        # Some tokenizers close every text with an end marker; a candidate must be able to follow.
        self._n_after = _specials_after(raw)
        self._pieces: PieceEncoder | None = None
        self._may_cut: bool | None = None

    @classmethod
    def from_folder(cls, folder: Path) -> TextTokenizer:
        """Load what transformers' ``AutoTokenizer`` makes of a model folder.

        Raises
        ------
        BackendError
            If there is no tokenizer, or only one without a fast implementation.
        """
        auto = require("transformers", "transformers").AutoTokenizer
        try:
            tokenizer = auto.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, ImportError) as error:
            raise BackendError(
                f"model: no tokenizer could be loaded from {folder.name!r} ({_first_line(error)}).",
                hint="The folder needs a tokenizer.json; save one with tokenizer.save_pretrained(folder).",
            ) from error
        if not getattr(tokenizer, "is_fast", False):
            raise BackendError(
                f"model: the tokenizer of {folder.name!r} has no fast implementation.",
                hint="Convert it to tokenizer.json with transformers and save it into the folder.",
            )

        def template(turns: list[dict[str, str]]) -> str:
            text: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            return text

        return cls(tokenizer.backend_tokenizer, template if tokenizer.chat_template else None)

    @classmethod
    def from_files(cls, folder: Path) -> TextTokenizer:
        """Load ``tokenizer.json`` and ``chat_template.jinja`` directly, without importing transformers.

        For folders this package wrote itself, where both are known to equal what transformers loads.
        """
        tokenizers = require("tokenizers", "transformers")
        raw = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        file = folder / "chat_template.jinja"
        if not file.exists():
            return cls(raw, None)
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        return cls(raw, _jinja_template(file.read_text(encoding="utf-8"), config))

    def text(self, prompt: Rendered, where: str) -> tuple[str, bool]:
        """Text of a prompt, and whether special tokens are still to be added to it."""
        if isinstance(prompt, str):
            return prompt, True
        if self.template is None:
            raise InputError(
                f"{where}.prompt is a list of chat turns, and the model has no chat template.",
                hint="Render the prompt in completion style, or take an instruction-tuned model.",
            )
        if not prompt or not all(isinstance(turn, Message) for turn in prompt):
            raise InputError(
                f"{where}.prompt: {prompt!r} is neither text nor a non-empty tuple of Message.",
                hint="Pass a string, or at least one chat turn.",
            )
        if any(turn.name is not None for turn in prompt):
            raise InputError(
                f"{where}.prompt: a turn has a name, which chat templates of local models do not show.",
                hint="Leave names out, or ask the model through an OpenAI-compatible server.",
            )
        try:
            return self.template([{"role": turn.role, "content": turn.content} for turn in prompt]), False
        except Exception as error:
            raise InputError(
                f"{where}.prompt: the model's chat template refuses these turns ({_first_line(error)}).",
                hint="Check the order of roles; some templates have no system turn.",
            ) from error

    def encode(self, texts: Sequence[str], *, special: bool) -> list[IntArray]:
        """Token ids of each text, shape (n_tokens,) each; without special tokens behind it."""
        if len(texts) >= _MANY and self._may_cut is not False:
            pieces = self._piece_encoder(texts, special=special)
            if pieces is not None:
                return pieces.encode(texts, special=special)
        return self._encode_whole(texts, special=special)

    def _encode_whole(self, texts: Sequence[str], *, special: bool) -> list[IntArray]:
        encodings = self.raw.encode_batch_fast(list(texts), add_special_tokens=special)
        after = self._n_after if special else 0
        return [_ids(encoding.ids, after) for encoding in encodings]

    def _piece_encoder(self, texts: Sequence[str], *, special: bool) -> PieceEncoder | None:
        if self._may_cut is None:
            self._may_cut = may_cut(self.raw)
            if self._may_cut:
                # The conditions suffice by proof; a few texts are tried all the same.
                some = texts[:: max(1, len(texts) // 8)]
                self._pieces = PieceEncoder(self.raw, self._n_after)
                both = zip(
                    self._pieces.encode(some, special=special),
                    self._encode_whole(some, special=special),
                    strict=True,
                )
                self._may_cut = all(np.array_equal(ours, whole) for ours, whole in both)
        return self._pieces if self._may_cut else None

    def ends(self, text: str) -> IntArray:
        """Where each token of a text ends, in characters, special tokens in front included; ascending."""
        # Beginnings would not do: byte-level tokenizers report them without the white space in front.
        offsets = self.raw.encode(text, add_special_tokens=True).offsets
        ends = np.asarray([end for _, end in offsets[: len(offsets) - self._n_after]], dtype=np.int64)
        ascending: IntArray = np.maximum.accumulate(ends)
        return ascending

    def decode(self, ids: Sequence[int], after: Sequence[int] = ()) -> str:
        """Text of ``ids`` as they read behind ``after``, special tokens left out."""
        # Some decoders strip the space in front of a text's first word, which is not ours to lose here.
        before: str = self.raw.decode(list(after), skip_special_tokens=True)
        both: str = self.raw.decode([*after, *ids], skip_special_tokens=True)
        if both.startswith(before):
            return both[len(before) :]
        text: str = self.raw.decode(list(ids), skip_special_tokens=True)
        return text


def encode_requests(
    tokenizer: TextTokenizer, requests: Sequence[ScoreRequest], known: dict[ScoreRequest, EncodedRequest]
) -> list[EncodedRequest]:
    """Tokenise every distinct prompt-and-candidate of a batch once.

    Requests found in ``known`` are taken from there.

    Raises
    ------
    InputError
        For a request without candidates, with equal ones, or with one that adds no token.
    """
    encoded = dict(known)
    first: dict[ScoreRequest, int] = {}
    for index, request in enumerate(requests):
        if request not in encoded:
            first.setdefault(request, index)
    todo = list(first.items())
    for begin in range(0, len(todo), _CHUNK):
        for special in (True, False):
            texts: list[str] = []
            group: list[tuple[ScoreRequest, int]] = []
            for request, index in todo[begin : begin + _CHUNK]:
                _check_candidates(request, index)
                text, wants_special = tokenizer.text(request.prompt, f"requests[{index}]")
                if wants_special == special:
                    group.append((request, index))
                    texts.append(text)
                    texts += [text + candidate for candidate in request.candidates]
            ids = iter(tokenizer.encode(texts, special=special) if texts else [])
            for request, index in group:
                prompt = next(ids)
                encoded[request] = _split(prompt, [next(ids) for _ in request.candidates], request, index)
    return [encoded[request] for request in requests]


def make_batch(encoded: Sequence[EncodedRequest]) -> Batch:
    """Share every prefix of a batch."""
    return Batch(
        batch_trie(encoded),
        tuple(item.n_prompt for item in encoded),
        tuple(len(item.tails) for item in encoded),
        sum(item.n_naive for item in encoded),
    )


def batch_trie(encoded: Sequence[EncodedRequest]) -> Trie:
    """The trie of a batch: one owner per request, one slot per candidate."""
    paths: list[IntArray] = []
    reads: list[tuple[int, int, int, int, int]] = []
    for owner, request in enumerate(encoded):
        start = int(request.body.size)
        paths.append(request.body)
        body = len(paths) - 1
        for slot, tail in enumerate(request.tails):
            reads.append((body, start - 1, int(tail[0]), owner, slot))
            if tail.size > 1:
                paths.append(np.concatenate([request.body, tail[:-1]]))
                reads += [
                    (len(paths) - 1, start + at, int(token), owner, slot) for at, token in enumerate(tail[1:])
                ]
    return build_trie(paths, np.asarray(reads, dtype=np.int64).reshape(-1, 5), len(encoded))


def _check_candidates(request: ScoreRequest, index: int) -> None:
    where = f"requests[{index}].candidates"
    if not request.candidates:
        raise InputError(f"{where} is empty; at least one is needed.", hint="Give the labels to score.")
    if len(set(request.candidates)) != len(request.candidates):
        raise InputError(f"{where}: {request.candidates!r} has duplicates.", hint="Give each candidate once.")


def _split(
    prompt: IntArray, sequences: Sequence[IntArray], request: ScoreRequest, index: int
) -> EncodedRequest:
    for candidate, ids in zip(request.candidates, sequences, strict=True):
        if ids.size == prompt.size and bool((ids == prompt).all()):
            raise InputError(
                f"requests[{index}].candidates: {candidate!r} adds no token to the prompt.",
                hint="Every candidate must be visible to the model's tokenizer.",
            )
    start = min(_shared(prompt, ids) for ids in sequences)
    if start == 0:
        raise InputError(
            f"requests[{index}].prompt: nothing stands before the candidates for this tokenizer.",
            hint="Give a prompt that is not empty.",
        )
    tails = tuple(ids[start:].copy() for ids in sequences)
    if min(tail.size for tail in tails) == 0 or len({tail.tobytes() for tail in tails}) != len(tails):
        raise InputError(
            f"requests[{index}].candidates: {request.candidates!r} are not told apart by the tokenizer.",
            hint="Choose candidates that differ in more than what the tokenizer normalises away.",
        )
    return EncodedRequest(int(prompt.size), prompt[:start], tails)


def _shared(left: IntArray, right: IntArray) -> int:
    size = min(left.size, right.size)
    different = np.flatnonzero(left[:size] != right[:size])
    return int(different[0]) if different.size else size


def _ids(ids: Sequence[int], after: int) -> IntArray:
    array = np.asarray(ids, dtype=np.int64)
    return array[: array.size - after] if after else array


def _specials_after(raw: Any) -> int:
    bare = raw.encode("a", add_special_tokens=False).ids
    dressed = raw.encode("a", add_special_tokens=True).ids
    for after in range(len(dressed) - len(bare) + 1):
        if dressed[len(dressed) - after - len(bare) : len(dressed) - after] == bare:
            return after
    return 0


def _jinja_template(source: str, config: dict[str, Any]) -> Template:
    """Compile a chat template the way transformers does: sandboxed, blocks trimmed."""
    require("jinja2", "transformers")
    sandbox = require("jinja2.sandbox", "transformers")
    environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    compiled = environment.from_string(source)
    specials = {key: value for key, value in config.items() if key.endswith("_token")}

    def template(turns: list[dict[str, str]]) -> str:
        text: str = compiled.render(messages=turns, add_generation_prompt=True, **specials)
        return text

    return template


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
