"""Embeddings of texts by the file of an encoder, such as BERT as .onnx, in the file's runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.api.evaluate_graph import opened_graph
from edgeq.converters.ort.graph_run import OrtGraphRunner
from edgeq.core.errors import FormatError, UnsupportedError, UsageError
from edgeq.core.progress import Progress
from edgeq.graph.files import graph_format
from edgeq.importers.huggingface.importer import folder_files
from edgeq.importers.huggingface.tokenizer import hf_tokenizer
from edgeq.importers.sentence_modules import SentenceModules, sentence_modules
from edgeq.quant.graph.sentences import ids_input, input_kinds, padding, text_inputs
from edgeq.runtime.embedding import Embedding, embedding

_STATES = ("last_hidden_state", "token_embeddings")
"""What exporters call the hidden states, where a file has several outputs of three axes."""


def embed_by_graph(
    path: Path,
    texts: Sequence[str],
    tokenizer: str | Path | None,
    threads: int,
    chosen: Mapping[str, Any],
    progress: Progress | None,
) -> list[NDArray[np.float32]]:
    """The vectors of texts.

    Args:
        path: an .onnx, .ort or .tflite file whose inputs are named input_ids, attention_mask,
            token_type_ids or position_ids, for one text at a time.
        texts: none of them empty.
        tokenizer: a folder, or its tokenizer.json; None looks beside the file and one folder above.
        threads: of the runtime.
        chosen: keyword arguments of `edgeq.runtime.embedding.embedding`.
        progress: called after every text.

    Raises:
        UsageError: there is no tokenizer, a text is too long, or a setting that the file excludes.
        UnsupportedError: outputs that edgeq does not take for hidden states or vectors.
        FormatError: a file is damaged.
    """
    files = folder_files(_folder(path, tokenizer))
    encodes = _Encodes(files)
    runner = _opened(path, threads)
    try:
        kinds = input_kinds(runner.inputs)
        length = _length(runner.inputs[ids_input(kinds)].shape)
        how = _settled(runner.outputs, sentence_modules(files), chosen)
        output, found = _output(runner.outputs), []
        for done, text in enumerate(texts):
            ids, skipped = how.tokens(encodes, text)
            how.check_length(len(ids))
            if length is not None and len(ids) > length:
                raise UsageError(
                    f"a text has {len(ids)} tokens with its special tokens, and {path} takes "
                    f"{length}; split the text, or export the encoder for more tokens"
                )
            feeds = text_inputs(runner.inputs, kinds, ids, length or len(ids), encodes.pad)
            states = runner(feeds)[output]
            rows = states.reshape(-1, states.shape[-1])[: len(ids)]
            found.append(how.vector(np.asarray(rows, np.float32), skipped))
            if progress is not None:
                progress("embedding texts", done + 1, len(texts))
        return found
    finally:
        runner.close()


class _Encodes:
    """The tokenizer of an encoder: tokens of a text as its post-processor frames them."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self._built = hf_tokenizer(files)
        self.pad = padding(self._built.library)

    def encode(self, text: str, add_bos: bool = True, add_eos: bool | None = None) -> list[int]:
        """Token ids of a text between what the tokenizer puts around it."""
        ids = self._built.encode(text)
        if add_bos:
            ids = [*self._built.prefix, *ids]
        return [*ids, *self._built.suffix] if (add_bos if add_eos is None else add_eos) else ids


def _folder(path: Path, tokenizer: str | Path | None) -> Path:
    """The folder with the tokenizer."""
    if tokenizer is not None:
        given = Path(tokenizer)
        places = [given if given.is_dir() else given.parent]
    else:
        places = [path.parent, path.parent.parent]
    for place in places:
        if (place / "tokenizer.json").is_file():
            return place
    raise UsageError(
        f"there is no tokenizer.json in {' or '.join(map(str, places))}; give the folder of the "
        "model's tokenizer (--tokenizer, or tokenizer=)"
    )


def _opened(path: Path, threads: int) -> Any:
    """A runner of the file; of axes that the file leaves open, onnxruntime takes any."""
    try:
        return opened_graph(path, threads)[0]
    except UsageError:
        if graph_format(path) != "onnx":
            raise
        return OrtGraphRunner(path, threads=threads, free_axes=True)


def _length(shape: tuple[int, ...]) -> int | None:
    """Tokens that an input of ids takes, or None for any number."""
    if len(shape) not in (1, 2) or (len(shape) == 2 and shape[0] not in (-1, 1)):
        raise UnsupportedError(
            f"the input of token ids has the shape {list(shape)}; edgeq embeds one text at a time, "
            "[1, tokens]; export the encoder so"
        )
    return None if shape[-1] < 0 else shape[-1]


def _output(outputs: Mapping[str, Any]) -> str:
    """The output that has the hidden states [1, T, hidden], or the vector [1, hidden]."""
    by_axes: dict[int, list[str]] = {2: [], 3: []}
    for name, info in outputs.items():
        by_axes.setdefault(len(info.shape), []).append(name)
    for axes in (3, 2):
        named = [name for name in by_axes[axes] if name in _STATES]
        if len(by_axes[axes]) == 1 or len(named) == 1:
            return (named or by_axes[axes])[0]
        if by_axes[axes]:
            raise UnsupportedError(
                f"the file has the outputs {', '.join(outputs)}; edgeq takes the hidden states of "
                f"a text from one of {', '.join(_STATES)}, or from the only one of three axes"
            )
    raise UnsupportedError(
        f"no output of the file ({', '.join(outputs)}) has the axes of hidden states "
        "[1, tokens, hidden] or of a vector [1, hidden]"
    )


def _settled(
    outputs: Mapping[str, Any], modules: SentenceModules, chosen: Mapping[str, Any]
) -> Embedding:
    """How the file's output becomes a vector."""
    info = outputs[_output(outputs)]
    width = info.shape[-1]
    if width < 0:
        raise FormatError("the file does not say how many numbers a hidden state has")
    if len(info.shape) == 3:
        return embedding(modules, width, causal=False, **chosen)
    # one vector for the text: the file pools by itself
    if chosen.get("pooling") is not None:
        raise UsageError(
            "pooling is given, and the file gives a vector that is pooled already; leave it out"
        )
    if modules.dense:
        raise UnsupportedError(
            "the file gives a pooled vector, and the model's files list dense modules after it; "
            "edgeq cannot tell whether the file holds them: export hidden states instead"
        )
    return embedding(modules, width, **{**chosen, "pooling": "last"})
