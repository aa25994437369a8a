"""Prune the demos of a compiled DSPy program on a real model: fewer tokens, less money, with proof.

    python what_it_is_about.py http://127.0.0.1:8080/v1 MODEL

Takes any OpenAI-compatible server; figures of the README are those of SmolLM2 (135M parameters) behind llama.cpp.
"""

import random
import sys
from itertools import product
from pathlib import Path
from typing import Any

import dspy
from dspy_proxyprompt import ProxyPrune, apply

from proxyprompt import Settings

THINGS = ["room", "bed", "view", "pool", "dinner", "service", "lobby", "bar", "breakfast", "lift"]
SAID = [
    "was wonderful",
    "was a delight",
    "was better than we hoped",
    "made our stay",
    "could not be nicer",
    "was horrible",
    "was filthy",
    "was a great disappointment",
    "ruined our stay",
    "could not be worse",
]
DEMOS = [
    ("We loved the garden more than anything.", "Garden"),
    ("I would come back for the sauna alone.", "Sauna"),
    ("Nobody cleaned the carpet in our days there.", "Carpet"),
    ("The shower was cold every morning.", "Shower"),
    ("The receptionist could not find our booking.", "Receptionist"),
    ("All in all the bathroom needs new tiles.", "We are sorry"),  # wrong on purpose
    ("A kettle would be welcome.", "Kettle"),
    ("They charged us twice for the parking.", "Parking"),
]


class Terse(dspy.ChatAdapter):
    """The review as it is, the topic as it is: small models find DSPy's field markers hard."""

    def format(self, signature: Any, demos: Any, inputs: Any) -> list[dict[str, str]]:
        turns = [{"role": "system", "content": signature.instructions}]
        for demo in demos:
            turns.append({"role": "user", "content": demo["review"]})
            turns.append({"role": "assistant", "content": demo["topic"]})
        return [*turns, {"role": "user", "content": inputs["review"]}]

    def parse(self, signature: Any, completion: str) -> dict[str, str]:
        return {"topic": completion.strip().split()[0].strip(".") if completion.strip() else ""}


def examples(rows: list[tuple[str, str]]) -> list[dspy.Example]:
    return [dspy.Example(review=r, topic=v).with_inputs("review") for r, v in rows]


def same_topic(example: dspy.Example, prediction: dspy.Prediction, trace: object = None) -> bool:
    return example.topic == prediction.topic


def main(base_url: str, model: str, out: Path) -> ProxyPrune:
    rows = [(f"The {thing} {said}.", thing.capitalize()) for thing, said in product(THINGS, SAID)]
    random.Random(0).shuffle(rows)
    data = examples(rows)

    task = dspy.Signature("review -> topic", "Which part of the hotel is the review about? One word.")
    program = dspy.Predict(task)
    program.demos = examples(DEMOS)  # or what BootstrapFewShot or MIPROv2 left there

    lm = dspy.LM(f"openai/{model}", api_base=base_url, api_key="none", temperature=0.0, max_tokens=6)
    with dspy.context(lm=lm, adapter=Terse()):
        pruner = ProxyPrune(
            same_topic,
            settings=Settings(
                fit_coalitions=22,
                max_suspects=2,
                clean_rounds=1,
                max_evaluations=5,
                price_input_per_million=0.40,
                price_output_per_million=1.60,
            ),
            explain_share=0.3,
            ledger=out / "ledger.db",
            num_threads=1,
        )
        pruned = pruner.compile(program, trainset=data[:20], valset=data[20:70])
        print(pruner.report)
        print(pruned(review="The sauna was a delight.").topic)  # the pruned program, ready to deploy

    pruned.save(out / "program.json")  # what DSPy saves ...
    pruner.report.save(out / "report.json")  # ... and why; readable by you only
    assert len(apply(program, out / "report.json").demos) == len(pruned.demos)
    return pruner


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path("what-it-is-about-out"))
