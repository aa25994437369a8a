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
    {"review": "The room was spotless.", "verdict": "Positive"},
    {"review": "Our window faced a noisy road.", "verdict": "Negative"},
    {"review": "The room is spotless here.", "verdict": "Positive"},  # nearly the first one again
    {"review": "The shower was cold.", "verdict": "Negative"},
    {"review": "We loved the garden.", "verdict": "Positive"},
    {"review": "The key card was broken.", "verdict": "Negative"},
    {"review": "A charming old house.", "verdict": "Positive"},
    {"review": "The porter was rude.", "verdict": "Negative"},
]
THINGS = ["room", "bed", "view", "pool", "dinner", "service", "lobby", "sauna", "terrace", "breakfast"]
GOOD = ["superb", "lovely", "great", "perfect", "excellent", "fantastic"]
BAD = ["awful", "terrible", "horrible", "dreadful", "disgusting", "bad"]


def queries() -> list[tuple[dict[str, str], str]]:
    """Reviews with their verdicts."""
    words = [(word, "Positive") for word in GOOD] + [(word, "Negative") for word in BAD]
    return [({"review": f"The {t} was {word}."}, kind) for t, (word, kind) in product(THINGS, words)]


def main(base_url: str, model: str, out: Path) -> PrunedChain:
    shots = FewShotChatMessagePromptTemplate(
        examples=EXAMPLES,
        example_prompt=ChatPromptTemplate.from_messages(
            [("human", "Sentence: {review}"), ("ai", "{verdict}")]
        ),
    )
    prompt = ChatPromptTemplate.from_messages(
        [
            ("system", "Is the sentence Positive or Negative? Answer with one word."),
            shots,
            ("human", "Sentence: {review}"),
        ]
    )
    llm = ChatOpenAI(model=model, base_url=base_url, api_key="none", temperature=0, max_tokens=3)
    chain = prompt | llm | StrOutputParser()

    result = prune_examples(
        chain,
        queries=queries(),
        labels=["Positive", "Negative"],
        sizes={"explain": 6, "select": 20, "sealed": 80},
        settings=Settings(
            tau=0.8,
            fit_coalitions=24,
            clean_rounds=1,
            price_input_per_million=0.40,
            price_output_per_million=1.60,
        ),
        ledger=out / "ledger.db",
        concurrency=1,  # one slot on the server: in order, its prompt cache helps
    )
    result.save(out)
    before, after = result.artifact.summary["before"], result.artifact.summary["after"]
    print(result.report.splitlines()[0].lstrip("# "))
    print(f"prompt tokens a call: {before['tokens']:.0f} -> {after['tokens']:.0f}")
    money = result.artifact.summary["cost"]["money"]
    print(f"saved in a million calls: {1000 * money['saved_per_thousand_calls']:.2f} {money['currency']}")
    print(result.chain.invoke({"review": "The pool was a delight."}))  # the pruned chain, ready to deploy
    return result


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path("reviews-out"))
