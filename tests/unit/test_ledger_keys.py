"""Twenty thousand hostile prompts: rendered as plain concatenation, and no two of them under one key."""

from __future__ import annotations

from itertools import islice, product

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxyprompt.backends.base import Message, ScoreRequest
from proxyprompt.ledger import RequestKeys
from proxyprompt.prompt import Demonstration, FewShotPrompt, Query

# What breaks templates, encoders, shells, pages and terminals, beside whatever Hypothesis thinks of.
NASTY = (
    "", " ", "\n", "\r\n", "\n\n", "\t", "\x00", "\x85", "\x1b]52;c;cm0=\x07",
    "{input}", "{output}", "{{input}}", "{0}", "{input.__class__}", "{input!r:>9}", "{% raw %}", "${HOME}", "%s%n",
    "</script><script>alert(1)</script>", "=1+1", '"', "\\", "\\n", '","b":"', "I: x\nO: y",
    "e\u0301", "\u00e9", "\u202e", "\u200b", "\ufeff", "\U0001f600", "\ud83d\ude00", "\ud800", "\u2028", "\ufdfa",
    "\u0130", "\u00df", "\U000e0041",
)  # fmt: skip
FRAGMENT = st.one_of(
    st.sampled_from(NASTY), st.text(max_size=12), st.text(alphabet=list("{}\\\"'<&%$\n "), max_size=8)
)
PER_EXAMPLE = 256
EXAMPLES = 90


def rendered(instruction: str, demonstrations: list[tuple[str, str]], query: str) -> str:
    """By concatenation alone; the last answer is left open, without the space before it."""
    blocks = [instruction] if instruction else []
    blocks += ["I: " + text + "\nO: " + answer for text, answer in demonstrations]
    return "\n\n".join([*blocks, "I: " + query + "\nO:"])


def test_twenty_thousand_prompts_are_rendered_unchanged_and_have_keys_of_their_own() -> None:
    keys = RequestKeys({"model": "m", "base_url": "https://example.org/v1"}, "score", {})
    by_key: dict[str, str] = {}
    seen: set[str] = set()

    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(FRAGMENT, min_size=7, max_size=7, unique=True), st.sampled_from(["", "Pick.", "{input}"]))
    def one(parts: list[str], instruction: str) -> None:
        for first, answer, second, query in islice(product(parts, repeat=4), 7, None, 7**4 // PER_EXAMPLE):
            demonstrations = [(first, answer + "!"), (second, "b")]
            prompt = FewShotPrompt(
                tuple(
                    Demonstration(f"d{n}", {"input": text}, out)
                    for n, (text, out) in enumerate(demonstrations)
                ),
                instruction,
                "I: {input}\nO: {output}",
            )
            text = prompt.render([True, True], Query("q", {"input": query}, "b"))
            expected = rendered(instruction, demonstrations, query)
            assert text == expected
            seen.add(expected)
            for request in (
                ScoreRequest(expected, (" a", " b")),
                ScoreRequest((Message("user", expected),), (" a", " b")),
            ):
                key = keys.key(request)
                whole = f"{type(request.prompt).__name__}|{expected}"
                assert by_key.setdefault(key, whole) == whole
                assert keys.key(ScoreRequest(request.prompt, request.candidates)) == key

    one()
    assert len(seen) >= 20_000, len(seen)
    assert len(by_key) == 2 * len(seen)
