"""How a model's embedding of a text is made of its tokens' hidden states, as its files say.

Source: https://www.sbert.net/docs/package_reference/sentence_transformer/models.html (files of
Sentence Transformers), and llama.cpp's ``pooling_type``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from edgeq.core.errors import FormatError, UnsupportedError
from edgeq.importers.json_object import read_object

FILE, MODULES = "1_Pooling/config.json", "modules.json"
POOLINGS = ("last", "mean")
"""The last token's hidden state, or the mean of all tokens'."""
_MODES = {"pooling_mode_lasttoken": "last", "pooling_mode_mean_tokens": "mean"}
_GGUF = {1: "pooling_mode_mean_tokens", 2: "pooling_mode_cls_token", 3: "pooling_mode_lasttoken"}
_KNOWN_MODULES = ("Transformer", "Pooling", "Normalize")


def pooling_of(files: Mapping[str, bytes]) -> str:
    """What a model's files say; "last" if they say nothing, as suits a causal decoder.

    Args:
        files: of a model.

    Raises:
        UnsupportedError: it pools in another way, or has further modules, which edgeq does not run.
        FormatError: a file is damaged.

    Example:
        >>> pooling_of({"1_Pooling/config.json": b'{"pooling_mode_mean_tokens": true}'})
        'mean'
    """
    if MODULES in files:
        try:
            listed = json.loads(files[MODULES])
            types = [str(module["type"]).rpartition(".")[2] for module in listed]
        except (ValueError, RecursionError, TypeError, KeyError) as err:
            raise FormatError(f"{MODULES} is not a list of modules") from err
        for other in types:
            if other not in _KNOWN_MODULES:
                raise UnsupportedError(
                    f"embeddings of this model go through a module {other} after the decoder, "
                    f"which edgeq does not run; it runs {', '.join(_KNOWN_MODULES)}"
                )
    config = read_object(files, FILE)
    chosen = [
        name for name, value in config.items() if name.startswith("pooling_mode") and value is True
    ]
    if not chosen:
        return "last"
    if len(chosen) > 1 or chosen[0] not in _MODES:
        raise UnsupportedError(
            f"this model's embeddings are pooled by {', '.join(chosen)}; edgeq knows "
            f"{', '.join(_MODES)}; choose one of {', '.join(POOLINGS)} to pool otherwise"
        )
    return _MODES[chosen[0]]


def of_gguf(pooling_type: object) -> dict[str, bytes]:
    """The file that says the same as a GGUF file's ``pooling_type``; none if that says nothing."""
    mode = _GGUF.get(pooling_type) if isinstance(pooling_type, int) else None
    return {FILE: json.dumps({mode: True}).encode()} if mode else {}
