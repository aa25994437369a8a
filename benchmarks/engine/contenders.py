"""The same log-probabilities by other means: plain transformers batches, captum, shap, ContextCite."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from proxyprompt import FewShotPrompt
from proxyprompt.backends.base import ScoreRequest


class Plain:
    """A model as transformers loads it, with a count of what goes through it.

    Attributes
    ----------
    tokens, padded, rows : int
        Tokens, tokens of padding and sequences read so far.
    """

    def __init__(self, folder: Path, labels: Sequence[str]) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        self.model.eval().requires_grad_(False)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.labels = [self.tokenizer(label, add_special_tokens=False)["input_ids"] for label in labels]
        if any(len(ids) != 1 for ids in self.labels):
            raise SystemExit(
                "A label is more than one token: reading all labels from one row is not fair then."
            )
        self.tokens = self.padded = self.rows = 0
        # On the inner model, because captum calls forward() of the outer one past its hooks; in a lambda,
        # because a copy of the model would copy a bound method together with everything it is bound to.
        self.model.model.register_forward_pre_hook(
            lambda module, args, kwargs: self._count(args, kwargs), with_kwargs=True
        )

    def _count(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs["input_ids"]
        mask = kwargs.get("attention_mask")
        real = ids.numel() if mask is None else int(mask.sum())
        self.tokens += real
        self.padded += ids.numel() - real
        self.rows += ids.shape[0]

    def count(self, requests: Sequence[ScoreRequest]) -> int:
        """Tokens of all prompts."""
        return sum(len(ids) for ids in self.tokenizer([str(r.prompt) for r in requests])["input_ids"])

    def logprobs(self, prompts: Sequence[str], batch: int, model: Any = None) -> np.ndarray:
        """Log-probability of every label after every prompt, float64 of shape (n_prompts, n_labels); nats.

        The strong naive way: prompts sorted by length and padded to the right, where no real token sees the
        padding; logits of last rows only; all labels from one row.
        """
        ids = [torch.tensor(row) for row in self.tokenizer(list(prompts))["input_ids"]]
        order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
        targets = torch.tensor(self.labels).flatten()
        out = np.zeros((len(ids), len(targets)))
        for begin in range(0, len(order), batch):
            mine = order[begin : begin + batch]
            rows = torch.nn.utils.rnn.pad_sequence(
                [ids[index] for index in mine], batch_first=True, padding_value=self.tokenizer.pad_token_id
            )
            last = torch.tensor([len(ids[index]) - 1 for index in mine])
            kept, where = torch.unique(last, return_inverse=True)
            with torch.inference_mode():
                logits = (model or self.model)(input_ids=rows, use_cache=False, logits_to_keep=kept).logits
                picked = logits[torch.arange(len(mine)), where].float().log_softmax(-1)[:, targets]
            # Without a mask the hook above has taken padding for tokens.
            padding = rows.numel() - int((last + 1).sum())
            self.tokens, self.padded = self.tokens - padding, self.padded + padding
            out[mine] = picked.double().numpy()
        return out


class Parts:
    """A prompt and a query as the peers want them: text before, one text per unit, text behind."""

    def __init__(self, prompt: FewShotPrompt, query: Any) -> None:
        whole = prompt.render(None, query)
        spans = prompt.unit_mask([True] * prompt.n_units).spans
        self.head, self.tail = whole[: spans[0][0]], whole[spans[-1][1] :]
        self.units = [whole[begin:end] for begin, end in spans]

    def text(self, kept: Sequence[bool]) -> str:
        return self.head + "".join(u for u, k in zip(self.units, kept, strict=True) if k) + self.tail


def run_captum(plain: Plain, parts: Parts, label: int, n_samples: int, batch: int) -> None:
    """Attribute one label's log-probability; captum draws its own coalitions and runs them one by one."""
    from captum.attr import KernelShap, LLMAttribution, TextTemplateInput

    attribution = LLMAttribution(KernelShap(plain.model), plain.tokenizer, attr_target="log_prob")
    inputs = TextTemplateInput(lambda *units: parts.head + "".join(units) + parts.tail, values=parts.units)
    attribution.attribute(
        inputs,
        target=torch.tensor(plain.labels[label]),
        n_samples=n_samples,
        use_cached_outputs=False,
        forward_in_tokens=False,
    )


def run_shap(plain: Plain, parts: Parts, label: int, n_samples: int, batch: int) -> None:
    """Explain the naive function; shap draws its own coalitions, and asks for them in one call."""
    import shap

    def function(coalitions: np.ndarray) -> np.ndarray:
        return plain.logprobs([parts.text(row > 0.5) for row in coalitions], batch)[:, label]

    explainer = shap.KernelExplainer(function, np.zeros((1, len(parts.units))))
    explainer.shap_values(np.ones((1, len(parts.units))), nsamples=n_samples, l1_reg=False, silent=True)


def run_context_cite(plain: Plain, parts: Parts, label: int, n_samples: int, batch: int) -> None:
    """Run ContextCite's ablation batches with the label as the response.

    Its ContextCiter splits contexts with a model it downloads and insists on a chat template; the function
    below it takes any prompt and any response.
    """
    from context_cite.utils import get_masks_and_logit_probs

    def prompt_ids(mask: np.ndarray) -> list[int]:
        return plain.tokenizer(parts.text(mask))["input_ids"]

    plain.tokenizer.padding_side = "left"
    try:
        get_masks_and_logit_probs(
            plain.model,
            plain.tokenizer,
            n_samples,
            len(parts.units),
            prompt_ids,
            plain.labels[label],
            0.5,
            batch,
        )
    finally:
        plain.tokenizer.padding_side = "right"


PEERS: dict[str, tuple[str, Callable[..., None], tuple[int, ...]]] = {
    "captum LLMAttribution + KernelShap": ("captum.attr", run_captum, (1,)),
    "shap KernelExplainer": ("shap", run_shap, (1, 8)),
    "ContextCite ablation batches": ("context_cite.utils", run_context_cite, (1, 8)),
}
"""Peer to (module, function, batch sizes it is tried with); captum has no batches for language models."""


@contextmanager
def silence() -> Iterator[None]:
    """Keep progress bars and download attempts of peers out of the output."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
