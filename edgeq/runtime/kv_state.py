"""A sequence's tokens and KV cache in one file, so that a prompt is run only once.

The file is a safetensors container. Its metadata are

    format "edgeq-state", format_version "1", model: fingerprint, kv_bits: "4", "8" or "16",
    starts: JSON list, for each layer the first position that is in the file,
    context: of the engine that saved it; absent in older files

and its tensors are (S positions of a layer, from its start to the end of the sequence):

    tokens          I32 [n]
    layers.I.NAME   the arrays of `state_parts`: only used positions, in order, so that a state
                    can be loaded with any context, thread count, processor and backend
    crc32           U32 [1]   of every byte of the file before it

A layer with a sliding window or a short convolution may lack the beginning of the sequence; its
start is above 0 then. A gated delta net has the inputs of its last positions and its state.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import FormatError, UsageError
from edgeq.core.files import write_whole
from edgeq.formats.safetensors_file import (
    TYPE_NAMES,
    SafetensorsFile,
    open_safetensors,
    safetensors_header,
)
from edgeq.formats.tensor import FloatTensor, QuantTensor
from edgeq.model.block import K_NORM, K_PROJ, V_PROJ, tensor_name
from edgeq.model.config import ModelConfig
from edgeq.model.memory_layout import center_span, input_width, state_shape
from edgeq.model.model import Model
from edgeq.model.rotary import same_ropes

FORMAT = "edgeq-state"
VERSION = 1
Parts = dict[str, NDArray[Any]]
"""The arrays of some positions of one layer, by name."""
_CRC_BYTES = 1 << 24


def state_parts(
    config: ModelConfig, layer: int, kv_bits: int, positions: int
) -> dict[str, tuple[Any, tuple[int, ...]]]:
    """Types and shapes of a layer's cache for some positions, whichever its mixer is.

    Of a short convolution these are its inputs, and of a gated delta net its inputs at the
    positions, and its state after them. The first position is a multiple of `layer_span`. There
    are none of a layer that reads the keys and values of another.

    Returns:
        name -> (NumPy type, shape), in file order.
    """
    if config.blocks[layer].mixer != "attention":
        inputs = (np.float32, (positions, input_width(config, layer)))
        if config.blocks[layer].delta is None:
            return {"inputs": inputs}
        return {"inputs": inputs, "state": (np.float32, state_shape(config, layer))}
    if config.blocks[layer].kv_from is not None:
        return {}
    return layer_parts(config, layer, kv_bits, positions)


def is_sound(model: Model, layer: int) -> bool:
    """Whether all weights that a layer's keys and values come from are finite."""
    block = model.config.blocks[layer]
    parts = (block.attention_norm, K_PROJ, V_PROJ, K_NORM if block.qk_norm else None)
    tensors = (model.tensors[tensor_name(layer, part)] for part in parts if part)
    return all(bool(np.isfinite(tensor.numpy()).all()) for tensor in tensors)


def layer_span(config: ModelConfig, layer: int, kv_bits: int) -> int:
    """Positions of a layer's cache that are stored together."""
    return 1 if config.blocks[layer].mixer != "attention" else center_span(kv_bits)


def positions_in(parts: Parts) -> int:
    """How many positions the arrays of a layer are of."""
    return len(parts["inputs"] if "inputs" in parts else parts["keys"])


def layer_parts(
    config: ModelConfig, layer: int, kv_bits: int, positions: int
) -> dict[str, tuple[Any, tuple[int, ...]]]:
    """Types and shapes of the cache of a layer with attention for some positions.

    The quantization is described in `edgeq.runtime.activations`. The first of the positions is a
    multiple of `edgeq.model.memory_layout.center_span`. Two codes of 4 bits share a byte.

    Returns:
        name -> (NumPy type, shape), in file order.
    """
    head_dim = config.head_dim_of(layer)
    rows, heads = (positions, config.kv_heads), (config.kv_heads, head_dim)
    if kv_bits == 16:
        return dict.fromkeys(("keys", "values"), (np.float16, (positions, *heads)))
    codes = (*rows, -(-head_dim // 2)) if kv_bits == 4 else (positions, *heads)
    return {
        "keys": (np.uint8, codes),
        "key_scales": (np.float16, rows),
        "key_zeros": (np.uint8, rows),
        "centers": (np.float16, (-(-positions // center_span(kv_bits)), *heads)),
        "values": (np.uint8 if kv_bits == 4 else np.int8, codes),
        "value_scales": (np.float32, rows),
    }


def paired(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Codes of 4 bits [..., D] as bytes [..., D/2], the even places in the lower halves."""
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros_like(codes[..., :1])], axis=-1)
    return codes[..., 0::2] | (codes[..., 1::2] << np.uint8(4))


def unpaired(pairs: NDArray[np.uint8], dim: int) -> NDArray[np.uint8]:
    """The codes [..., dim] of `paired`."""
    codes = np.stack([pairs & np.uint8(15), pairs >> np.uint8(4)], axis=-1)
    return codes.reshape(*pairs.shape[:-1], -1)[..., :dim]


def fingerprint(model: Model) -> str:
    """SHA-256 that identifies a model: of its config, its tensors' schemes, and a row of each.

    The first row of every tensor is hashed rather than all bytes, which would mean reading the
    whole file; training or quantizing again changes every first row.
    """
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    source = model.provenance.get("source_sha256")
    for name, tensor in sorted(model.tensors.items()):
        kind = type(tensor).__name__
        raw = tensor.rows(0, 1).tobytes()
        if isinstance(tensor, QuantTensor):
            kind = str(tensor.scheme)
            raw = tensor.packed[0].tobytes() + tensor.scales[0].tobytes()
        elif isinstance(tensor, FloatTensor):
            kind = tensor.dtype
        digest.update(f"{source}|{name}|{kind}|{list(tensor.shape)}|".encode() + raw)
    return digest.hexdigest()


@dataclass(frozen=True)
class Saved:
    """A state file that was checked against a model.

    Args:
        tokens: the sequence.
        starts: for each layer, the first position that is in the file.
        file: with the layers' arrays.
    """

    tokens: list[int]
    starts: list[int]
    file: SafetensorsFile

    def layers(self) -> Iterator[tuple[int, Parts]]:
        """Each layer's start and arrays (views of the mapped file)."""
        for layer, start in enumerate(self.starts):
            prefix = f"layers.{layer}."
            names = [name for name in self.file.tensors if name.startswith(prefix)]
            yield start, {name.removeprefix(prefix): self.file.array(name) for name in names}


@dataclass(frozen=True)
class Snapshot:
    """A sequence and its cache in memory.

    Args:
        model: `fingerprint` of the model.
        kv_bits: 8 or 16.
        tokens: the sequence.
        layers: for each layer, the first position it has and the arrays of `state_parts`.
        context: of the engine that made it, on which rotary positions may depend.
    """

    model: str
    kv_bits: int
    tokens: tuple[int, ...]
    layers: tuple[tuple[int, Parts], ...]
    context: int

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(part.nbytes for _, parts in self.layers for part in parts.values())

    def check(self, config: ModelConfig, model: str, kv_bits: int, context: int) -> None:
        """Refuse an engine that cannot continue the sequence.

        Args:
            config, model, kv_bits, context: of that engine; ``model`` is its model's `fingerprint`.

        Raises:
            UsageError: it is of another model or kv_bits, too long, or rotated for another context.
        """
        if (self.model, self.kv_bits) != (model, kv_bits):
            raise UsageError(
                "the snapshot is of another model or of another kv_bits; restore it in an engine "
                "like the one that made it"
            )
        if len(self.tokens) > context:
            raise UsageError(
                f"the snapshot has {len(self.tokens)} tokens and the context holds {context}; use "
                "an engine with a context of at least that many"
            )
        if not same_ropes(config, self.context, context):
            raise UsageError(other_ropes("the snapshot", self.context, context))


def save(
    path: str | Path,
    config: ModelConfig,
    model: str,
    kv_bits: int,
    tokens: list[int],
    starts: list[int],
    read: Callable[[int, int, int], Parts],
    context: int,
) -> int:
    """Write a state atomically.

    Args:
        path: the file to create or replace.
        config: of the model.
        model: its `fingerprint`.
        kv_bits: 4, 8 or 16.
        tokens: the sequence.
        starts: for each layer, the first position to keep, a multiple of the cache's center span.
        read: (layer, start, stop) -> the layer's parts.
        context: of the engine, on which rotary positions may depend.

    Returns:
        The size of the file in bytes.

    Raises:
        EdgeqError: it cannot be written.
    """
    n = len(tokens)
    arrays: dict[str, tuple[str, tuple[int, ...], int]] = {"tokens": ("I32", (n,), 4 * n)}
    for layer, start in enumerate(starts):
        for name, (kind, shape) in state_parts(config, layer, kv_bits, n - start).items():
            nbytes = np.dtype(kind).itemsize * math.prod(shape)
            arrays[f"layers.{layer}.{name}"] = (TYPE_NAMES[kind], shape, nbytes)
    arrays["crc32"] = ("U32", (1,), 4)
    metadata = {
        "format": FORMAT,
        "format_version": str(VERSION),
        "model": model,
        "kv_bits": str(kv_bits),
        "starts": json.dumps(starts),
        "context": str(context),
    }
    header = safetensors_header(metadata, arrays)

    def pieces() -> Iterator[bytes | memoryview]:
        yield header
        yield np.array(tokens, "<i4").tobytes()
        for layer, start in enumerate(starts):
            parts = read(layer, start, n)
            for name in state_parts(config, layer, kv_bits, n - start):
                yield np.ascontiguousarray(parts[name]).reshape(-1).view(np.uint8).data

    write_whole(Path(path), _summed(pieces()), "the state")
    return len(header) + sum(nbytes for _, _, nbytes in arrays.values())


def _summed(pieces: Iterator[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    """The pieces, followed by their checksum."""
    crc = 0
    for piece in pieces:
        crc = zlib.crc32(piece, crc)
        yield piece
    yield crc.to_bytes(4, "little")


def load(path: str | Path, config: ModelConfig, model: str, kv_bits: int, context: int) -> Saved:
    """Open a state and check all of it against a model and an engine's settings.

    Args:
        path: from `save`.
        config, model, kv_bits: as for `save`.
        context: the most tokens it may have.

    Raises:
        FormatError: it cannot be read, is damaged, or is not a saved state.
        UsageError: another model, another kv_bits, more tokens than the context, or other rotary
            positions.
    """
    path = Path(path)
    try:
        file = open_safetensors(path)
    except FormatError as err:
        raise _damaged(path, str(err)) from err
    metadata = file.metadata
    if metadata.get("format") != FORMAT:
        raise FormatError(
            f"{path} is not a saved prompt cache; give a file that --prompt-cache wrote"
        )
    if metadata.get("format_version") != str(VERSION):
        raise FormatError(
            f"{path} is a state of format {metadata.get('format_version')!r} and this edgeq "
            f"reads {VERSION}; delete it to start again"
        )
    _check_crc(file)
    if metadata.get("model") != model:
        raise UsageError(
            f"{path} was saved with another model; use that one, another file, or delete it"
        )
    if metadata.get("kv_bits") != str(kv_bits):
        raise UsageError(
            f"{path} holds a {metadata.get('kv_bits')}-bit KV cache and the engine's has "
            f"{kv_bits} bits; give kv_bits {metadata.get('kv_bits')}, or use another file"
        )
    tokens = _checked(file, "tokens", "I32")
    if tokens.ndim != 1 or (tokens.size and not 0 <= tokens.min() <= tokens.max() < config.vocab):
        raise _damaged(path, "its tokens are not token ids of the model")
    if tokens.size > context:
        raise UsageError(
            f"{path} holds {tokens.size} tokens and the context {context}; "
            f"use a context of at least {tokens.size}"
        )
    saved = metadata.get("context", str(context))
    if not saved.isdecimal() or len(saved) > 12:
        raise _damaged(path, "it does not say what context its engine had")
    if not same_ropes(config, int(saved), context):
        raise UsageError(other_ropes(str(path), int(saved), context))
    starts = _starts(path, metadata.get("starts", ""), config, tokens.size, kv_bits)
    for layer, start in enumerate(starts):
        parts = state_parts(config, layer, kv_bits, tokens.size - start)
        for name, (kind, shape) in parts.items():
            _checked(file, f"layers.{layer}.{name}", TYPE_NAMES[kind], shape)
    return Saved([int(token) for token in tokens], starts, file)


def other_ropes(name: str, saved: int, context: int) -> str:
    """The message for keys that are rotated for another context."""
    return (
        f"{name} was made with a context of {saved} tokens and the engine's is {context}, for "
        "which this model's rotary positions are other ones; give a context on the same side of "
        "the model's original one, or run the prompt again"
    )


def _check_crc(file: SafetensorsFile) -> None:
    place = file.tensors.get("crc32")
    if place is None or place.dtype != "U32" or place.stop != file.mapping.size:
        raise _damaged(file.path, "it does not end in a checksum")
    raw = file.mapping.array(np.uint8, (place.start,), 0)
    crc = 0
    for start in range(0, raw.size, _CRC_BYTES):
        crc = zlib.crc32(raw[start : start + _CRC_BYTES].data, crc)
    if crc != int(_checked(file, "crc32", "U32", (1,))[0]):
        raise _damaged(file.path, "its checksum does not match its bytes")


def _checked(
    file: SafetensorsFile, name: str, dtype: str, shape: tuple[int, ...] | None = None
) -> NDArray[Any]:
    place = file.tensors.get(name)
    if place is None or place.dtype != dtype or shape not in (None, place.shape):
        problem = f"is {place.dtype} {list(place.shape)}" if place else "is missing"
        raise _damaged(file.path, f"{name} {problem}")
    return file.array(name)


def _starts(path: Path, text: str, config: ModelConfig, n: int, kv_bits: int) -> list[int]:
    try:
        starts = json.loads(text)
        good = len(starts) == config.layers and all(
            type(start) is int
            and start % layer_span(config, layer, kv_bits) == 0
            and 0 <= start <= config.blocks[layer].first_seen(n)
            for layer, start in enumerate(starts)
        )
    except (json.JSONDecodeError, RecursionError, TypeError):
        good = False
    if not good:
        raise _damaged(path, "it does not say where its layers start")
    return list(starts)


def _damaged(path: Path, why: str) -> FormatError:
    return FormatError(f"{path} is not a complete state file: {why}; delete it to start again")
