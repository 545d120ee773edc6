"""onnxruntime-genai: a folder its ``Model(path)`` runs as it is, tokenizer and template included.

    model.onnx, model.onnx.data   the graph of `edgeq.converters.ort.decoder`
    genai_config.json             names, sizes and the defaults of its search
    tokenizer.json                the model's own
    tokenizer_config.json         with a class onnxruntime-genai knows, and the chat template
    special_tokens_map.json, generation_config.json, chat_template.jinja   as far as there are any

Options are those of ort, but that logits are of the last position only unless ``logits`` is "all".
Folders with the last only were run by onnxruntime-genai 0.12.2 to 0.18, those with all from 0.9
on. Its tokenizer adds no BOS of itself: the template, or the app, writes it.

Source: onnxruntime-genai's src/config.cpp for the keys, src/models/model_type.h for the types and
onnxruntime-extensions' operators/tokenizer for the classes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.mixers import check_attention_only
from edgeq.converters.options import Options
from edgeq.converters.ort.builder import HEAD_STEP
from edgeq.converters.ort.decoder import OrtDecoderTarget, settings
from edgeq.converters.ort.genai_tokenizer import GenaiTokenizer, check_same_ids, require
from edgeq.converters.ort.run import config_of, precision_of, read_graph
from edgeq.converters.runners import DecoderRunner, Precision
from edgeq.converters.size import Size
from edgeq.converters.stored import StoredConstant
from edgeq.converters.validate.tokenizer import TargetTokenizer, model_ends
from edgeq.core.errors import FormatError, UnsupportedError, UsageError
from edgeq.core.progress import Progress
from edgeq.formats.packing import round_up
from edgeq.importers.huggingface.families import FAMILIES
from edgeq.importers.huggingface.tokenizer import (
    HfTokenizer,
    complete_document,
    hf_tokenizer,
    special_tokens,
)
from edgeq.importers.json_object import read_object
from edgeq.importers.tokenizer.chat_templates import DEFAULT, chat_templates
from edgeq.importers.tokenizer.chat_templates import FILE as CHAT_TEMPLATE
from edgeq.model.config import ModelConfig
from edgeq.model.model import Model
from edgeq.model.reference import checked_tokens

CONFIG = "genai_config.json"
ROOM = 512
"""Positions a new cache has room for; onnxruntime-genai makes all of a cache at once."""
_SEARCH = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "min_length")
"""What generation_config.json may say that the search heeds."""
_BPE = (
    "CodeGenTokenizer",
    "CodeLlamaTokenizer",
    "GPT2Tokenizer",
    "GPTNeoXTokenizer",
    "GemmaTokenizer",
    "LlamaTokenizer",
    "Phi3Tokenizer",
    "PreTrainedTokenizer",
    "Qwen2Tokenizer",
)
_UNIGRAM = ("T5Tokenizer", "XLMRobertaTokenizer")
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


class GenaiDecoderTarget(OrtDecoderTarget):
    """Language models for onnxruntime-genai: the files of `ort`, and those it adds to them."""

    def check(self, model: Model, options: Options) -> None:
        """Refuse what onnxruntime-genai cannot run.

        Raises:
            UnsupportedError: layers without attention, a family it has no type for, or a tokenizer
                it cannot read.
            UsageError: as ort's.
            MissingDependencyError: onnx, onnxruntime or onnxruntime-genai is not installed.
        """
        check_attention_only(model.config, "onnxruntime-genai")
        require()
        _model_type(model.config.family)
        options = _last_logits(options)
        super().check(model, options)
        files = tokenizer_files(model)
        files[CONFIG] = _pretty(genai_config(model, settings(model, options).context))
        check_same_ids(hf_tokenizer(model.files), files)

    def memory(self, model: Model, options: Options) -> int:
        """Bytes that `write` needs at its peak."""
        tokenizer = len(model.files.get("tokenizer.json", b""))
        return super().memory(model, _last_logits(options)) + 24 * tokenizer

    def sizes(self, model: Model, options: Options) -> Iterator[Size]:
        """Bits and bytes of each matrix in the data file."""
        return super().sizes(model, _last_logits(options))

    def write(
        self, model: Model, out: Path, options: Options, progress: Progress | None = None
    ) -> None:
        """Write the folder."""
        out.mkdir(exist_ok=True)
        options = _last_logits(options)
        files = tokenizer_files(model)
        files[CONFIG] = _pretty(genai_config(model, settings(model, options).context))
        for name, content in files.items():
            (out / name).write_bytes(content)
        super().write(model, out, options, progress)

    def open_runner(self, path: Path, *, threads: int | None = None) -> DecoderRunner:
        """Open the folder in onnxruntime-genai.

        Raises:
            FormatError: edgeq did not write it, or onnxruntime-genai refuses it.
        """
        return GenaiRunner(path, threads=threads)

    def tokenizer(self, path: Path, source: HfTokenizer) -> TargetTokenizer:
        """The folder's tokenizer in onnxruntime-genai."""
        return GenaiTokenizer(path, source)

    def read_constants(self, path: Path) -> Iterator[StoredConstant]:
        """Every constant of the graph, and the other files of the folder as bytes."""
        yield from super().read_constants(path)
        for name in (CONFIG, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            try:
                yield StoredConstant(name, np.frombuffer((path / name).read_bytes(), np.uint8))
            except OSError as err:
                raise FormatError(f"{path / name} cannot be read: {err.strerror or err}") from err

    def versions(self) -> dict[str, str]:
        """onnx, onnxruntime and onnxruntime-genai."""
        return {**super().versions(), "onnxruntime-genai": require().__version__}


def _model_type(name: str) -> str:
    """onnxruntime-genai's model type for a family.

    Raises:
        UnsupportedError: it has none.
    """
    family = FAMILIES.get(name)
    if family is None or family.genai is None:
        known = [known for known, family in FAMILIES.items() if family.genai]
        raise UnsupportedError(
            f"onnxruntime-genai has no model type for {name}; "
            f"it runs {', '.join(known)}; convert to ort instead"
        )
    return family.genai


def genai_config(model: Model, context: int) -> dict[str, Any]:
    """The content of genai_config.json; keys it does not know would make it unreadable.

    Args:
        model: the model.
        context: the longest sequence.
    """
    c = model.config
    generation = read_object(model.files, "generation_config.json")
    settings: dict[str, Any] = {
        "type": _model_type(c.family),
        "vocab_size": c.vocab,
        "context_length": context,
        "decoder": {
            "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
            "filename": "model.onnx",
            "head_size": round_up(c.head_dim, HEAD_STEP),
            "hidden_size": c.hidden,
            "num_attention_heads": c.heads,
            "num_hidden_layers": c.layers,
            "num_key_value_heads": c.kv_heads,
            "inputs": {
                "input_ids": "input_ids",
                "attention_mask": "attention_mask",
                "past_key_names": "past_key_values.%d.key",
                "past_value_names": "past_key_values.%d.value",
            },
            "outputs": {
                "logits": "logits",
                "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
            },
        },
    }
    if c.bos is not None:
        settings["bos_token_id"] = c.bos
    ends = model_ends(model)
    if ends:
        pad = generation.get("pad_token_id")
        settings["eos_token_id"] = list(ends)
        # without end tokens it would stop at the pad token: then it is given none
        settings["pad_token_id"] = pad if type(pad) is int and 0 <= pad < c.vocab else ends[0]
    # none and zero, which some files have for a filter that is off, are refused
    search = {key: generation[key] for key in _SEARCH if generation.get(key)}
    search |= {
        "max_length": context,
        "num_beams": 1,
        "num_return_sequences": 1,
        "past_present_share_buffer": True,
    }
    return {"model": settings, "search": search}


def tokenizer_files(model: Model) -> dict[str, bytes]:
    """The model's files as onnxruntime-genai reads them.

    Raises:
        UnsupportedError: there is no tokenizer.json, or it is of a kind it does not know.
        FormatError: a file is not JSON.
    """
    if "tokenizer.json" not in model.files:
        raise UnsupportedError(
            "the model has no tokenizer.json, which onnxruntime-genai needs; convert to ort instead"
        )
    settings = read_object(model.files, "tokenizer_config.json")
    settings["tokenizer_class"] = tokenizer_class(
        str(settings.get("tokenizer_class", "")), read_object(model.files, "tokenizer.json")
    )
    document = complete_document(model.files)
    settings |= special_tokens(model.files)
    templates = chat_templates(model.files)
    files = {"tokenizer.json": document}
    if "generation_config.json" in model.files:
        files["generation_config.json"] = model.files["generation_config.json"]
    if DEFAULT in templates:
        settings["chat_template"] = templates[DEFAULT]
        if CHAT_TEMPLATE in model.files:
            files[CHAT_TEMPLATE] = model.files[CHAT_TEMPLATE]
    files["tokenizer_config.json"] = _pretty(settings)
    if "special_tokens_map.json" in model.files:
        files["special_tokens_map.json"] = model.files["special_tokens_map.json"]
    else:
        special = {key: settings[key] for key in _SPECIAL if settings.get(key)}
        files["special_tokens_map.json"] = _pretty(special)
    return files


def tokenizer_class(named: str, document: Mapping[str, Any]) -> str:
    """A class that onnxruntime-genai knows; it fails on any other.

    Args:
        named: what the model's own tokenizer_config.json says.
        document: its tokenizer.json.

    Raises:
        UnsupportedError: a kind of tokenizer for which there is none.
    """
    kind = (document.get("model") or {}).get("type")
    plain = named.removesuffix("Fast")
    if kind == "Unigram" and plain in _UNIGRAM:
        return plain
    if kind != "BPE":
        raise UnsupportedError(
            f"the tokenizer is a {kind} model of class {named or 'unknown'}; onnxruntime-genai "
            f"reads BPE, and Unigram of {', '.join(_UNIGRAM)}; convert to ort instead"
        )
    if plain in _BPE:
        return plain
    by_bytes = '"ByteLevel"' in json.dumps(document.get("decoder"))
    return "GPT2Tokenizer" if by_bytes else "LlamaTokenizer"


class GenaiRunner:
    """A folder in onnxruntime-genai, which is given tokens and returns logits.

    Args:
        path: the folder.
        threads: onnxruntime's; all cores if None.

    Raises:
        FormatError: it is no folder of ours, or onnxruntime-genai refuses it.
    """

    def __init__(self, path: Path, *, threads: int | None = None) -> None:
        self._genai = require()
        metadata = {p.key: p.value for p in read_graph(path / "model.onnx").metadata_props}
        self.config: ModelConfig = config_of(path, metadata)
        self.context = int(metadata["edgeq.context"])
        self.precision: Precision = precision_of(metadata)
        self.runtime = f"onnxruntime-genai {self._genai.__version__}"
        try:
            config = self._genai.Config(str(path))
            if threads:
                options: dict[str, Any] = {"model": {"decoder": {"session_options": {}}}}
                options["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
                config.overlay(json.dumps(options))
            self._model = self._genai.Model(config)
        # its errors are RuntimeErrors without a class of their own
        except RuntimeError as err:
            raise FormatError(f"onnxruntime-genai cannot load {path}: {err}") from err
        self._generator: Any = None
        self.reset()

    def forward(self, tokens: Sequence[int] | NDArray[np.integer]) -> NDArray[np.float32]:
        """Logits of what follows the last token: float32 [1, V].

        Raises:
            UsageError: no tokens, one outside the vocabulary, or more than the context holds.
        """
        ids = checked_tokens(self.config, tokens)
        if len(self._fed) + ids.size > self.context:
            raise UsageError(
                f"more than the {self.context} tokens that this folder was converted for; "
                "convert again with a larger context"
            )
        self._make_room(len(self._fed) + ids.size)
        self._generator.append_tokens(ids.astype(np.int32))
        self._fed += ids.tolist()
        logits: NDArray[np.float32] = self._generator.get_logits()
        return logits.reshape(-1, self.config.vocab)[-1:]

    def reset(self) -> None:
        """Empty the cache."""
        self._fed: list[int] = []
        self._new_cache(ROOM)

    def _make_room(self, n: int) -> None:
        """Double a cache that is too short for n tokens, and feed it what it held."""
        if n <= self._room:
            return
        self._new_cache(max(n, 2 * self._room))
        if self._fed:
            self._generator.append_tokens(np.asarray(self._fed, np.int32))

    def _new_cache(self, room: int) -> None:
        # the old cache goes first, so that there are never two
        self._generator = self._parameters = None
        self._room = min(room, self.context)
        self._parameters = self._genai.GeneratorParams(self._model)
        self._parameters.set_search_options(max_length=self._room)
        self._generator = self._genai.Generator(self._model, self._parameters)

    def close(self) -> None:
        """Close the model and free its cache."""
        self._generator = self._parameters = self._model = None


def _last_logits(options: Options) -> Options:
    """The options for `ort`, which by default computes logits of all positions."""
    return replace(options, extra={"logits": "last", **options.extra})


def _pretty(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
