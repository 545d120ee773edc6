"""A model's tokenizer files as one `tokenizers.Tokenizer`, put together as Transformers does it.

Several files may add to tokenizer.json, and they contradict each other in published checkpoints:

- ``added_tokens_decoder`` in tokenizer_config.json adds tokens and replaces the flags (lstrip,
  rstrip, ...) of those that tokenizer.json holds. Where it is present, special_tokens_map.json and
  added_tokens.json are not read; where it is absent, both are, and special_tokens_map.json goes
  before tokenizer_config.json.
- Special tokens that are named (``eos_token`` and so on) but listed nowhere get the next free ids.
- ``add_prefix_space`` of tokenizer_config.json counts for the classes GPT2Tokenizer and
  Qwen2Tokenizer, and ``split_special_tokens`` for all.
- What is put before and after a text is decided by tokenizer.json's post-processor alone:
  ``add_bos_token`` and ``add_eos_token`` of tokenizer_config.json have no effect beside it.

Source: Transformers 5.24, tokenization_utils_base.py (_from_pretrained) and
tokenization_utils_tokenizers.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeq.core.errors import FormatError, UnsupportedError
from edgeq.importers.json_object import read_object

if TYPE_CHECKING:
    import tokenizers

CONFIG = "tokenizer_config.json"
SPECIAL = "special_tokens_map.json"
ADDED = "added_tokens.json"
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_CLASS_TOKENS: Mapping[str, Mapping[str, str]] = {
    "CodeLlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "GemmaTokenizer": {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"},
    "GPT2Tokenizer": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "Qwen2Tokenizer": {"eos_token": "<|endoftext|>"},
}
"""Special tokens that a tokenizer class assumes where no file names them, if they exist."""
_PREFIX_SPACE_CLASSES = ("GPT2Tokenizer", "Qwen2Tokenizer")
"""Classes that take ``add_prefix_space`` from tokenizer_config.json, false if it does not say."""


@dataclass(frozen=True)
class HfTokenizer:
    """A tokenizer put together from a model's files.

    Args:
        library: encodes texts; holds every added token.
        document: the content of tokenizer.json, with the settings of the other files in it.
        special: text of "bos_token", "eos_token" and so on.
        prefix: ids that the post-processor puts before a text.
        suffix: ids that it puts after a text.
        extended: whether files other than tokenizer.json changed what it says.
    """

    library: tokenizers.Tokenizer
    document: Mapping[str, Any]
    special: Mapping[str, str]
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    extended: bool

    def encode(self, text: str) -> list[int]:
        """Token ids of a text alone, nothing put before or after it."""
        ids: list[int] = self.library.encode(text, add_special_tokens=False).ids
        return ids

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text alone."""
        encodings = self.library.encode_batch(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]


def hf_tokenizer(files: Mapping[str, bytes]) -> HfTokenizer:
    """Put a tokenizer together.

    Args:
        files: the model's files; ``tokenizer.json`` must be among them.

    Raises:
        UnsupportedError: there is no tokenizer.json.
        FormatError: a file is damaged, or an added token cannot have the id it is given.
    """
    if "tokenizer.json" not in files:
        present = ", ".join(sorted(files)) or "no tokenizer file that edgeq reads"
        raise UnsupportedError(
            f"the model has no tokenizer.json (it has {present}); put one beside the checkpoint "
            "and import it again (Transformers writes it from other files, such as vocab.json with "
            "merges.txt, by AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)), or work with "
            "token ids"
        )
    import tokenizers

    document = read_object(files, "tokenizer.json")
    config = read_object(files, CONFIG)
    settled = _without_dropout(_prefix_space(document, config) or document)
    try:
        raw = files["tokenizer.json"].decode() if settled is document else json.dumps(settled)
        library = tokenizers.Tokenizer.from_str(raw)
    except BaseException as err:  # the library raises bare Exception, and panics with another
        if isinstance(err, KeyboardInterrupt | SystemExit):
            raise
        raise FormatError(f"tokenizer.json is not readable: {err}") from err
    library.no_truncation()
    library.no_padding()
    library.encode_special_tokens = config.get("split_special_tokens") is True
    stated = {key for source in _special_sources(files) for key in source}
    special = {
        key: text
        for key, text in special_tokens(files).items()
        if key in stated or library.token_to_id(text) is not None  # no row of the model is its
    }
    before = _added(library)
    for place, fields in _listed(files):
        text = fields["content"]
        if not text:
            continue
        new = library.token_to_id(text) is None
        library.add_tokens([tokenizers.AddedToken(**fields)])
        assigned = library.token_to_id(text)
        if new and assigned != place:
            raise FormatError(
                f"the tokenizer's files give the added token {text!r} the id {place}, but the "
                f"next free id is {assigned}; the tokens between them are missing"
            )
    held = {token["content"] for token in _added(library).values()}
    for fields in _named(files, special):
        # a token that is in the vocabulary alone is not looked for in a text until it is added
        if fields["content"] not in held:
            library.add_tokens([tokenizers.AddedToken(**fields)])
            held.add(fields["content"])
    prefix, suffix = _frame(library)
    return HfTokenizer(
        library,
        settled,
        special,
        prefix,
        suffix,
        extended=settled is not document or _added(library) != before,
    )


def _short_texts(library: tokenizers.Tokenizer) -> Iterator[str]:
    """Texts to try, of which one has tokens; most vocabularies, slow to sort, have the first."""
    yield from ("a", "1", ".")
    yield from sorted(library.get_vocab(with_added_tokens=False))[:256]


def _frame(library: tokenizers.Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the post-processor puts before and after a text that has tokens of its own."""
    for text in _short_texts(library):
        encoded = library.encode(text, add_special_tokens=True)
        own = [i for i, added in enumerate(encoded.special_tokens_mask) if not added]
        if own:
            return tuple(encoded.ids[: own[0]]), tuple(encoded.ids[own[-1] + 1 :])
    return tuple(library.encode("", add_special_tokens=True).ids), ()


def complete_document(files: Mapping[str, bytes]) -> bytes:
    """A tokenizer.json with the content of all of a model's tokenizer files.

    These are the file's own bytes if no other file changes what it says.

    Raises:
        UnsupportedError: there is no tokenizer.json.
        FormatError: a file is damaged.
    """
    tokenizer = hf_tokenizer(files)
    if not tokenizer.extended:
        return files["tokenizer.json"]
    text: str = tokenizer.library.to_str()
    return text.encode()


def special_tokens(files: Mapping[str, bytes]) -> dict[str, str]:
    """The text of ``bos_token``, ``eos_token`` and so on, as Transformers finds it.

    Raises:
        FormatError: a file is damaged.
    """
    config = read_object(files, CONFIG)
    kind = config.get("tokenizer_class")
    named = dict(_CLASS_TOKENS.get(kind.removesuffix("Fast"), {}) if isinstance(kind, str) else {})
    for source in _special_sources(files):
        for key, value in source.items():
            if not key.endswith("_token"):
                continue
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                named[key] = text
            elif value is None:
                named.pop(key, None)
    return named


def added_tokens(tokenizer: HfTokenizer) -> dict[int, dict[str, Any]]:
    """Id -> content and flags of every added token, by rising id."""
    return _added(tokenizer.library)


def end_ids(files: Mapping[str, bytes], tokenizer: HfTokenizer) -> tuple[int, ...]:
    """Ids that end a generation: those of generation_config.json, and the tokenizer's EOS.

    Raises:
        FormatError: generation_config.json holds something else than ids.
    """
    listed = read_object(files, "generation_config.json").get("eos_token_id")
    ids = listed if isinstance(listed, list) else [] if listed is None else [listed]
    if any(type(i) is not int or i < 0 for i in ids):
        raise FormatError(f"generation_config.json: eos_token_id is {listed!r}; expected token ids")
    eos = tokenizer.special.get("eos_token")
    own = None if eos is None else tokenizer.library.token_to_id(eos)
    return tuple(dict.fromkeys(i for i in (*ids, own) if i is not None))


def _added(library: tokenizers.Tokenizer) -> dict[int, dict[str, Any]]:
    return {
        i: {"content": token.content} | {flag: getattr(token, flag) for flag in _FLAGS}
        for i, token in sorted(library.get_added_tokens_decoder().items())
    }


def _without_dropout(document: Mapping[str, Any]) -> Mapping[str, Any]:
    """The document with merges that are always carried out; itself if it has no others.

    BPE-dropout leaves out merges by chance, as regularization while a model is trained; a prompt
    is cut without it. Source: Provilkov et al. 2020, "BPE-Dropout" (arXiv:1910.13267), section 3.
    """
    model = document.get("model")
    if not isinstance(model, dict) or not model.get("dropout"):
        return document
    return {**document, "model": {**model, "dropout": None}}


def _prefix_space(document: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The document with ``add_prefix_space`` as tokenizer_config.json has it; None if it has it so.

    Transformers asks the configuration for the classes that build their own byte-level cutting.
    That of GPT2Tokenizer is one step; where a file has several, they stay as the file says.
    """
    kind = config.get("tokenizer_class")
    if not isinstance(kind, str) or kind.removesuffix("Fast") not in _PREFIX_SPACE_CLASSES:
        return None
    one_step = kind.removesuffix("Fast") == "GPT2Tokenizer"
    wanted = config.get("add_prefix_space") is True
    changed = False

    def visit(step: Any) -> Any:
        nonlocal changed
        if not isinstance(step, dict):
            return step
        if isinstance(step.get("pretokenizers"), list) and not one_step:
            return step | {"pretokenizers": [visit(inner) for inner in step["pretokenizers"]]}
        if step.get("type") == "ByteLevel" and step.get("add_prefix_space", True) != wanted:
            changed = True
            return step | {"add_prefix_space": wanted}
        return step

    copy = dict(document) | {"pre_tokenizer": visit(document.get("pre_tokenizer"))}
    return copy if changed else None


def _listed(files: Mapping[str, bytes]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Added tokens that are listed with their ids beside tokenizer.json, lowest first."""
    config = read_object(files, CONFIG)
    if "added_tokens_decoder" not in config:
        yield from _legacy(files)
        return
    listed = config["added_tokens_decoder"]
    try:
        tokens = {int(i): _fields(entry) for i, entry in listed.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as err:
        raise FormatError(f"{CONFIG}: added_tokens_decoder is not readable") from err
    yield from sorted(tokens.items(), key=lambda item: item[0])


def _legacy(files: Mapping[str, bytes]) -> Iterator[tuple[int, dict[str, Any]]]:
    """added_tokens.json: text -> id; tokens that tokenizer.json holds keep their flags."""
    listed = read_object(files, ADDED)
    if not all(type(i) is int for i in listed.values()):
        raise FormatError(f"{ADDED} must map the text of each token to its id")
    document = read_object(files, "tokenizer.json")
    known = {entry.get("content") for entry in document.get("added_tokens") or ()}
    named = {*special_tokens(files).values(), *(t["content"] for t in _extra(files))}
    for text, i in sorted(listed.items(), key=lambda item: item[1]):
        if text not in known:
            special = text in named
            yield i, {"content": text, "normalized": not special, "special": special}


def _named(files: Mapping[str, bytes], special: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Special tokens that have a name, and further ones, with the flags they are given."""
    sources = _special_sources(files)
    for key, text in special.items():
        fields: dict[str, Any] = {"content": text, "special": True}
        for source in sources:
            entry = source.get(key)
            if isinstance(entry, dict) and entry.get("content") == text:
                fields = _special_fields(entry)
        yield fields
    yield from _extra(files)


def _extra(files: Mapping[str, bytes]) -> Iterator[dict[str, Any]]:
    """Special tokens without a name."""
    for source in _special_sources(files):
        for key in ("additional_special_tokens", "extra_special_tokens"):
            listed = source.get(key) or ()
            for entry in listed.values() if isinstance(listed, dict) else listed:
                if isinstance(entry, str):
                    yield {"content": entry, "special": True}
                elif isinstance(entry, dict):
                    yield _special_fields(entry)


def _special_sources(files: Mapping[str, bytes]) -> list[dict[str, Any]]:
    """The files that name special tokens; the last one decides."""
    config = read_object(files, CONFIG)
    if "added_tokens_decoder" in config:
        return [config]
    return [config, read_object(files, SPECIAL)]


def _special_fields(entry: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return _fields({**entry, "special": True})
    except (KeyError, TypeError) as err:
        raise FormatError(f"the special token {dict(entry)!r:.80} is not readable") from err


def _fields(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The text and flags of an added token, each checked."""
    fields = {key: entry[key] for key in _FLAGS if key in entry}
    if not isinstance(entry["content"], str) or not all(type(v) is bool for v in fields.values()):
        raise TypeError("an added token has a text and flags that are true or false")
    return {"content": entry["content"], **fields}
