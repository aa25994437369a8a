"""Pruning with scripted models: closed-form answers, and every way to go wrong."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy_proxyprompt import ProxyPrune

from proxyprompt import Settings

spec = importlib.util.spec_from_file_location("dspy_scripted", Path(__file__).with_name("scripted.py"))
assert spec is not None
assert spec.loader is not None
s = importlib.util.module_from_spec(spec)
sys.modules["dspy_scripted"] = s
spec.loader.exec_module(s)

QUICK = Settings(interactions="off")


@pytest.fixture
def pruner(tmp_path: Path) -> Any:
    def make(metric: Any = s.right, **kwargs: Any) -> ProxyPrune:
        kwargs.setdefault("settings", QUICK)
        return ProxyPrune(metric, ledger=tmp_path / "ledger.db", num_threads=4, **kwargs)

    return make


def test_the_harmful_demo_goes_and_the_result_is_certified(pruner: Any, tmp_path: Path) -> None:
    lm = s.Scripted(s.harmed_by("poison"))
    student = s.program()
    with dspy.context(lm=lm):
        one = pruner()
        pruned = one.compile(student, trainset=s.TRAIN, valset=s.VAL)
    assert one.report is not None
    assert one.report.certified
    assert not one.report.predictors[0].demos[2].kept
    assert one.report.predictors[0].demos[2].attribution < -0.1
    assert [d.answer for d in student.demos] == ["fine 0", "fine 1", "poison", "fine 3"]
    assert student._compiled is False
    assert pruned._compiled is True
    assert "poison" not in [d.answer for d in pruned.demos]
    assert pruned.lm is None  # what was in a context stays there
    calls = len(lm.seen)
    with dspy.context(lm=lm):
        again = pruner().compile(student, trainset=s.TRAIN, valset=s.VAL)
    assert len(lm.seen) == calls  # the ledger has all of it
    assert [dict(d) for d in again.demos] == [dict(d) for d in pruned.demos]
    assert not any(cache for _, cache in lm.seen)
    assert lm.cache
