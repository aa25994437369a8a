"""Predictions as text for the ledger and back, and the user's metric on what comes back.

The ledger holds what the program predicted, not what a metric made of it: another metric needs no new calls.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import dspy
import pydantic

from proxyprompt.errors import InputError, ProxyPromptError

from ._program import plain

__all__ = ["Codec", "Scorer", "decides_binary"]

UNPARSED = "unparsed"


class Codec:
    """Writes predictions as JSON and reads them back as the same values.

    Parameters
    ----------
    annotations : mapping of str to sequence
        Types that the program's signatures give to output fields of this name.
    """

    def __init__(self, annotations: Mapping[str, Sequence[Any]]) -> None:
        self._types = {
            name: [pydantic.TypeAdapter(a) for a in found if _checkable(a)]
            for name, found in annotations.items()
        }

    def encode(self, prediction: Any) -> str:
        """The text of a prediction.

        Raises
        ------
        InputError
            If the program returned no prediction, or one that JSON cannot hold.
        """
        if not isinstance(prediction, dspy.Prediction):
            raise InputError(
                f"student: the program returned {type(prediction).__name__}; a dspy.Prediction is needed.",
                hint="Let forward return dspy.Prediction(answer=...).",
            )
        fields, types = {}, {}
        for name, value in prediction.items():
            written = json.loads(json.dumps(plain(value)))
            kind = next(
                (k for k in range(-1, len(self._of(name))) if self._same(name, k, written, value)), None
            )
            if kind is None:
                raise InputError(
                    f"student: the field {name!r} of the prediction, a {type(value).__name__}, does not come back"
                    " from JSON as what it was, so that the metric could not judge a recorded answer.",
                    hint="Return texts, numbers, lists and dictionaries, or annotate the signature's output field.",
                )
            fields[name] = written
            if kind >= 0:
                types[name] = kind
        return json.dumps({"fields": fields, **({"types": types} if types else {})}, ensure_ascii=False)

    def decode(self, text: str) -> Any:
        """The prediction of a text."""
        body = json.loads(text)
        types = body.get("types", {})
        return dspy.Prediction(
            **{name: self._read(name, types.get(name, -1), v) for name, v in body["fields"].items()}
        )

    def _of(self, name: str) -> list[pydantic.TypeAdapter[Any]]:
        return self._types.get(name, [])

    def _read(self, name: str, kind: int, written: Any) -> Any:
        return written if kind < 0 else self._of(name)[kind].validate_python(written)

    def _same(self, name: str, kind: int, written: Any, value: Any) -> bool:
        try:
            back = self._read(name, kind, written)
            return type(back) is type(value) and bool(back == value)
        except (pydantic.ValidationError, TypeError, ValueError):
            return False


def _checkable(annotation: Any) -> bool:
    try:
        pydantic.TypeAdapter(annotation)
    except (pydantic.PydanticSchemaGenerationError, pydantic.PydanticUserError):
        return False
    return True


def unparsed(why: str) -> str:
    """What is recorded when the adapter could make nothing of the model's answer."""
    return json.dumps({UNPARSED: why}, ensure_ascii=False)


class Scorer:
    """The user's metric as a metric of texts.

    Parameters
    ----------
    metric : callable
        ``metric(example, prediction)``, with up to four more arguments as DSPy's bootstrapping and GEPA pass them;
        they get ``None``. Returns a truth value, a number, or a prediction or dictionary with a ``score``.
    codec : Codec
    examples : mapping of str to Example
        By the reference of the query that was made of them.

    Notes
    -----
    An answer that the adapter could not parse scores 0 without asking the metric. Anything that the metric raises ends
    the run; it never becomes a score.
    """

    def __init__(self, metric: Callable[..., Any], codec: Codec, examples: Mapping[str, Any]) -> None:
        self.metric, self._codec, self._examples = metric, codec, examples
        self._arguments = _arguments(metric)
        self._known: dict[tuple[str, str], float] = {}
        self.__name__ = _name(metric)

    def __repr__(self) -> str:
        """Stable over processes: part of the run's key."""
        return f"metric({self.__name__}, {_source(self.metric)})"

    def __call__(self, output: str, references: Sequence[str]) -> float:
        """Score of a recorded prediction, in [0, 1]."""
        key = (output, references[0])
        if key not in self._known:
            self._known[key] = self._score(output, self._examples[references[0]])
        return self._known[key]

    def _score(self, output: str, example: Any) -> float:
        if UNPARSED in json.loads(output):
            return 0.0
        value = self.raw(example, self._codec.decode(output))
        number = _number(value, self.__name__)
        if not 0.0 <= number <= 1.0:
            raise InputError(
                f"metric: {self.__name__} returned {number:g}; scores lie in [0, 1], where 1 is best.",
                hint="Divide by the largest possible score, or return whether it is good enough.",
            )
        return number

    def raw(self, example: Any, prediction: Any) -> Any:
        """What the metric returns.

        Raises
        ------
        InputError
            Whatever the metric raised, with the example that it was about.
        """
        try:
            return self.metric(example, prediction, *[None] * self._arguments)
        except ProxyPromptError:
            raise
        except Exception as error:
            shown = ", ".join(f"{k}={v!r}"[:60] for k, v in example.inputs().items())
            raise InputError(
                f"metric: {self.__name__} raised {type(error).__name__}: {error} (example: {shown}).",
                hint="Mend the metric; a metric that fails is no score of 0. Answers so far are in the ledger.",
            ) from error


def _arguments(metric: Callable[..., Any]) -> int:
    """How many arguments beyond example and prediction must be given."""
    if not callable(metric):
        raise InputError(f"metric: got {metric!r}; a callable metric(example, prediction) is needed.")
    try:
        signature = inspect.signature(metric)
    except (TypeError, ValueError):  # built-in callables tell no signature
        return 0
    for more in range(5):
        try:
            signature.bind(None, None, *[None] * more)
        except TypeError:
            continue
        return more
    raise InputError(
        f"metric: {_name(metric)}{signature} cannot be called as metric(example, prediction), nor with up to four more"
        " positional arguments.",
        hint="Write metric(example, prediction, trace=None).",
    )


def _number(value: Any, name: str) -> float:
    if isinstance(value, dict) or hasattr(value, "get"):
        value = value.get("score")
    elif hasattr(value, "score"):
        value = value.score
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"metric: {name} returned {value!r}, which is no score.",
            hint="Return a truth value, a number, or dspy.Prediction(score=..., feedback=...).",
        ) from error
    if math.isnan(number):
        raise InputError(f"metric: {name} returned NaN, which is no score.")
    return number


def decides_binary(scorer: Scorer, examples: Sequence[Any]) -> bool:
    """Whether the metric answers yes or no: it gives a truth value for an example's own labels.

    A metric that cannot judge those (it needs a field that no example has) is taken for one of scores.
    """
    for example in examples[:3]:
        try:
            value = scorer.raw(example, dspy.Prediction(**example.toDict()))
        except InputError:
            continue
        return type(value).__name__ in ("bool", "bool_")
    return False


def _name(metric: Any) -> str:
    return str(getattr(metric, "__name__", type(metric).__name__))


def _source(metric: Any) -> str:
    """Hash of the metric's source, so that a changed metric is another run."""
    try:
        text = inspect.getsource(metric if inspect.isroutine(metric) else type(metric))
    except (OSError, TypeError):
        text = f"{getattr(metric, '__module__', '')}.{getattr(metric, '__qualname__', _name(metric))}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]
