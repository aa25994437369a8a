"""From a GGUF file to what transformers loads: config, tokenizer.json, float32 safetensors.

Two architectures are known, those of the embedded models. What is written equals what transformers' own
GGUF loader makes of the same files: the weights bit for bit, the tokenizers piece for piece.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from proxyprompt.errors import BackendError

from .gguf import FloatArray, GgufFile

__all__ = ["write_model"]

_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Llama normalises before the feed-forward part only, Gemma 3 on both sides of both parts.
_FFN_NORMS = {
    "llama": {"ffn_norm": "post_attention_layernorm"},
    "gemma3": {
        "ffn_norm": "pre_feedforward_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_TOKENS = "tokenizer.ggml.tokens"
_CONTROL, _USER_DEFINED = 3, 4
# Every sixth layer of Gemma 3 attends to everything; GGUF files do not record it.
_GEMMA_PATTERN = 6
_GEMMA_LOCAL_BASE = 10000.0


def write_model(source: GgufFile, folder: Path) -> dict[str, str]:
    """Write a model folder and return the SHA-256 of each file in it, by name.

    Every file is flushed to the disk before it counts as written.

    Raises
    ------
    BackendError
        If the architecture is not one of the known ones, or a tensor has no counterpart.
    """
    architecture = source.metadata["general.architecture"]
    if architecture not in _FFN_NORMS:
        raise BackendError(
            f"The GGUF file holds a {architecture!r}; only {sorted(_FFN_NORMS)} can be converted.",
            hint="Convert it with transformers and give the folder to TransformersBackend.",
        )
    config = _llama_config(source) if architecture == "llama" else _gemma_config(source)
    texts = {
        "config.json": json.dumps(config, indent=2),
        "generation_config.json": json.dumps(
            {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        ),
        "tokenizer.json": json.dumps(_tokenizer(source), ensure_ascii=False, separators=(",", ":")),
        "tokenizer_config.json": json.dumps(_tokenizer_config(source), indent=2),
    }
    if "tokenizer.chat_template" in source.metadata:
        texts["chat_template.jinja"] = source.metadata["tokenizer.chat_template"]
    hashes = {name: _write(folder / name, [text.encode("utf-8")]) for name, text in texts.items()}
    hashes["model.safetensors"] = _write(folder / "model.safetensors", _safetensors(source))
    return hashes


def _write(file: Path, parts: Any) -> str:
    digest = hashlib.sha256()
    with file.open("wb") as stream:
        for part in parts:
            stream.write(part)
            digest.update(part)
        stream.flush()
        os.fsync(stream.fileno())
    return digest.hexdigest()


def _safetensors(source: GgufFile) -> Iterator[Any]:
    """The bytes of a safetensors file, one tensor in memory at a time."""
    names = {_name(name, source): name for name in source.tensors}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in sorted(names):
        shape = source.tensors[names[name]].shape
        size = 4 * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for name in sorted(names):
        values = _arranged(source, names[name])
        yield np.ascontiguousarray(values, dtype="<f4").data.cast("B")


def _name(name: str, source: GgufFile) -> str:
    parts = name.removesuffix(".weight").split(".")
    try:
        if parts[0] == "blk":
            known = _LAYER | _FFN_NORMS[source.metadata["general.architecture"]]
            return f"model.layers.{parts[1]}.{known[parts[2]]}.weight"
        return f"{_TOP[parts[0]]}.weight"
    except (KeyError, IndexError) as error:
        raise BackendError(
            f"The GGUF file has a tensor {name!r} that the architecture does not know.",
            hint="Report it; the package may hold a newer file.",
        ) from error


def _arranged(source: GgufFile, name: str) -> FloatArray:
    values = source.tensor(name)
    architecture = source.metadata["general.architecture"]
    if architecture == "gemma3" and name.endswith("norm.weight"):
        # GGUF stores the factor, the model stores its distance from one.
        return values - np.float32(1)
    if architecture == "llama" and (".attn_q." in name or ".attn_k." in name):
        # GGUF rotates neighbouring pairs, transformers the two halves of a head.
        count = "head_count" if ".attn_q." in name else "head_count_kv"
        heads = source.metadata[f"llama.attention.{count}"]
        pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, values.shape[1])
        return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)
    return values


def _common_config(source: GgufFile, prefix: str) -> dict[str, Any]:
    meta = source.metadata
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "dtype": "float32",
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "hidden_size": meta[f"{prefix}.embedding_length"],
        "intermediate_size": meta[f"{prefix}.feed_forward_length"],
        "max_position_embeddings": meta[f"{prefix}.context_length"],
        "num_attention_heads": meta[f"{prefix}.attention.head_count"],
        "num_hidden_layers": meta[f"{prefix}.block_count"],
        "num_key_value_heads": meta[f"{prefix}.attention.head_count_kv"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
        "rms_norm_eps": meta[f"{prefix}.attention.layer_norm_rms_epsilon"],
        "tie_word_embeddings": "output.weight" not in source.tensors,
        "vocab_size": source.tensors["token_embd.weight"].shape[0],
    }


def _llama_config(source: GgufFile) -> dict[str, Any]:
    common = _common_config(source, "llama")
    return common | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "head_dim": common["hidden_size"] // common["num_attention_heads"],
        "hidden_act": "silu",
        "mlp_bias": False,
        "rope_parameters": {
            "rope_theta": source.metadata["llama.rope.freq_base"],
            "rope_type": "default",
        },
    }


def _gemma_config(source: GgufFile) -> dict[str, Any]:
    common = _common_config(source, "gemma3")
    layers = range(1, common["num_hidden_layers"] + 1)
    head = source.metadata["gemma3.attention.key_length"]
    return common | {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "head_dim": head,
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": [
            "sliding_attention" if layer % _GEMMA_PATTERN else "full_attention" for layer in layers
        ],
        "query_pre_attn_scalar": head,
        "rope_parameters": {
            "full_attention": {
                "rope_theta": source.metadata["gemma3.rope.freq_base"],
                "rope_type": "default",
            },
            "sliding_attention": {"rope_theta": _GEMMA_LOCAL_BASE, "rope_type": "default"},
        },
        "sliding_window": source.metadata["gemma3.attention.sliding_window"],
        "use_bidirectional_attention": False,
    }


def _tokenizer_config(source: GgufFile) -> dict[str, Any]:
    meta = source.metadata
    tokens = meta[_TOKENS]
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    specials = {
        f"{ours}_token": tokens[meta[f"tokenizer.ggml.{key}_token_id"]] for ours, key in names.items()
    }
    return {"backend": "tokenizers", "tokenizer_class": "PreTrainedTokenizerFast", **specials}


def _tokenizer(source: GgufFile) -> dict[str, Any]:
    byte_level = source.metadata["tokenizer.ggml.model"] == "gpt2"
    tokens, model = _byte_level(source) if byte_level else _sentence_pieces(source)
    kinds = source.metadata["tokenizer.ggml.token_type"]
    added = [
        {
            "id": index,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind == _CONTROL,
        }
        for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        # A run of spaces is a piece like any other once it is respelled.
        if kind == _CONTROL or (kind == _USER_DEFINED and token == source.metadata[_TOKENS][index])
    ]
    parts = _byte_level_parts() if byte_level else _sentence_piece_parts(source, tokens)
    head = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
    return head | parts | {"model": model}


def _byte_level(source: GgufFile) -> tuple[list[str], dict[str, Any]]:
    tokens: list[str] = source.metadata[_TOKENS]
    merges = [merge.split(" ") for merge in source.metadata["tokenizer.ggml.merges"]]
    options: dict[str, Any] = {"unk_token": None, "fuse_unk": False, "byte_fallback": False}
    options |= {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
    return tokens, _bpe(tokens, merges, options)


def _byte_level_parts() -> dict[str, Any]:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level | {"add_prefix_space": True},
    }


def _sentence_pieces(source: GgufFile) -> tuple[list[str], dict[str, Any]]:
    # Runs of spaces are stored as such, and written with the sentence-piece space in a tokenizer.json.
    tokens = [
        "▁" * len(token) if " " in token and not token.strip() else token
        for token in source.metadata[_TOKENS]
    ]
    options: dict[str, Any] = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    options |= {"continuing_subword_prefix": None, "end_of_word_suffix": None}
    return tokens, _bpe(tokens, _merges(tokens), options)


def _sentence_piece_parts(source: GgufFile, tokens: list[str]) -> dict[str, Any]:
    bos = source.metadata["tokenizer.ggml.bos_token_id"]
    text = [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]
    begin = [{"SpecialToken": {"id": tokens[bos], "type_id": which}} for which in (0, 1)]
    return {
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin[0], text[0]],
            "pair": [begin[0], text[0], begin[1], text[1]],
            "special_tokens": {tokens[bos]: {"id": tokens[bos], "ids": [bos], "tokens": [tokens[bos]]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
    }


def _bpe(tokens: list[str], merges: list[list[str]], options: dict[str, Any]) -> dict[str, Any]:
    vocab = {token: index for index, token in enumerate(tokens)}
    model = {"type": "BPE", "dropout": None, "ignore_merges": False, "vocab": vocab, "merges": merges}
    return model | options


def _merges(tokens: list[str]) -> list[list[str]]:
    """Merges that a sentence-piece vocabulary implies, best first.

    A Gemma file lists its pieces in the order they were learned, so a piece's place ranks the merges that
    make it; among the ways to cut one piece, the longer left part comes first, as in transformers.
    """
    index = {token: place for place, token in enumerate(tokens)}
    merges: list[list[str]] = []
    for token in index:
        cuts = [
            (token[:at], token[at:])
            for at in range(len(token) - 1, 0, -1)
            if token[:at] in index and token[at:] in index
        ]
        merges += [list(cut) for cut in cuts]
    return merges
