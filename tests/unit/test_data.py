"""Reading data: every form, and every error before a model is near."""

from __future__ import annotations

import gzip
import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest

from proxyprompt.data import (
    Splits,
    load_demonstrations,
    load_prompt,
    load_queries,
    prompt_from_mapping,
    save_prompt,
    split_queries,
)
from proxyprompt.errors import DataError
from proxyprompt.prompt import Query

ROWS = [
    {"id": "a", "input": "one, two", "label": "yes", "choices": ["yes", "no"], "meta": {"k": 1}},
    {"id": "b", "input": "ünï\nline", "label": "no", "choices": ["yes", "no"]},
]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_every_form_reads_the_same(tmp_path: Path) -> None:
    lines = "\n".join(json.dumps(r) for r in ROWS)
    jsonl = write(tmp_path / "r.jsonl", lines + "\n\n")
    as_json = write(tmp_path / "r.json", json.dumps(ROWS))
    csv = write(
        tmp_path / "r.csv",
        'id,input,label,choices\na,"one, two",yes,"[""yes"",""no""]"\nb,"ünï\nline",no,"[""yes"",""no""]"\n',
    )
    zipped = tmp_path / "r.jsonl.gz"
    zipped.write_bytes(gzip.compress(lines.encode()))
    expected = load_demonstrations(ROWS)
    assert [d.id for d in expected] == ["a", "b"]
    assert expected[0].inputs == {"input": "one, two"}
    assert expected[0].choices == ("yes", "no")
    for source in (jsonl, as_json, csv, zipped):
        assert load_demonstrations(source) == expected


def test_unicode_line_separators_do_not_split_rows(tmp_path: Path) -> None:
    row = {"id": "a", "input": "x\u2028y\x85z", "label": "l"}
    path = write(tmp_path / "r.jsonl", json.dumps(row, ensure_ascii=False))
    assert load_demonstrations(path)[0].inputs["input"] == "x\u2028y\x85z"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input": "x", "label": "y"}, "no id"),
        ({"id": "a", "label": "y"}, "no input"),
        ({"id": "a", "input": "x"}, "no label"),
        ({"id": "a", "input": "x", "label": ["y"]}, "must be text"),
        ({"id": "a", "input": "x", "label": "y", "choices": "abc"}, "choices must be a list"),
        ({"id": "a", "input": "x", "label": "y", "choices": ["p", "p"]}, "different texts"),
        ({"id": "a", "inputs": {"x": None}, "label": "y"}, "must be text"),
        ({"id": "a", "input": "x", "label": "y", "split": "test"}, "split 'test' is not known"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, row: dict[str, object], message: str) -> None:
    path = write(
        tmp_path / "r.jsonl", json.dumps({"id": "ok", "input": "x", "label": "y"}) + "\n" + json.dumps(row)
    )
    with pytest.raises(DataError, match=message) as caught:
        load_queries(path)
    assert "r.jsonl:2" in str(caught.value)


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        load_queries(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="ending is not known"):
        load_queries(write(tmp_path / "r.xlsx", "x"))
    with pytest.raises(DataError, match=r"r.jsonl:1: not valid JSON"):
        load_queries(write(tmp_path / "r.jsonl", "{'id': 1}"))
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not UTF-8"):
        load_queries(tmp_path / "b.jsonl")
    (tmp_path / "b.jsonl.gz").write_bytes(b"not gzip")
    with pytest.raises(DataError, match="cannot be read"):
        load_queries(tmp_path / "b.jsonl.gz")
    with pytest.raises(DataError, match="more cells"):
        load_queries(write(tmp_path / "r.csv", "id,input,label\n1,a,b,c\n"))
    with pytest.raises(DataError, match="used at"):
        load_queries([{"id": 1, "input": "x", "label": "y"}, {"id": "1", "input": "z", "label": "y"}])


def queries(n: int, prefix: str = "q", labels: int = 2) -> list[tuple[Query, str | None]]:
    return [
        (Query(f"{prefix}{i}", {"input": f"{prefix} text {i}"}, f"l{i % labels}"), None) for i in range(n)
    ]


def test_drawn_splits_are_disjoint_stratified_and_reproducible() -> None:
    rows = queries(90, labels=3)
    splits = split_queries(
        rows, sizes={"explain": 30, "select": 30, "sealed": 30}, rng=np.random.default_rng(1)
    )
    again = split_queries(
        rows, sizes={"explain": 30, "select": 30, "sealed": 30}, rng=np.random.default_rng(1)
    )
    other = split_queries(
        rows, sizes={"explain": 30, "select": 30, "sealed": 30}, rng=np.random.default_rng(2)
    )
    assert splits == again
    assert splits != other
    assert len({q.id for part in splits.values() for q in part}) == 90
    for part in splits.values():
        counts = [sum(q.reference == f"l{k}" for q in part) for k in range(3)]
        assert max(counts) - min(counts) <= 2
    assert splits.digest("sealed") != splits.digest("select")


def test_named_splits_are_cut_in_equal_shares_and_keep_their_order() -> None:
    rows = [(q, "explain") for q, _ in queries(8, labels=1)] + [(q, "explain") for q, _ in queries(8, "r", 2)]
    rows += [(q, name) for name in ("select", "sealed") for q, _ in queries(2, name)]
    splits = split_queries(rows, sizes={"explain": 6}, rng=np.random.default_rng(0))
    assert [q.id for q in splits["explain"]] == ["q0", "q1", "q2", "r1", "r3", "r5"]
    assert len(splits["sealed"]) == 2


def test_overlapping_and_empty_splits_are_refused() -> None:
    a, b = (q for q, _ in queries(2))
    with pytest.raises(DataError, match="'sealed': no queries"):
        Splits({"explain": [a], "select": [b]})
    with pytest.raises(DataError, match="in the splits 'explain' and 'sealed'"):
        Splits({"explain": [a], "select": [b], "sealed": [a]})
    twin = Query("other-id", a.inputs, a.reference)
    with pytest.raises(DataError, match="the text of query 'other-id'"):
        Splits({"explain": [a], "select": [b], "sealed": [twin]})
    with pytest.raises(DataError, match="asks for 300"):
        split_queries(
            queries(20), sizes={"explain": 100, "select": 100, "sealed": 100}, rng=np.random.default_rng(0)
        )
    mixed = [*queries(3), (Query("z", {"input": "z"}, "l0"), "sealed")]
    with pytest.raises(DataError, match="all or none"):
        split_queries(mixed, rng=np.random.default_rng(0))


def test_prompts_round_trip_in_private_files(tmp_path: Path) -> None:
    prompt = prompt_from_mapping({"instruction": "Hi {x}", "demonstrations": ROWS})
    path = tmp_path / "new" / "prompt.json"
    save_prompt(prompt, path)
    assert load_prompt(path) == prompt
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(path.parent).st_mode) == 0o700


def test_prompt_mapping_errors() -> None:
    with pytest.raises(DataError, match="unknown fields"):
        prompt_from_mapping({"demos": []})
    with pytest.raises(DataError, match="no demonstrations"):
        prompt_from_mapping({})
    with pytest.raises(DataError, match="separator must be text"):
        prompt_from_mapping({"separator": 3, "demonstrations": []})
