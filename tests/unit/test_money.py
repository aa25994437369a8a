"""Bills to the last digit, for every family of providers; prices from the user or the list, never from a guess."""

from __future__ import annotations

import io
import json
import math
import re
import socket
import sys
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal as D
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from proxyprompt._provider_caching import CachingRule, caching_rule
from proxyprompt._run import recorded_money
from proxyprompt.backends.base import Message, ScoreRequest, ScoreResult, Usage
from proxyprompt.backends.scripted import ScriptedBackend
from proxyprompt.config import config_from_mapping
from proxyprompt.data import Splits
from proxyprompt.errors import ConfigError, InputError
from proxyprompt.ledger import PICO, Ledger, Totals
from proxyprompt.metering import Meter
from proxyprompt.money import Bill, Call, RunCost, Term, bill_call, bill_run, break_even_calls, stable_tokens
from proxyprompt.pipeline import Result, optimize_prompt
from proxyprompt.prices import FREE, Price, Rates, Unpriced, find_price, own_price, quote_run
from proxyprompt.prompt import Demonstration, FewShotPrompt, Query
from proxyprompt.report import print_terminal, render_html, render_markdown
from proxyprompt.savings import Savings, compare_bills, hit_rate_of
from proxyprompt.settings import Settings
from proxyprompt.summary import build_artifact, build_summary
from proxyprompt.task import LabelTask

OPENAI = {"provider": "openai-compatible", "base_url": "https://api.openai.com/v1/", "model": "gpt-5.4-mini"}
NO_RUN = RunCost()
MINI = Rates(D("0.75"), D("4.5"), D("0.075"))  # gpt-5.4-mini
SONNET = Rates(D(3), D(15), D("0.3"), D("3.75"))
FLASH = Rates(D("0.3"), D("2.5"), D("0.03"))  # gemini-2.5-flash
GPT6 = Rates(D(4), D(20), D("0.4"), D(5))


def server(model: str, url: str) -> dict[str, str]:
    return {**OPENAI, "model": model, "base_url": url}


def listed(model: str, **more: Any) -> Price:
    found = find_price({}, model=model, **more)
    assert isinstance(found, Price), found
    return found


# --- bills ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("provider", "model", "rates", "call", "hit", "miss"),
    [
        # stable 1,200: 1,152 tokens in steps of 128 are read; 148 of 1,300 are not; writing costs nothing more
        ("openai", "gpt-5.4-mini", MINI, Call(1300, 1200, 2), 148 * 0.75 + 1152 * 0.075 + 9, 1300 * 0.75 + 9),
        # exactly the stable tokens, and a miss writes them at 1.25 times the price
        (
            "openai",
            "gpt-6-sol",
            GPT6,
            Call(1300, 1200, 2),
            100 * 4 + 1200 * 0.4 + 40,
            100 * 4 + 1200 * 5 + 40,
        ),
        ("anthropic", "claude-sonnet-4-5", SONNET, Call(1300, 1200), 300 + 360, 300 + 4500),
        ("anthropic", "claude-haiku-4-5", SONNET, Call(1300, 1200), 3900, 3900),  # its minimum is 4,096
        ("google", "gemini-2.5-flash", FLASH, Call(2100, 2048), 52 * 0.3 + 2048 * 0.03, 2100 * 0.3),
        ("google", "gemini-2.5-flash", FLASH, Call(2100, 2047), 2100 * 0.3, 2100 * 0.3),
    ],
)
def test_bills_of_every_family(
    provider: str, model: str, rates: Rates, call: Call, hit: float, miss: float
) -> None:
    rule = caching_rule(provider, model)
    assert rule is not None
    totals = [bill_call(call, rates, rule=rule, hit_rate=h).total * 1_000_000 for h in (1, 0, 0.25)]
    assert totals == [D(str(round(hit, 9))), D(str(round(miss, 9))), (totals[0] + 3 * totals[1]) / 4]
    tokens, answer = D(str(call.prompt_tokens)), D(str(call.completion_tokens))
    assert bill_call(call, rates).total * 1_000_000 == tokens * rates.input + answer * (rates.output or 0)


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize(
    "model", ["openai/gpt-6-luna", "anthropic/claude-sonnet-4-5", "google/gemini-2.5-pro"]
)
@pytest.mark.parametrize("prompt", [900, 200_000, 250_000, 272_000, 280_000])
def test_bills_equal_the_price_list_s_own(model: str, prompt: int, batch: bool) -> None:
    genai_prices = __import__("genai_prices")
    price, now = listed(model), datetime.now(UTC)
    rates = price.at(prompt, batch=batch)
    assert rates is not None
    assert rates.cached_input is not None
    rule = CachingRule("any", 1)
    for hit in (0.0, 1.0):
        stable = 800
        usage = {"cache_read_tokens": stable} if hit else {"cache_write_tokens": stable}
        if rates.cache_write is None and not hit:
            usage = {}
        provider, name = model.split("/")
        theirs = genai_prices.calc_price(
            genai_prices.Usage(input_tokens=prompt, output_tokens=7, **usage),
            name,
            provider_id=provider,
            genai_request_timestamp=now,
            price_context={"processing": "batch"} if batch else None,
        )
        assert bill_call(Call(prompt, stable, 7), rates, rule=rule, hit_rate=hit).total == theirs.total_price


def test_a_bill_is_the_sum_of_its_terms() -> None:
    bill = bill_call(Call(2100, 2000, 10), SONNET, rule=CachingRule("c", 1024), hit_rate=0.5)
    assert [(t.name, t.tokens, t.rate) for t in bill.terms] == [
        ("input", D(100), D(3)),
        ("cached input", D(1000), D("0.3")),
        ("cache write", D(1000), D("3.75")),
        ("output", D(10), D(15)),
    ]
    assert bill.total == sum(t.tokens * t.rate for t in bill.terms) / 1_000_000 == D("0.0045")
    assert sum((bill_call(Call(1), Rates(D("0.1"))).total for _ in range(10)), D(0)) == D("0.000001")


@pytest.mark.parametrize("tokens", [(10, 11, 0), (10, -1, 0), (math.nan, 0, 0), (10, 0, math.inf)])
def test_impossible_calls_are_refused(tokens: tuple[float, int, float]) -> None:
    with pytest.raises(InputError):
        Call(*tokens)


# --- thresholds -----------------------------------------------------------------------------------------


def compare(before: Call, after: Call, **more: Any) -> Savings:
    more = {"rule": caching_rule("openai", "gpt-5.4-mini"), **more}
    return compare_bills(before, after, Price(MINI), NO_RUN, **more)


def test_a_cut_below_the_threshold_raises_the_bill_and_is_warned_of() -> None:
    s = compare(Call(1100, 1090), Call(900, 890))
    plain, caching = s.scenarios
    assert plain.saved == D(200) * D("0.75") / 1_000_000
    assert caching.before.total * 1_000_000 == 76 * D("0.75") + 1024 * D("0.075")
    assert caching.after.total * 1_000_000 == 900 * D("0.75")
    assert caching.saved < 0
    assert caching.break_even_calls == math.inf
    assert "raises the bill (beginning cached in every call): each call costs 404% more" in s.warnings[0]
    assert "none can be cached" in s.warnings[1]
    assert "1,024" in s.warnings[1]
    assert s.assumed is plain


def test_a_cut_below_a_step_raises_the_bill_too() -> None:
    s = compare(Call(1162, 1152), Call(1161, 1151))
    assert s.scenarios[1].saved == (D("0.75") - 128 * (D("0.75") - D("0.075"))) / 1_000_000
    assert len(s.warnings) == 2
    assert "1,024 can be cached" in s.warnings[1]


def test_a_cut_that_leaves_the_cache_and_still_saves_says_so() -> None:
    s = compare(Call(4000, 3980), Call(300, 280))
    assert s.scenarios[1].saved > 0
    assert s.warnings == (s.warnings[0],)
    assert "It still costs less" in s.warnings[0]
    assert not compare(Call(4000, 3980), Call(2000, 1980)).warnings
    assert not compare(Call(900, 880), Call(600, 580)).warnings


def test_a_length_too_close_to_the_threshold_is_not_decided() -> None:
    # 60 tokens of query: the beginning is known to about 20 tokens
    assert any("too close" in w for w in compare(Call(2000, 1940), Call(1100, 1040)).warnings)
    assert not any("too close" in w for w in compare(Call(2000, 1940), Call(1110, 1050)).warnings)


def test_hit_rates_are_assumptions_with_names() -> None:
    before, after = Call(2100, 2048), Call(1500, 1448)
    both = compare(before, after)
    assert [s.name for s in both.scenarios] == ["no prompt caching", "beginning cached in every call"]
    given = compare(before, after, hit_rate=0.5)
    assert given.assumed is given.scenarios[1]
    assert given.assumed.name == "beginning cached in 50% of calls"
    derived = compare(before, after, calls_per_hour=12)  # an entry lives 300 s after its last use
    assert (
        derived.assumed.before.total
        == bill_call(
            before, MINI, rule=caching_rule("openai", "gpt-5.4-mini"), hit_rate=1 - math.exp(-1)
        ).total
    )
    assert any("12 calls an hour" in note for note in derived.notes)
    unknown = compare(before, after, rule=CachingRule("They", 1024), calls_per_hour=12)
    assert unknown.assumed is unknown.scenarios[0]
    assert any("calls_per_hour is not used" in note for note in unknown.notes)


def test_the_derived_hit_rate_is_that_of_random_arrivals() -> None:
    gaps = np.random.default_rng(1).exponential(3600 / 20, 200_000)
    assert (gaps <= 300).mean() == pytest.approx(hit_rate_of(20, 300), abs=0.005)


def test_what_is_not_known_is_not_billed() -> None:
    call = Call(2000, 1900)
    no_rule = compare_bills(call, call, Price(MINI), NO_RUN)
    assert [s.name for s in no_rule.scenarios] == ["no prompt caching"]
    assert any("cache_minimum_tokens" in note for note in no_rule.notes)
    no_rate = compare(call, call)
    assert len(no_rate.scenarios) == 2
    bare = compare_bills(call, call, own_price(input=2.5), NO_RUN, rule=CachingRule("c", 1))
    assert len(bare.scenarios) == 1
    assert any("no price of cached input" in note for note in bare.notes)
    assert any("Completion tokens are not" in note for note in bare.notes)
    assert bare.warnings == ()


def test_unrecorded_models_have_no_rule() -> None:
    for provider, model in [
        ("anthropic", "claude-haiku-5-5"), ("aws", "claude-sonnet-4-5"), ("google", "gemini-2.5-flash-lite"),
        ("deepseek", "deepseek-chat"), ("azure", "phi-4"), ("openai", "text-davinci-003"), ("", ""),
    ]:  # fmt: skip
        assert caching_rule(provider, model) is None
    for model, increment in [
        ("gpt-4o", 128),
        ("o3-mini", 128),
        ("gpt-5.5", 128),
        ("gpt-5.6-sol", 1),
        ("gpt-6-luna", 1),
    ]:
        found = caching_rule("openai", model)
        assert found is not None
        assert (found.minimum, found.increment) == (1024, increment)
        assert found.source
        assert found.date


# --- break-even -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cost", "saved", "calls"),
    [
        ("1", "0.25", 4),
        ("1", "0.3", 4),
        ("0", "0.3", 0),
        ("1", "0", math.inf),
        ("0", "0", math.inf),
        ("1", "-0.1", math.inf),
    ],
)
def test_break_even(cost: str, saved: str, calls: float) -> None:
    assert break_even_calls(D(cost), D(saved)) == calls


def test_plain_data_has_no_negative_zero_and_no_infinity() -> None:
    same = compare(Call(2000, 1900), Call(2000, 1900)).to_dict()
    free = compare_bills(Call(20), Call(10), own_price(input=-0.0), NO_RUN).to_dict()
    text = json.dumps([same, free], allow_nan=False)
    assert "-0.0" not in text
    assert [s["break_even_calls"] for s in same["scenarios"]] == [None, None]
    assert [s["saved_per_thousand_calls"] for s in same["scenarios"]] == [0, 0]


# --- prices ---------------------------------------------------------------------------------------------


def test_the_list_names_what_it_matched() -> None:
    price = find_price(OPENAI)
    assert isinstance(price, Price)
    assert (price.name, price.source, price.date) == (
        "openai/gpt-5.4-mini",
        "genai-prices 0.2.3",
        "2026-11-10",
    )
    assert price.rates == MINI
    assert price.batch is not None
    assert price.batch.input == MINI.input / 2
    dated = find_price(server("gpt-5.4-mini-2026-03-17", OPENAI["base_url"]))
    assert isinstance(dated, Unpriced) or dated.model == "gpt-5.4-mini"
    assert listed("anthropic/claude-sonnet-4-5").rates == SONNET


def test_what_the_list_does_not_know_is_unpriced() -> None:
    cases = [
        (
            server("gpt-5.4-mini-of-ours", "https://api.openai.com/v1/"),
            "lists no price of 'gpt-5.4-mini-of-ours'",
        ),
        (server("gpt-5.4-mini", "https://gateway.example.org/v1"), "lists no price"),
        (server("gpt-5.4-mini", "http://127.0.0.1:8080/v1"), "does not run at a provider"),
        (server("gpt-5.4-mini", "http://[::1]:8080/v1"), "does not run at a provider"),
        (server("gpt-5.4-mini", "http://localhost:8080/v1"), "does not run at a provider"),
        ({"provider": "replay", "model": "gpt-5.4-mini"}, "does not run at a provider"),
    ]
    for identity, reason in cases:
        found = find_price(identity)
        assert isinstance(found, Unpriced)
        assert reason in found.reason
        assert "price_input_per_million" in found.hint
    for bad in ("gpt-5.4-mini", "/gpt", "openai/"):
        with pytest.raises(InputError, match="provider/model"):
            find_price({}, model=bad)
    assert isinstance(find_price({}, model="nobody/gpt-5.4-mini"), Unpriced)
    # a model that is sold by the piece has no price per input token
    assert isinstance(find_price({}, model="openai/gpt-image-1-of-ours"), Unpriced)


def test_without_genai_prices_there_is_a_hint_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [m for m in sys.modules if m.split(".")[0] == "genai_prices"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "genai_prices", None)
    found = find_price(OPENAI)
    assert isinstance(found, Unpriced)
    assert "genai-prices, is not installed" in found.reason
    assert "pip install 'proxyprompt-core[prices]'" in found.hint
    own = quote_run(OPENAI, {}, own=own_price(input=1)).target
    assert isinstance(own, Price)
    assert (own.rates.input, own.name) == (D(1), "")


def test_no_connection_is_opened_and_no_updated_list_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    from genai_prices import data_snapshot

    def closed(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, closed)
    # what a started updater would have left behind
    monkeypatch.setattr(
        data_snapshot, "_custom_snapshot", data_snapshot.DataSnapshot([], from_auto_update=True)
    )
    assert isinstance(find_price(OPENAI), Price)


def test_the_user_s_price_decides_alone_and_keeps_the_model_s_name() -> None:
    quote = quote_run(OPENAI, {}, own=own_price(input=9, source="contract", date="2026-10-01")).target
    assert isinstance(quote, Price)
    assert quote.rates == Rates(D(9))  # nothing of the list's output or cache price
    assert (quote.source, quote.date, quote.name) == ("contract", "2026-10-01", "openai/gpt-5.4-mini")
    other = quote_run({"provider": "replay"}, {}, model="anthropic/claude-sonnet-4-5").target
    assert isinstance(other, Price)
    assert other.rates == SONNET


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ({"price_output_per_million": 3}, "without price_input_per_million"),
        ({"price_batch_discount": 0.5}, "without price_input_per_million"),
        ({"price_input_per_million": 3, "price_batch_discount": 1.5}, "price_batch_discount"),
        ({"price_input_per_million": -1}, "price_input_per_million"),
        ({"price_input_per_million": math.nan}, "price_input_per_million"),
        ({"price_input_per_million": True}, "price_input_per_million"),
        ({"price_input_per_million": 1, "price_model": "openai/x"}, "both given"),
        ({"price_currency": 7}, "price_currency"),
        ({"cache_hit_rate": 1.1}, "cache_hit_rate"),
        ({"cache_hit_rate": 0.5, "calls_per_hour": 3}, "both given"),
        ({"cache_increment_tokens": 128}, "without cache_minimum_tokens"),
        ({"cache_minimum_tokens": 0}, "cache_minimum_tokens"),
        ({"calls_per_hour": -1}, "calls_per_hour"),
    ],
)
def test_settings_check_prices(bad: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        Settings(**bad)


def test_configurations_name_every_price(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(
        '{"id": "a", "input": "x", "label": "l"}\n{"id": "b", "input": "y", "label": "m"}\n'
    )
    rows = [{"id": f"q{i}", "input": f"text {i}", "label": "lm"[i % 2]} for i in range(30)]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    raw = {
        "prompt": {"demonstration_template": "{input}: {output}", "demonstrations": "d.jsonl"},
        "queries": {"file": "q.jsonl"},
        "target": {"model": "embedded:gemma-3-270m"},
        "price": {
            "input_per_million": 1, "output_per_million": 2, "cached_input_per_million": 0.1,
            "cache_write_per_million": 1.25, "batch_discount": 0.5, "currency": "EUR", "source": "contract",
            "date": "2026-10-01",
        },
        "caching": {"minimum_tokens": 1024, "increment_tokens": 128, "hit_rate": 0.9},
    }  # fmt: skip
    settings = config_from_mapping(raw, folder=tmp_path).settings
    price = settings.own_price()
    assert price is not None
    assert price.rates == Rates(D(1), D(2), D("0.1"), D("1.25"))
    assert price.batch == Rates(D("0.5"), D("1.0"), D("0.05"), D("0.625"))
    assert (price.currency, price.source, price.date) == ("EUR", "contract", "2026-10-01")
    assert (settings.cache_minimum_tokens, settings.cache_increment_tokens, settings.cache_hit_rate) == (
        1024,
        128,
        0.9,
    )
    assert (
        config_from_mapping(
            {**raw, "price": {"model": "openai/gpt-5.4-mini"}, "caching": {"calls_per_hour": 4}},
            folder=tmp_path,
        ).settings.price_model
        == "openai/gpt-5.4-mini"
    )
    with pytest.raises(ConfigError, match=r"\[caching\]: unknown keys"):
        config_from_mapping({**raw, "caching": {"minimum": 3}}, folder=tmp_path)


# --- the stable beginning -------------------------------------------------------------------------------


def test_the_stable_beginning_is_what_all_prompts_share() -> None:
    head = "Instruction. " * 7
    assert stable_tokens([head + "a" * 9, head + "b" * 9], 50) == 45  # 91 - 0 of 100 bytes, rounded down
    assert stable_tokens([head, head], 50) == 50
    assert stable_tokens(["abc", "xyz"], 50) == 0
    assert stable_tokens([], 50) == 0
    assert stable_tokens([head], 0) == 0
    # bytes, not characters: 3 of 4 bytes of the second prompt are shared
    assert stable_tokens(["äx", "äy"], 30) == 20
    turns = (Message("user", "one"), Message("assistant", "two"))
    a, b = ((*turns, Message("user", text)) for text in ("red", "sun"))
    assert stable_tokens([a, b], 37) == 37 * len("user\none\nassistant\ntwo\nuser\n") // len(
        "user\none\nassistant\ntwo\nuser\nred\n"
    )


# --- the run --------------------------------------------------------------------------------------------


def paid(name: str, usage: Usage) -> ScriptedBackend:
    return ScriptedBackend(score=lambda _: ScoreResult((-0.1, -2.0), (), usage), name=name)


def rows_of(ledger: Ledger, *roles: tuple[str, str]) -> list[dict[str, Any]]:
    rows = []
    for role, model in roles:
        total = ledger.totals(run="r", role=role, stage="s").by_model[model]  # type: ignore[arg-type]
        rows += rows_of_total(total, role, model)
    return rows


def rows_of_total(total: Totals, role: str, model: str) -> list[dict[str, Any]]:
    return [
        {"stage": "s", "role": role, "model": model, "calls": total.done, "prompt_tokens": total.prompt_tokens,
         "completion_tokens": total.completion_tokens, "cached_tokens": total.cached_tokens, "unknown": total.unknown,
         **recorded_money(total)}
    ]  # fmt: skip


def test_the_run_s_cost_is_what_the_ledger_bought(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.db") as ledger:
        for role, name, usage in [
            ("target", "big", Usage(1500, 2, 1024)), ("proxy", "small", Usage(1500, 2)),
            ("proxy", "rented", Usage(1000, 1)), ("proxy", "riddle", Usage(700, 1)),
        ]:  # fmt: skip
            meter = Meter(paid(name, usage), ledger, role=role, run="r")  # type: ignore[arg-type]
            meter.score([ScoreRequest(f"p{i}", ("a", "b")) for i in range(10)], stage="s")
            meter.score(
                [ScoreRequest(f"p{i}", ("a", "b")) for i in range(10)], stage="s"
            )  # found, not bought
        rows = rows_of(
            ledger, ("target", "big"), ("proxy", "small"), ("proxy", "rented"), ("proxy", "riddle")
        )
    proxies = {"small": FREE, "rented": Price(FLASH), "riddle": Unpriced("nobody knows")}
    run = bill_run(rows, Price(MINI), proxies)
    target = (4760 * D("0.75") + 10240 * D("0.075") + 20 * D("4.5")) / 1_000_000
    rented = (10_000 * D("0.3") + 10 * D("2.5")) / 1_000_000
    assert run.total == target + rented
    assert [bill.total for *_, bill in run.bills] == [target, 0, rented]
    assert run.gaps == ("What riddle cost is not in the run's cost: nobody knows.",)


def test_gaps_of_the_run_s_cost_are_said() -> None:
    row = {"stage": "s", "role": "target", "model": "m", "calls": 1, "prompt_tokens": 100, "completion_tokens": 1,
           "cached_tokens": 50, "unknown": 3}  # fmt: skip
    run = bill_run([row], own_price(input=1, currency="EUR"), {})
    assert run.total == D("0.0001")  # without a price of cached input, cached tokens count in full
    assert len(run.gaps) == 2
    assert "3 calls to m is unknown" in run.gaps[0]
    assert "Completion tokens of m" in run.gaps[1]
    proxy = {**row, "role": "proxy", "unknown": 0}
    assert "is in USD" in bill_run([proxy], own_price(input=1, currency="EUR"), {"m": Price(FLASH)}).gaps[0]
    assert not bill_run([proxy], own_price(input=1, currency="EUR"), {"m": FREE}).gaps
    assert "writing its cache" in bill_run([{**row, "unknown": 0}], Price(SONNET), {}).gaps[0]
    assert (
        bill_run([{**row, "prompt_tokens": 0, "completion_tokens": 0, "unknown": 0}], Price(MINI), {})
        == NO_RUN
    )


N, LABELS = 11, ("left", "right")


def run_through(folder: Path, settings: Settings) -> Result:
    """A target that ignores demonstrations, 11 of 100 words each, of which 9 must stay."""

    def score(request: ScoreRequest) -> ScoreResult:
        text = str(request.prompt)
        truth = int(re.findall(r"\d+", text.rsplit("\nQ ", 1)[-1])[0]) % 2
        values = tuple(math.log(0.9 if i == truth else 0.1) for i in range(2))
        words = len(text.split())
        return ScoreResult(values, (), Usage(words, 1, 1024 if words > 1100 else 0))

    prompt = FewShotPrompt(
        tuple(
            Demonstration(f"d{i}", {"input": f"demo {i} " + "word " * 95}, LABELS[i % 2]) for i in range(N)
        ),
        "Pick.",
        "Q {input}\nA: {output}",
    )
    queries = {
        name: [Query(f"{name}{i}", {"input": f"{name} query {i} asks"}, LABELS[i % 2]) for i in range(n)]
        for name, n in (("explain", 8), ("select", 10), ("sealed", 40))
    }
    return optimize_prompt(
        prompt, LabelTask(LABELS), Splits(queries), settings=settings, ledger=folder / "ledger.db",
        target=ScriptedBackend(score=score, name="openai:gpt-5.4-mini", identity=OPENAI, block_size=2000),
    )  # fmt: skip


KEEP = Settings(keep=tuple(f"d{i}" for i in range(9)), fit_coalitions=24, oracle_queries=8, tau=0.8)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    folder = tmp_path_factory.mktemp("run")
    return folder, run_through(folder, KEEP)


def test_a_run_reports_money_and_warns(finished: tuple[Path, Result]) -> None:
    _, result = finished
    assert result.prompt.n_units == 9
    summary = build_summary(result)
    cost, money = summary["cost"], summary["cost"]["money"]
    assert [money[k] for k in ("model", "source", "date")] == [
        "openai/gpt-5.4-mini",
        "genai-prices 0.2.3",
        "2026-11-10",
    ]
    before, after = summary["before"]["tokens"], summary["after"]["tokens"]
    assert money["saved_per_thousand_calls"] == pytest.approx((before - after) * 0.75 / 1000)
    assert cost["break_even_calls"] == math.ceil(
        money["run_cost"] / (money["saved_per_thousand_calls"] / 1000)
    )
    names = ["no prompt caching", "beginning cached in every call", "batch, nothing cached"]
    assert [s["name"] for s in money["scenarios"]] == names
    prompt, cached, answers = (
        sum(row[k] for row in result.spent) for k in ("prompt_tokens", "cached_tokens", "completion_tokens")
    )
    assert cached
    assert money["run_cost"] == pytest.approx(
        ((prompt - cached) * 0.75 + cached * 0.075 + answers * 4.5) / 1e6
    )
    caching = money["scenarios"][1]
    assert caching["saved_per_thousand_calls"] < 0
    assert caching["break_even_calls"] is None
    assert any("raises the bill" in s for s in summary["verdict"]["sentences"])
    for text in (render_html(summary), render_markdown(summary), _terminal(summary)):
        for shown in ("raises the bill", "openai/gpt-5.4-mini", "see the warning"):
            assert shown in text
    assert re.search(r"\| beginning cached in every call \|.*\| never \|", render_markdown(summary))
    assert '<p class="notice warn">The cut raises the bill' in render_html(summary)


def test_another_price_buys_nothing_and_bills_anew(finished: tuple[Path, Result]) -> None:
    folder, result = finished
    again = run_through(folder, replace(KEEP, price_input_per_million=7.5, price_source="contract"))
    assert again.run == result.run
    assert sum(row["bought_now"] for row in again.spent) == 0
    money = build_summary(again)["cost"]["money"]
    # Savings are at the new price; what the run cost stands in the ledger, at the price of that time.
    assert money["run_cost"] == build_summary(result)["cost"]["money"]["run_cost"]
    before, after = (build_summary(again)[k]["tokens"] for k in ("before", "after"))
    assert money["saved_per_thousand_calls"] == pytest.approx((before - after) * 7.5 / 1000)
    assert any("is what the ledger recorded when they were made" in note for note in money["notes"])
    assert money["source"] == "contract"
    assert len(money["scenarios"]) == 1


def test_the_bill_of_a_run_is_the_money_in_its_ledger(finished: tuple[Path, Result]) -> None:
    folder, result = finished
    with Ledger(folder / "ledger.db") as ledger:
        books = ledger.totals(run=result.run).money
    bill = bill_run(result.spent, result.pricing.target, result.pricing.proxies)
    assert books.keys() == {"USD"}
    assert bill.total == books["USD"] > 0
    assert build_summary(result)["cost"]["money"]["run_cost"] == float(books["USD"])
    dearer = bill_run(result.spent, own_price(input=100, output=100), result.pricing.proxies)
    assert (dearer.total, dearer.gaps) == (bill.total, bill.gaps)


def test_recorded_money_of_a_run_that_was_priced_in_part(tmp_path: Path) -> None:
    """Three calls without a price, two at one price, one at another and one whose outcome is not known."""
    old, new = own_price(input=2, output=10), own_price(input=3, output=20)
    now = own_price(input=1, output=1, currency="USD")
    usage = Usage(1000, 10)

    def ask(first: int, n: int, price: Price | None) -> None:
        backend = paid("m", usage)
        meter = Meter(backend, ledger, role="target", run="r", price=price)
        meter.score([ScoreRequest(f"p{k}", ("a", "b")) for k in range(first, first + n)], stage="s")

    with Ledger(tmp_path / "ledger.db") as ledger:
        ask(0, 3, None)
        ask(3, 2, old)
        ask(5, 1, new)
        [lost] = ledger.reserve(["f" * 64], run="r", stage="s", role="target", model="m", currency="USD")
        ledger.mark_sent([lost], tokens=[1], money=[PICO // 100])
        ledger.release([lost])
        total = ledger.totals(run="r", role="target", stage="s").by_model["m"]
    rows = rows_of_total(total, "target", "m")
    bill = bill_run(rows, now, {})
    recorded = 2 * (D(2000) + 100) / 1_000_000 + (D(3000) + 200) / 1_000_000 + D("0.01")
    assert total.money == {"USD": recorded}
    assert bill.total == recorded + 3 * D(1010) / 1_000_000
    assert bill.gaps == ()
    assert bill.notes == (
        "The cost of 4 calls to m is what the ledger recorded when they were made, at the price of that time.",
        "The outcome of 1 of these calls to m is unknown; they count as spent, at the most that was set aside.",
        f"3 calls to m were recorded without a price; they are counted at the price that is known now ({now.source}).",
    )
    # No price any more: the recorded part stays, the rest is said to be missing.
    forgotten = bill_run([{**rows[0], "role": "proxy"}], Price(MINI), {"m": Unpriced("nobody knows")})
    assert forgotten.total == recorded
    assert forgotten.gaps == ("What m cost is not in the run's cost: nobody knows.",)
    foreign = bill_run(rows, own_price(input=1, output=1, currency="EUR"), {})
    assert "What m cost is in USD and not in the run's cost." in foreign.gaps
    assert foreign.total == 3 * D(1010) / 1_000_000


def test_every_part_can_be_overridden(finished: tuple[Path, Result]) -> None:
    settings = replace(
        KEEP,
        price_input_per_million=1,
        price_cached_input_per_million=0.5,
        cache_minimum_tokens=64,
        cache_hit_rate=1.0,
    )
    pricing = quote_run({}, {}, own=settings.own_price())
    money = build_summary(replace(finished[1], settings=settings, pricing=pricing))["cost"]["money"]
    caching = money["scenarios"][1]
    assert [t["tokens"] for t in caching["terms_before"] if t["name"] == "cached input"] == money[
        "stable_tokens"
    ][:1]
    assert money["saved_per_thousand_calls"] == caching["saved_per_thousand_calls"] > 0


def test_an_unpriced_run_says_why(finished: tuple[Path, Result]) -> None:
    result = replace(finished[1], pricing=quote_run({"provider": "replay"}, {}))
    cost = build_artifact(result).summary["cost"]
    assert cost["money"] is None
    assert "does not run at a provider" in cost["unpriced"]
    assert cost["break_even_calls"] == math.ceil(cost["target_tokens_total"] / cost["saved_tokens_per_call"])
    page = render_html(build_summary(result))
    assert "Unpriced: the target does not run at a provider" in page
    assert "$" not in page


def _terminal(summary: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=400)
    print_terminal(summary, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_frozen() -> None:
    bill = Bill((Term("input", D(1), D(1)),))
    with pytest.raises(AttributeError):
        bill.terms = ()  # type: ignore[misc]
