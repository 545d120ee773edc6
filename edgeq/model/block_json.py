"""`BlockSpec`s as JSON: each distinct block once, and for each layer which of them it is.

"blocks": [{"mixer": "attention", "rope": {...}, ...}, ...]
"layer_blocks": [0, 0, 0, 1, 0, ...]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from edgeq.core.errors import FormatError
from edgeq.model.block import BlockSpec, DeltaSpec, ExpertsSpec
from edgeq.model.limits import MAX_LAYERS, is_count
from edgeq.model.rope_spec import RopeScaling, RopeSpec

FLAT_KEYS = (
    "layers", "rope_theta", "rope_theta_local", "rope_dim", "rope_scaling", "window",
    "window_layers", "qk_norm", "post_norms",
)  # fmt: skip
"""Keys that said what all layers are in artifacts of edgeq 0.1 and before."""

_OPTIONAL = frozenset((
    "attention_factor", "beta_fast", "beta_slow", "truncate", "short_factors", "long_factors",
    "temperature", "temperature_length", "still",
))  # fmt: skip
"""Keys of a rope and of its scaling that are absent where they have their default."""


def blocks_to_json(blocks: Sequence[BlockSpec]) -> dict[str, Any]:
    """The keys "blocks" and "layer_blocks" for the blocks of all layers."""
    distinct = list(dict.fromkeys(blocks))
    number = {block: i for i, block in enumerate(distinct)}
    return {
        "blocks": [_described(block) for block in distinct],
        "layer_blocks": [number[block] for block in blocks],
    }


def block_to_json(block: BlockSpec) -> dict[str, Any]:
    """One block by itself."""
    return _described(block)


def block_from_json(described: Any) -> BlockSpec:
    """The inverse of `block_to_json`.

    Raises:
        FormatError: a value is not one that it writes.
    """
    return _block(described)


def blocks_from_json(data: Mapping[str, Any]) -> tuple[BlockSpec, ...]:
    """The blocks of all layers, the inverse of `blocks_to_json`.

    Raises:
        FormatError: a value is not one that `blocks_to_json` writes.
    """
    described, numbers = data["blocks"], data.get("layer_blocks")
    for name, value in (("blocks", described), ("layer_blocks", numbers)):
        if not isinstance(value, list | tuple) or len(value) > MAX_LAYERS:
            raise FormatError(f"model config: {name} must be a list of at most {MAX_LAYERS} values")
    assert numbers is not None
    blocks = [_block(block) for block in described]
    for number in numbers:
        if not is_count(number) or number >= len(blocks):
            raise FormatError(
                f"model config: layer_blocks names block {number!r}; there are {len(blocks)} blocks"
            )
    return tuple(blocks[number] for number in numbers)


def blocks_from_flat(data: Mapping[str, Any]) -> tuple[BlockSpec, ...]:
    """The blocks of all layers from the `FLAT_KEYS` of an older artifact.

    Raises:
        FormatError: a value is missing or has the wrong type.
    """
    layers, head_dim = data.get("layers"), data.get("head_dim")
    if not is_count(layers) or not 1 <= int(layers or 0) <= MAX_LAYERS:
        raise FormatError(
            f"model config: layers is {layers!r}; it must be a positive whole number of at most "
            f"{MAX_LAYERS}"
        )
    window, windowed = data.get("window"), data.get("window_layers") or ()
    if not isinstance(windowed, list | tuple):
        raise FormatError(f"model config: window_layers is {windowed!r}; expected a list")
    windowed = tuple(windowed) or (window is not None,) * int(layers or 0)
    if not all(isinstance(value, bool) for value in windowed):
        raise FormatError("model config: window_layers holds values other than true and false")
    if len(windowed) != layers:
        raise FormatError(f"model config: window_layers names {len(windowed)} of {layers} layers")
    for name in ("qk_norm", "post_norms"):
        if not isinstance(data.get(name, False), bool):
            raise FormatError(f"model config: {name} is {data[name]!r}; it must be true or false")
    dim = data.get("rope_dim", 0) or head_dim
    local_base = data.get("rope_theta_local")
    kinds = {}
    for local in sorted(set(windowed)):
        if local and local_base is not None:
            rope = RopeSpec(local_base, _number(dim))
        else:
            scaling = _scaling(data.get("rope_scaling"))
            rope = RopeSpec(data.get("rope_theta", 10000.0), _number(dim), scaling)
        kinds[local] = BlockSpec(
            norm_after=data.get("post_norms", False),
            qk_norm="head" if data.get("qk_norm", False) else None,
            rope=rope,
            window=window if local else None,
        )
    return tuple(kinds[local] for local in windowed)


def _described(block: BlockSpec) -> dict[str, Any]:
    """A block without the keys that it does not need and that older readers do not know."""
    values = asdict(block)
    for name in (
        "qk_norm_last", "output_gate", "sinks", "delta", "experts", "v_norm", "layer_scale",
    ):  # fmt: skip
        if not values[name]:
            del values[name]
    for name in ("head_dim", "ffn", "kv_from"):
        if values[name] is None:
            del values[name]
    if block.experts and not block.experts.biases:
        del values["experts"]["biases"]
    if block.delta is not None and not block.delta.tiled_out:
        del values["delta"]["tiled_out"]
    if block.causal:
        del values["causal"]
    rope = values["rope"]
    if rope is not None:
        values["rope"] = _without_defaults(RopeSpec, rope)
        if rope["scaling"] is not None:
            values["rope"]["scaling"] = _without_defaults(RopeScaling, rope["scaling"])
    return values


def _without_defaults(kind: type[RopeSpec | RopeScaling], values: dict[str, Any]) -> dict[str, Any]:
    optional = {f.name: f.default for f in fields(kind) if f.name in _OPTIONAL}
    return {k: v for k, v in values.items() if k not in optional or v != optional[k]}


def _number(value: Any) -> int:
    return value  # type: ignore[no-any-return]  # RopeSpec checks it


def _block(described: Any) -> BlockSpec:
    values = _object("a block", described)
    if values.get("rope") is not None:
        rope = _object("rope", values["rope"])
        values["rope"] = RopeSpec(**{**rope, "scaling": _scaling(rope.get("scaling"))})
    if values.get("delta") is not None:
        values["delta"] = DeltaSpec(**_object("delta", values["delta"]))
    if values.get("experts") is not None:
        values["experts"] = ExpertsSpec(**_object("experts", values["experts"]))
    return BlockSpec(**values)


def _scaling(described: Any) -> RopeScaling | None:
    if described is None:
        return None
    values = _object("rope scaling", described)
    lists = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
    return RopeScaling(**{**values, **lists})


def _object(what: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise FormatError(f"model config: {what} is {value!r}; it must be an object")
    return dict(value)
