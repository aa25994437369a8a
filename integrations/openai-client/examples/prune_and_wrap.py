"""A few-shot chat call of the OpenAI SDK becomes cheaper, with a certificate, and the application stays as it is.

    OPENAI_BASE_URL=http://127.0.0.1:8080/v1 OPENAI_API_KEY=none python prune_and_wrap.py MODEL

Any OpenAI-compatible server will do. The application sorts what guests of a restaurant say, with an instruction and
eight demonstrations.
"""

import sys

import numpy as np
import openai

from proxyprompt import PruneCounter, Settings, prune_messages, wrap_openai
from proxyprompt.backends.openai import OpenAIBackend

MODEL = sys.argv[1]
DOLLARS_PER_MILLION = 0.25  # for prompt tokens: an assumption, put in what your provider charges

# --- what the application has: messages, and texts whose answer is known ---------------------------------

SHOTS = [
    ("The bread was wonderful.", "Positive"), ("The waiter was rude.", "Negative"),
    ("We loved the terrace.", "Positive"), ("My steak was cold.", "Negative"),
    ("The bread is wonderful here.", "Positive"), ("The toilets were dirty.", "Negative"),
    ("A charming place.", "Positive"), ("They forgot our drinks.", "Negative"),
]  # fmt: skip
GOOD = [
    "superb",
    "lovely",
    "great",
    "perfect",
    "delicious",
    "excellent",
    "fantastic",
    "amazing",
    "brilliant",
    "outstanding",
]
BAD = [
    "awful",
    "terrible",
    "horrible",
    "dreadful",
    "disgusting",
    "disappointing",
    "bad",
    "poor",
    "nasty",
    "unacceptable",
]
THINGS = ["soup", "cake", "coffee", "service", "music", "table", "fish", "pasta", "salad", "wine"]
texts = [
    (f"The {t} was {w}.", k)
    for words, k in ((GOOD, "Positive"), (BAD, "Negative"))
    for t in THINGS
    for w in words
]
np.random.default_rng(1).shuffle(texts)
known, fresh = [tuple(map(str, pair)) for pair in texts[:80]], texts[80:100]


def few_shot(text):
    turns = [{"role": "system", "content": "Is the sentence Positive or Negative? Answer with one word."}]
    for shot, answer in SHOTS:
        turns.append({"role": "user", "content": f"Sentence: {shot}"})
        turns.append({"role": "assistant", "content": answer})
    return [*turns, {"role": "user", "content": f"Sentence: {text}"}]


def measure(client):
    right, tokens = 0, 0
    for text, kind in fresh:
        answer = client.chat.completions.create(
            model=MODEL, messages=few_shot(text), max_tokens=3, temperature=0
        )
        right += answer.choices[0].message.content.strip().startswith(str(kind))
        tokens += answer.usage.prompt_tokens
    return right / len(fresh), tokens / len(fresh)


# --- once: which demonstrations earn their tokens? -------------------------------------------------------

pruned = prune_messages(
    few_shot("The rice was fine."),
    known,
    target=OpenAIBackend(MODEL, concurrency=1, top_logprobs=50),
    labels=("Positive", "Negative"),
    user_template="Sentence: {input}",
    # Small numbers, so that this example runs in a minute or two on a CPU.
    settings=Settings(
        fit_coalitions=24,
        oracle_queries=5,
        max_evaluations=3,
        clean_rounds=1,
        relabel="off",
        price_input_per_million=DOLLARS_PER_MILLION,
        price_output_per_million=0,
    ),
    rng=np.random.default_rng(0),
)
pruned.artifact.save("artifact.json")

# --- ever after: the application as it was, and one line -------------------------------------------------

client = openai.OpenAI()
before = measure(client)
counter = PruneCounter()
client = wrap_openai(client, "artifact.json", on_mismatch="raise", on_request=counter)
after = measure(client)

print(pruned.artifact.summary["verdict"]["headline"])
print(
    f"{counter.pruned} of {counter.requests} calls pruned, {counter.saved_tokens_estimate:.0f} tokens saved"
)
for name, (accuracy, tokens) in (("before", before), ("after", after)):
    print(
        f"{name:>6}: accuracy {accuracy:.0%} on {len(fresh)} new texts, {tokens:.0f} prompt tokens a call,"
        f" ${tokens * DOLLARS_PER_MILLION:.2f} a million calls"
    )
