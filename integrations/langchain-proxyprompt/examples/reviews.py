"""Prune the examples of a LangChain chain on any OpenAI-compatible server.

    python reviews.py http://127.0.0.1:8080/v1 MODEL

Prints tokens and money per call before and after.
"""

import sys
from itertools import product
from pathlib import Path

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate, FewShotChatMessagePromptTemplate
from langchain_openai import ChatOpenAI
from langchain_proxyprompt import PrunedChain, prune_examples

from proxyprompt import Settings

EXAMPLES = [
    {"review": "The room was spotless and the staff kind.", "verdict": "Good"},
    {"review": "Our window faced a noisy building site.", "verdict": "Bad"},
    {"review": "Breakfast was the best of the whole trip.", "verdict": "Good"},
    {"review": "We waited an hour for a broken key card.", "verdict": "Good"},  # wrong on purpose
    {"review": "The shower was cold and the towels damp.", "verdict": "Bad"},
    {"review": "A lovely garden, and a warm welcome.", "verdict": "Good"},
]
THINGS = [
    "room",
    "bed",
    "view",
    "pool",
    "dinner",
    "service",
    "lobby",
    "bar",
    "spa",
    "sauna",
    "terrace",
    "breakfast",
]
GOOD = ["was wonderful", "was a delight", "was better than we hoped", "made our stay", "could not be nicer"]
BAD = ["was horrible", "was filthy", "was a great disappointment", "ruined our stay", "could not be worse"]


def queries() -> list[tuple[dict[str, str], str]]:
    """Reviews with their verdicts."""
    rows = [({"review": f"The {t} {g}."}, "Good") for t, g in product(THINGS, GOOD)]
    return rows + [({"review": f"The {t} {b}."}, "Bad") for t, b in product(THINGS, BAD)]


def main(base_url: str, model: str, out: Path) -> PrunedChain:
    shots = FewShotChatMessagePromptTemplate(
        examples=EXAMPLES,
        example_prompt=ChatPromptTemplate.from_messages([("human", "{review}"), ("ai", "{verdict}")]),
    )
    prompt = ChatPromptTemplate.from_messages(
        [("system", "Is the hotel review good or bad? Answer Good or Bad."), shots, ("human", "{review}")]
    )
    llm = ChatOpenAI(model=model, base_url=base_url, api_key="none", temperature=0, max_tokens=3)
    chain = prompt | llm | StrOutputParser()

    result = prune_examples(
        chain,
        queries=queries(),
        labels=["Good", "Bad"],
        sizes={"explain": 6, "select": 20, "sealed": 72},
        settings=Settings(
            fit_coalitions=20, clean_rounds=1, price_input_per_million=0.40, price_output_per_million=1.60
        ),
        ledger=out / "ledger.db",
    )
    result.save(out)
    before, after = result.artifact.summary["before"], result.artifact.summary["after"]
    print(result.report.splitlines()[0].lstrip("# "))
    print(f"prompt tokens a call: {before['tokens']:.0f} -> {after['tokens']:.0f}")
    print(result.chain.invoke({"review": "The pool was a delight."}))  # the pruned chain, ready to deploy
    return result


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path("reviews-out"))
