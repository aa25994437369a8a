"""Models and programs whose answers are known; for arithmetic and error paths."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import dspy

Turns = list[dict[str, Any]]


# DSPy 3.0's TwoStepAdapter takes no other model; since 3.4 an LM does not go through forward.
_Base = dspy.LM if dspy.__version__.startswith("3.0.") else dspy.BaseLM


class Scripted(_Base):  # type: ignore[misc, valid-type]
    """Answers with what a function of the messages gives; remembers the messages, also of its copies."""

    def __init__(self, answer: Callable[[Turns], str], model: str = "scripted/one", **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        self.answer, self.seen, self.lock = answer, [], threading.Lock()

    def __deepcopy__(self, memo: Any) -> Scripted:  # DSPy 3.0 copies models deeply
        twin = Scripted(self.answer, self.model)
        twin.__dict__.update(self.__dict__)
        return twin

    def launch(self, launch_kwargs: Any = None) -> None: ...
    def kill(self, launch_kwargs: Any = None) -> None: ...

    def forward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
        with self.lock:
            self.seen.append((messages, self.cache))
        text = self.answer(messages)
        message = SimpleNamespace(content=text, tool_calls=None)
        usage = {"prompt_tokens": sum(len(m["content"]) for m in messages), "completion_tokens": 3}
        return SimpleNamespace(
            choices=[SimpleNamespace(message=message, finish_reason="stop")], usage=usage, model=self.model
        )


def luck(text: str) -> float:
    """A number in [0, 1) that depends on the text only."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32


def chat(**fields: str) -> str:
    """An answer in the form of the ChatAdapter."""
    return "\n\n".join(f"[[ ## {k} ## ]]\n{v}" for k, v in fields.items()) + "\n\n[[ ## completed ## ]]"


def shown(messages: Turns) -> str:
    """All but the last turn: instruction and demos."""
    return "\n".join(m["content"] for m in messages[:-1])


def number(messages: Turns) -> str:
    """Of the question."""
    last: str = messages[-1]["content"]
    return last.split("[[ ## question ## ]]\nq")[1].split("\n")[0].strip()


def harmed_by(word: str, share: float = 0.6) -> Callable[[Turns], str]:
    """Right about every question ('q7' -> 'a7'), but for a share of them while ``word`` is among the demos."""

    def answer(messages: Turns) -> str:
        asked = number(messages)
        wrong = word in shown(messages) and luck(asked) < share
        return chat(answer="wrong" if wrong else f"a{asked}")

    return answer


def obliging(messages: Turns) -> str:
    """Fills every output field that it is asked for; a proposer's with an instruction, an answer with the right one."""
    system = messages[0]["content"].split("Your output fields are:")[1].split("All interactions")[0]
    names = re.findall(r"^\d+\. `(\w+)`", system, re.MULTILINE)
    if names == ["answer"]:
        return chat(answer=f"a{number(messages)}")
    return chat(**dict.fromkeys(names, "Answer the question with the letter a and its number."))


def example(i: int) -> Any:
    return dspy.Example(question=f"q{i}", answer=f"a{i}").with_inputs("question")


def right(example: Any, prediction: Any, trace: Any = None) -> bool:
    return bool(example.answer == prediction.answer)


DEMOS = [dspy.Example(question=f"demo {i}", answer="poison" if i == 2 else f"fine {i}") for i in range(4)]


def program(demos: Any = None) -> Any:
    made = dspy.Predict("question -> answer")
    made.demos = list(DEMOS if demos is None else demos)
    return made


TRAIN = [example(i) for i in range(150)]
VAL = [example(i) for i in range(1000, 1150)]
