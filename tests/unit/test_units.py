"""Units beyond demonstrations: what is left of the text, and whose units they are."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from proxyprompt._segments import Segments, sentence_spans, word_spans
from proxyprompt.backends.base import Message
from proxyprompt.errors import InputError
from proxyprompt.prompt import Demonstration, FewShotPrompt, Query
from proxyprompt.units import (
    LIME_MASK,
    InstructionSentences,
    QueryDocuments,
    QuerySentences,
    QueryUnits,
    QueryWords,
)

# Hostile to templates, to splitting and to joining: braces, every kind of white space, combining marks, emoji, surrogates.
PIECES = [
    *(
        "a",
        "Über",
        "don't",
        "3.14",
        "e.g.",
        "U.S.",
        "{input}",
        "%s",
        "good",
        "good",
        "é",
        "e\u0301",
        "नमस्ते",
        "你好。",
        "🙂",
    ),
    *(".", "!", "?", "…", ",", "-", "1.", "\ud800", "_x_", ")"),
    *(" ", "  ", "\t", "\n", "\r\n", "\n\n", "\u00a0", "\u2028", "\x1c", "\x00"),
]
TEXT = st.one_of(st.lists(st.sampled_from(PIECES), max_size=14).map("".join), st.text(max_size=30))
PROMPT = FewShotPrompt(
    (Demonstration("d1", {"input": "one"}, "A"), Demonstration("d2", {"input": "two"}, "B")),
    "Sort the text. Be brief!\nSay A or B.",
    "Text: {input}\nKind: {output}",
)


def query(text: str, **more: str) -> Query:
    return Query("q", {"input": text, **more}, "A", ("A", "B"))


def shown(units: QueryUnits, keep: list[bool] | None) -> str:
    """The query's text as the model reads it."""
    text = units.render(keep, units.query)
    assert isinstance(text, str)
    return text.removeprefix(
        "Sort the text. Be brief!\nSay A or B.\n\nText: one\nKind: A\n\nText: two\nKind: B\n\n"
    )


def kept_of(n: int, seed: int) -> list[bool]:
    return (np.random.default_rng(seed).random(n) < 0.5).tolist()


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        ("No stop at the end", ["No stop at the end"]),
        (
            "It costs 3.50 a piece. See v2.1 at example.com now.",
            ["It costs 3.50 a piece.", "See v2.1 at example.com now."],
        ),
        (
            "Ask Dr. Lee, e.g. on Monday. J. Smith agrees.",
            ["Ask Dr. Lee, e.g. on Monday.", "J. Smith agrees."],
        ),
        (
            "Bills, refunds etc. go here. Nuts etc. Fine.",
            ["Bills, refunds etc. go here.", "Nuts etc.", "Fine."],
        ),
        ("Answer yes or no. Then stop.", ["Answer yes or no.", "Then stop."]),
        ("Take no. 5, not vol. 2.", ["Take no. 5, not vol. 2."]),
        ("Rules:\n- be kind\n- be brief\nNow answer.", ["Rules:", "- be kind", "- be brief", "Now answer."]),
        ("1. Read it.\n2. Answer.\n(a) Stop", ["1. Read it.", "2. Answer.", "(a) Stop"]),
        ("A sentence that is\nwrapped by hand. Next", ["A sentence that is\nwrapped by hand.", "Next"]),
        ("a heading\n\nlower case below", ["a heading", "lower case below"]),
        ('He said "Stop!" and left. "Go." She went.', ['He said "Stop!" and left.', '"Go."', "She went."]),
        ("Well... maybe. Well... Maybe", ["Well... maybe.", "Well...", "Maybe"]),
        ("all lower case . it works . really ?", ["all lower case .", "it works .", "really ?"]),
        ("what? yes!", ["what?", "yes!"]),
        ("你好。再见！好", ["你好。", "再见！", "好"]),
        ("First.\r\n\r\nSecond.", ["First.", "Second."]),
        (" \n ", []),
        ("", []),
    ],
)
def test_sentences(text: str, sentences: list[str]) -> None:
    assert list(Segments(text, sentence_spans(text)).texts) == sentences


@settings(max_examples=200, deadline=None)
@given(TEXT)
def test_sentences_hold_all_but_white_space_in_order(text: str) -> None:
    spans = sentence_spans(text)
    outside = text[: spans[0][0]] if spans else text
    outside += "".join(text[a[1] : b[0]] for a, b in itertools.pairwise(spans)) + (
        text[spans[-1][1] :] if spans else ""
    )
    assert not outside.strip()
    assert all(begin < end and text[begin:end] == text[begin:end].strip() for begin, end in spans)


def test_a_long_text_is_cut_quickly() -> None:
    text = "This is sentence number 3.5 of Dr. Lee.   \n" * 20_000
    assert len(sentence_spans(text)) == 20_000
    for run in (
        "." * 200_000,
        " " * 200_000,
        "\n " * 100_000,
        ")" * 200_000,
        ".)" * 100_000,
        "?" * 200_000 + "a",
    ):
        assert len(sentence_spans(f"One{run}")) <= 1


@settings(max_examples=200, deadline=None)
@given(TEXT, st.integers(0, 99))
@example("  a  b\n", 0)
def test_all_kept_is_the_original_and_what_stays_keeps_its_order(text: str, seed: int) -> None:
    for spans in (sentence_spans(text), word_spans(text, "whitespace"), word_spans(text, "lime")):
        segments = Segments(text, spans)
        n = len(spans)
        if n:
            assert segments.joined([True] * n) == text
        assert segments.joined([False] * n) == ""
        assert segments.replaced([True] * n, "X") == text
        keep = kept_of(n, seed)
        left = [t for t, k in zip(segments.texts, keep, strict=True) if k]
        # White space at the cut never melts two words into one: the words left are the words of what is left.
        joined = segments.joined(keep)
        if spans == word_spans(text, "whitespace"):
            assert joined.split() == left
        at = 0
        for piece in left:
            at = joined.index(piece, at) + len(piece)


@settings(max_examples=200, deadline=None)
@given(TEXT, st.integers(0, 99), st.sampled_from(["whitespace", "lime"]), st.sampled_from(["delete", "mask"]))
def test_words_in_a_prompt(text: str, seed: int, split: str, removal: str) -> None:
    asked = query(text)
    if not word_spans(text, split):
        with pytest.raises(InputError, match="query 'q': no word in its field 'input'"):
            QueryWords(PROMPT, asked, split=split, removal=removal)
        return
    units = QueryWords(PROMPT, asked, split=split, removal=removal)
    whole = PROMPT.render(None, asked)
    assert units.render(None, asked) == units.render([True] * units.n_units, asked) == whole
    keep = kept_of(units.n_units, seed)
    changed = units.inputs(keep)["input"]
    assert shown(units, keep) == f"Text: {changed}\nKind:"
    if (split, removal) == ("whitespace", "delete"):
        assert changed.split() == [word for word, stays in zip(text.split(), keep, strict=True) if stays]
    else:
        stay = iter(keep)
        other = LIME_MASK if removal == "mask" else ""
        pattern = r"\S+" if split == "whitespace" else r"\w+"
        assert changed == re.sub(pattern, lambda word: word.group() if next(stay) else other, text)


def test_words_leave_no_gap_behind() -> None:
    units = QueryWords(PROMPT, query(" a  b\tc d "))
    assert [u.text for u in units.units] == ["a", "b", "c", "d"]
    assert units.inputs([False, True, False, True])["input"] == " b d "
    assert units.inputs([True, False, False, False])["input"] == " a "
    assert units.inputs([False] * 4)["input"] == ""
    assert shown(units, [False] * 4) == "Text: \nKind:"


def test_each_occurrence_of_a_word_is_a_unit_unless_asked_otherwise() -> None:
    asked = query("so so good, so good")
    apart = QueryWords(PROMPT, asked)
    assert [(u.id, u.text) for u in apart.units] == [
        *(("word-1", "so"), ("word-2", "so"), ("word-3", "good,"), ("word-4", "so"), ("word-5", "good")),
    ]
    assert apart.inputs([False, True, True, True, False])["input"] == "so good, so"
    together = QueryWords(PROMPT, asked, split="lime", repeated="together")
    assert [u.text for u in together.units] == ["so", "good"]
    assert together.inputs([False, True])["input"] == "  good,  good"


def test_masked_words() -> None:
    asked = query("Not bad, not good.")
    units = QueryWords(PROMPT, asked, removal="mask")
    assert units.inputs([True, False, True, False])["input"] == "Not UNKWORDZ not UNKWORDZ"
    units = QueryWords(PROMPT, asked, split="lime", removal="mask", mask="?")
    assert units.inputs([True, False, True, False])["input"] == "Not ?, not ?."


def test_five_hundred_words() -> None:
    units = QueryWords(PROMPT, query(" ".join(f"w{i}" for i in range(500))))
    keep = [i % 7 == 0 for i in range(500)]
    assert units.n_units == 500
    assert units.inputs(keep)["input"].split() == [f"w{i}" for i in range(0, 500, 7)]


def test_sentences_of_a_query() -> None:
    units = QuerySentences(PROMPT, query("It was late. I left!  Then it rained."))
    assert [(u.kind, u.id, u.text) for u in units.units] == [
        ("sentence", "sentence-1", "It was late."),
        ("sentence", "sentence-2", "I left!"),
        ("sentence", "sentence-3", "Then it rained."),
    ]
    assert units.inputs([True, False, True])["input"] == "It was late.  Then it rained."
    assert shown(units, None) == "Text: It was late. I left!  Then it rained.\nKind:"
    with pytest.raises(InputError, match="no sentence in its field 'input', which is ' '"):
        QuerySentences(PROMPT, query(" "))


def test_instruction_sentences_alone() -> None:
    units = InstructionSentences(PROMPT)
    asked = query("x")
    assert [u.text for u in units.units] == ["Sort the text.", "Be brief!", "Say A or B."]
    whole = PROMPT.render(None, asked)
    assert units.render(None, asked) == units.render([True] * 3, asked) == whole
    rest = "\n\nText: one\nKind: A\n\nText: two\nKind: B\n\nText: x\nKind:"
    assert units.render([False, True, False], asked) == "Be brief!" + rest
    assert units.render([True, False, True], asked) == "Sort the text.\nSay A or B." + rest
    assert units.render([False] * 3, asked) == rest.strip()
    assert units.candidate("A") == " A"


def test_instruction_sentences_and_demonstrations_together() -> None:
    units = InstructionSentences(PROMPT, demonstrations=True)
    asked = query("x")
    assert [(u.kind, u.id) for u in units.units] == [
        *(("instruction", f"instruction-{i}") for i in (1, 2, 3)), ("demonstration", "d1"), ("demonstration", "d2"),
    ]  # fmt: skip
    assert units.units[3].text == "Text: one\nKind: A"
    assert units.render([True] * 5, asked) == PROMPT.render(None, asked)
    assert (
        units.render([True, False, False, False, True], asked)
        == "Sort the text.\n\nText: two\nKind: B\n\nText: x\nKind:"
    )


def test_instruction_sentences_of_a_chat() -> None:
    chat = FewShotPrompt(
        (Demonstration("d", {"input": "a"}, "A"),), "One. Two.", "{input} => {output}", style="chat"
    )
    units = InstructionSentences(chat, demonstrations=True)
    assert units.render([False, True, False], query("x")) == (
        Message("system", "Two."),
        Message("user", "x =>"),
    )
    assert units.render([False] * 3, query("x")) == (Message("user", "x =>"),)
    assert chat.units[0].text == "a =>\nA"


@settings(max_examples=200, deadline=None)
@given(TEXT)
def test_an_instruction_that_is_all_kept_is_byte_identical(instruction: str) -> None:
    prompt = FewShotPrompt((), instruction)
    if not instruction.strip():
        with pytest.raises(InputError, match="no instruction"):
            InstructionSentences(prompt)
        return
    units = InstructionSentences(prompt)
    assert units.render([True] * units.n_units, query("x")) == prompt.render(None, query("x"))


DOCUMENTS = {"atlas": "Lima is in Peru.", "diary": "It rained.\n\nA lot.", "menu": "Soup {documents}"}
RAG = FewShotPrompt((), "Use the notes.", "{input} {output}", query_template="{documents}\n\nQ: {input}\nA:")


def test_documents() -> None:
    asked = query("Where?")
    units = QueryDocuments(RAG, asked, DOCUMENTS)
    assert [(u.kind, u.id, u.text) for u in units.units] == [("document", n, t) for n, t in DOCUMENTS.items()]
    assert units.render([True, False, True], asked) == (
        "Use the notes.\n\nLima is in Peru.\n\nSoup {documents}\n\nQ: Where?\nA:"
    )
    joined = query("Where?", documents="\n\n".join(DOCUMENTS.values()))
    assert QueryDocuments(RAG, joined, DOCUMENTS).render(None, joined) == RAG.render(None, joined)
    assert units.render(None, asked) == RAG.render(None, joined)
    assert units.render([False] * 3, asked) == "Use the notes.\n\n\n\nQ: Where?\nA:"


def test_documents_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="documents of query 'q': none given"):
        QueryDocuments(RAG, query("x"), {})
    with pytest.raises(InputError, match=r"\['b'\] have no text"):
        QueryDocuments(RAG, query("x"), {"a": "text", "b": " "})
    with pytest.raises(InputError, match="differs from the documents joined by"):
        QueryDocuments(RAG, query("x", documents="another text"), DOCUMENTS)
    with pytest.raises(InputError, match="does not show 'documents'; its slots: input"):
        QueryDocuments(PROMPT, query("x"), DOCUMENTS)


def test_units_of_one_query_are_refused_to_another() -> None:
    units = QueryWords(PROMPT, query("a b"))
    with pytest.raises(InputError, match="'other' asked with the units of 'q'"):
        units.render(None, Query("other", {"input": "a b"}, "A"))
    with pytest.raises(InputError, match="3 entries for 2 units"):
        units.render([True] * 3, units.query)
    with pytest.raises(InputError, match="4 entries for 3 units"):
        InstructionSentences(PROMPT).render([True] * 4, units.query)


def test_options_and_fields_are_checked() -> None:
    with pytest.raises(InputError, match="split: got 'chars'; allowed: whitespace, lime"):
        QueryWords(PROMPT, query("a"), split="chars")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="removal: got 'drop'; allowed: delete, mask"):
        QueryWords(PROMPT, query("a"), removal="drop")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="repeated: got 'no'; allowed: separate, together"):
        QueryWords(PROMPT, query("a"), repeated="no")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="does not show 'title'"):
        QueryWords(PROMPT, query("a", title="b"), field="title")
    with pytest.raises(InputError, match="query 'q': no field 'input'; given: text"):
        QueryWords(PROMPT, Query("q", {"text": "a"}, "A"))
