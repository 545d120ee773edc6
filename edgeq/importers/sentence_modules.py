"""What Sentence Transformers makes of a text and of its hidden states, as a model's files say.

``modules.json`` lists what a text goes through: a transformer, a pooling of its tokens' states,
dense layers, a normalization. Each module has a folder with its settings. Texts may begin with a
prompt, of ``config_sentence_transformers.json``. What a file says and edgeq does not compute is
refused by its name, in place of another vector.

Source: sentence_transformers 6.2, sentence_transformer/modules/pooling.py, base/modules/dense.py,
normalize.py and transformer.py.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import FormatError, UnsupportedError
from edgeq.formats.safetensors_file import SafetensorsFile
from edgeq.importers.json_object import read_object
from edgeq.importers.unread import shown

Pooling = Literal["last", "mean", "cls"]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)
"""The last token's hidden state, the mean of all tokens', or the first token's."""
MODULES, PROMPTS = "modules.json", "config_sentence_transformers.json"
TRANSFORMER, POOLING = "sentence_bert_config.json", "1_Pooling/config.json"

_MODES: dict[str, Pooling] = {"lasttoken": "last", "mean": "mean", "cls": "cls"}
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""What the flags of older files are called in newer ones."""
_GGUF = {1: "mean", 2: "cls", 3: "lasttoken"}
_ORDER = ("Transformer", "Pooling", "Dense", "Normalize")
_ACTIVATIONS: dict[str, Literal["identity", "tanh"]] = {
    "torch.nn.modules.linear.Identity": "identity",
    "torch.nn.modules.activation.Tanh": "tanh",
}
_DENSE_KEYS = {
    "in_features", "out_features", "bias", "activation_function", "module_input_name",
    "module_output_name", "use_residual",
}  # fmt: skip
_STATES = {"token_embeddings"}
_VECTOR = {"sentence_embedding"}
_FOLDER = re.compile(r"[\w.-]+")


@dataclass(frozen=True, eq=False)
class Dense:
    """A dense layer after pooling.

    Args:
        weight: float32 [out, in].
        bias: float32 [out], or None.
        activation: what the result goes through.
    """

    weight: NDArray[np.float32]
    bias: NDArray[np.float32] | None
    activation: Literal["identity", "tanh"]

    def __call__(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """The layer's result [out] for a vector [in]."""
        out: NDArray[np.float64] = self.weight.astype(np.float64) @ x
        if self.bias is not None:
            out = out + self.bias
        return np.tanh(out) if self.activation == "tanh" else out


@dataclass(frozen=True)
class SentenceModules:
    """What follows a transformer, and what goes before a text.

    Args:
        pooling: how the tokens' states become one vector, or None if no file says.
        include_prompt: whether the tokens of a prompt are pooled too.
        dense: layers after pooling, the first one first.
        normalized: whether the last module makes the vector's length one.
        prompts: texts that are put before a text, by their names.
        default_prompt: the name of the prompt of a text for which none is chosen, or None.
        lower: whether texts are put in lower case.
        max_tokens: the longest text, with its special tokens, or None for the model's context.
    """

    pooling: Pooling | None = None
    include_prompt: bool = True
    dense: tuple[Dense, ...] = ()
    normalized: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    lower: bool = False
    max_tokens: int | None = None

    @property
    def width(self) -> int | None:
        """Numbers of a vector; None where they are the transformer's."""
        return self.dense[-1].weight.shape[0] if self.dense else None


def sentence_modules(files: Mapping[str, bytes]) -> SentenceModules:
    """What a model's files say.

    Args:
        files: of a model.

    Raises:
        UnsupportedError: a module, pooling or setting that edgeq does not compute.
        FormatError: a file is damaged.

    Example:
        >>> sentence_modules({"1_Pooling/config.json": b'{"pooling_mode": "mean"}'}).pooling
        'mean'
    """
    listed = _listed(files)
    folders: dict[str, list[str]] = {kind: [] for kind in _ORDER}
    for kind, folder in listed:
        folders[kind].append(folder)
    pooling_file = f"{folders['Pooling'][0]}/config.json" if folders["Pooling"] else POOLING
    pooling, include = _pooling(files, pooling_file)
    dense = tuple(_dense(files, folder) for folder in folders["Dense"])
    for before, after in itertools.pairwise(dense):
        if before.weight.shape[0] != after.weight.shape[1]:
            raise FormatError(
                f"a dense module gives {before.weight.shape[0]} numbers and the next one takes "
                f"{after.weight.shape[1]}; fetch the model again"
            )
    for folder in folders["Normalize"]:
        _check_ends(f"{folder}/config.json", read_object(files, f"{folder}/config.json"))
    prompts, default = _prompts(files)
    lower, longest = _transformer(files)
    return SentenceModules(
        pooling, include, dense, bool(folders["Normalize"]), prompts, default, lower, longest
    )


def module_files(folder: Path) -> dict[str, bytes]:
    """The files of a checkpoint's folder that `sentence_modules` reads.

    Raises:
        FormatError: the list of modules is damaged.
    """
    wanted = [MODULES, PROMPTS, TRANSFORMER, POOLING]
    if (folder / MODULES).is_file():
        for kind, inside in _listed({MODULES: (folder / MODULES).read_bytes()}, known=False):
            if inside:
                wanted.append(f"{inside}/config.json")
                wanted += [f"{inside}/model.safetensors"] if kind == "Dense" else []
    return {name: (folder / name).read_bytes() for name in wanted if (folder / name).is_file()}


def pooling_of_gguf(pooling_type: object) -> dict[str, bytes]:
    """The file that says the same as a GGUF file's ``pooling_type``; none if that says nothing."""
    mode = _GGUF.get(pooling_type) if isinstance(pooling_type, int) else None
    return {POOLING: json.dumps({"pooling_mode": mode}).encode()} if mode else {}


def gguf_pooling_type(files: Mapping[str, bytes]) -> int | None:
    """The ``pooling_type`` of a GGUF file for what a model's files say; None if they say nothing.

    Raises:
        UnsupportedError, FormatError: as `sentence_modules`.

    Example:
        >>> gguf_pooling_type({"1_Pooling/config.json": b'{"pooling_mode": "lasttoken"}'})
        3
    """
    pooling = sentence_modules(files).pooling
    return next((kind for kind, mode in _GGUF.items() if _MODES[mode] == pooling), None)


def _listed(files: Mapping[str, bytes], known: bool = True) -> list[tuple[str, str]]:
    """Kind and folder of each module.

    Raises:
        FormatError: the list is damaged.
        UnsupportedError: a module that edgeq does not know, or in another order, if ``known``.
    """
    if MODULES not in files:
        return []
    try:
        listed = json.loads(files[MODULES])
        modules = [(str(one["type"]).rpartition(".")[2], str(one["path"])) for one in listed]
    except (ValueError, RecursionError, TypeError, KeyError) as err:
        raise FormatError(f"{MODULES} is not a list of modules with a type and a path") from err
    for kind, folder in modules:
        if folder and not (_FOLDER.fullmatch(folder) and folder.strip(".")):
            raise FormatError(
                f"{MODULES}: the path of a module is {folder!r}; give a folder's name"
            )
        if known and kind not in _ORDER:
            raise UnsupportedError(
                f"embeddings of this model go through a module {kind}, which edgeq does not run; "
                f"it runs {', '.join(_ORDER)}"
            )
    kinds = [kind for kind, _ in modules]
    places = [_ORDER.index(kind) for kind in kinds if kind in _ORDER]
    alone = all(kinds.count(kind) <= 1 for kind in _ORDER if kind != "Dense")
    if known and (places != sorted(places) or not alone or kinds[:2] != list(_ORDER[:2])):
        raise UnsupportedError(
            f"embeddings of this model go through {', '.join(kinds) or 'no modules'}; edgeq runs "
            "Transformer, Pooling, any number of Dense, and Normalize, in this order"
        )
    return modules


def _pooling(files: Mapping[str, bytes], name: str) -> tuple[Pooling | None, bool]:
    """How states are pooled, and whether a prompt's are."""
    if name not in files:
        return None, True
    config = read_object(files, name)
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [mode for flag, mode in _FLAGS.items() if config.get(flag) is True] or ["mean"]
    modes = [modes] if isinstance(modes, str) else modes
    if not isinstance(modes, list) or len(modes) != 1 or modes[0] not in _MODES:
        said = ", ".join(map(str, modes)) if isinstance(modes, list) else shown(modes)
        raise UnsupportedError(
            f"{name}: this model's embeddings are pooled by {said}; edgeq knows "
            f"{', '.join(_MODES)}; choose one of {', '.join(POOLINGS)} to pool otherwise"
        )
    _check_known(name, config, {"pooling_mode", "include_prompt", "word_embedding_dimension",
                                "embedding_dimension", *_FLAGS})  # fmt: skip
    include = config.get("include_prompt", True)
    if not isinstance(include, bool):
        raise FormatError(f"{name}: include_prompt is {shown(include)}; it must be true or false")
    return _MODES[modes[0]], include


def _dense(files: Mapping[str, bytes], folder: str) -> Dense:
    """A dense module from its settings and weights."""
    name, weights = f"{folder}/config.json", f"{folder}/model.safetensors"
    config = read_object(files, name)
    _check_known(name, config, _DENSE_KEYS)
    _check_ends(name, config)
    if config.get("use_residual"):
        raise UnsupportedError(f"{name}: use_residual is true, which edgeq does not compute")
    activation = config.get("activation_function", "torch.nn.modules.activation.Tanh")
    if activation not in _ACTIVATIONS:
        raise UnsupportedError(
            f"{name}: activation_function is {shown(activation)}, which edgeq does not compute; it "
            f"computes {', '.join(_ACTIVATIONS)}"
        )
    if weights not in files:
        raise FormatError(f"{weights} is missing; fetch the model again, with its folders")
    file = SafetensorsFile(weights, files[weights])
    shape = (config.get("out_features"), config.get("in_features"))
    wanted: dict[str, tuple[Any, ...]] = {"linear.weight": shape}
    if config.get("bias", True):
        wanted["linear.bias"] = shape[:1]
    found = {key: entry.shape for key, entry in file.tensors.items()}
    if found != wanted:
        raise FormatError(f"{weights} holds {found}; {name} asks for {wanted}")
    bias = file.tensor("linear.bias").numpy() if "linear.bias" in wanted else None
    return Dense(file.tensor("linear.weight").numpy(), bias, _ACTIVATIONS[activation])


def _check_ends(name: str, config: Mapping[str, Any]) -> None:
    """Refuse a module that reads or writes anything but the vector of the text."""
    for key in ("module_input_name", "module_output_name"):
        if config.get(key) is not None and config[key] not in _VECTOR:
            raise UnsupportedError(
                f"{name}: {key} is {shown(config[key])}; edgeq runs modules on sentence_embedding"
            )


def _check_known(name: str, config: Mapping[str, Any], known: set[str]) -> None:
    for key, value in config.items():
        if key not in known and value not in (None, False):
            raise UnsupportedError(
                f"{name}: {key} is {shown(value)}, a setting that edgeq does not know"
            )


def _prompts(files: Mapping[str, bytes]) -> tuple[dict[str, str], str | None]:
    config = read_object(files, PROMPTS)
    prompts = config.get("prompts") or {}
    good = isinstance(prompts, dict) and all(
        isinstance(text, str | None) for text in prompts.values()
    )
    if not good:
        raise FormatError(f"{PROMPTS}: prompts is {shown(prompts)}; it must map names to texts")
    texts = {name: text for name, text in prompts.items() if text is not None}
    default = config.get("default_prompt_name")
    if default is not None and default not in texts:
        raise FormatError(
            f"{PROMPTS}: default_prompt_name is {shown(default)}, which is none of the prompts "
            f"{', '.join(texts) or '(there are none)'}"
        )
    return texts, default


def _transformer(files: Mapping[str, bytes]) -> tuple[bool, int | None]:
    """Whether texts are put in lower case, and the most tokens."""
    config = read_object(files, TRANSFORMER)
    _check_known(
        TRANSFORMER,
        {key: value for key, value in config.items() if value != {}},
        {"max_seq_length", "do_lower_case", "transformer_task", "modality_config",
         "module_output_name", "unpad_inputs"},
    )  # fmt: skip
    task = config.get("transformer_task", "feature-extraction")
    output = config.get("module_output_name", "token_embeddings")
    if task != "feature-extraction" or output not in _STATES:
        raise UnsupportedError(
            f"{TRANSFORMER}: transformer_task is {shown(task)} with the output {shown(output)}; "
            "edgeq computes the token_embeddings of feature-extraction"
        )
    longest = config.get("max_seq_length")
    if longest is not None and (type(longest) is not int or longest < 1):
        raise FormatError(f"{TRANSFORMER}: max_seq_length is {shown(longest)}; expected tokens")
    return config.get("do_lower_case") is True, longest
