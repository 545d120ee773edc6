"""What a plan needs to know of a model, from headers alone: shapes, types and bytes.

No weight is read, so that a model far larger than this machine's memory can be planned for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from edgeq.formats.kept import KeptTensor, packed_nbytes, stored_type
from edgeq.formats.schemes import FLOAT_TAGS, Scheme
from edgeq.formats.tensor import FloatTensor, QuantTensor, Tensor
from edgeq.importers import describe
from edgeq.model.artifact_layout import TensorLayout
from edgeq.model.config import ModelConfig
from edgeq.model.model import Model
from edgeq.model.mtp import PREFIX
from edgeq.quant.rules import STAY_FLOAT

if TYPE_CHECKING:
    from edgeq.quant.recipe import Recipe

EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class TensorFacts:
    """One tensor.

    Args:
        shape: (N, K) or (n,).
        scheme: how it is stored: a scheme's text form, a float type, or another format's name.
        nbytes: bytes where it is held.
        run_bytes: bytes in the engine, which turns what it cannot compute with (another format's
            quantized tensors, rows in another order) to float32.
    """

    shape: tuple[int, ...]
    scheme: str
    nbytes: int
    run_bytes: int


@dataclass(frozen=True)
class ModelFacts:
    """A model without its weights.

    Args:
        name: what to call it.
        config: hyperparameters.
        tensors: name -> facts.
    """

    name: str
    config: ModelConfig
    tensors: Mapping[str, TensorFacts]

    @property
    def n_params(self) -> int:
        """Weights of all tensors."""
        return sum(math.prod(t.shape) for t in self.tensors.values())

    @property
    def weights_bytes(self) -> int:
        """Bytes of all tensors as the engine holds them, but for `table_bytes`."""
        return sum(t.run_bytes for t in self.tensors.values()) - self.table_bytes

    @property
    def table_bytes(self) -> int:
        """Bytes of the tables that stay in the model's file, of which only the rows of the tokens
        at hand are read."""
        tables = (self.tensors[name] for name in self.config.tables)
        return sum(t.run_bytes for t in tables if t.run_bytes == t.nbytes)

    @property
    def decoded(self) -> int:
        """How many tensors the engine turns to float32."""
        return sum(t.run_bytes != t.nbytes for t in self.tensors.values())

    @property
    def read_bytes(self) -> int:
        """Bytes of weights that one generated token reads: all, but of an embedding that is not
        the head too only one row, and of experts only the chosen ones."""
        return self.bytes_read_by(1)

    def bytes_read_by(self, tokens: int) -> int:
        """Bytes of weights that a pass over some tokens reads, if they choose other experts each.

        At most all weights: a prompt reads each once.
        """
        table = self.tensors[EMBEDDING].run_bytes
        read = table if self.config.tied else table // self.config.vocab
        share = self.config.tokens_share
        layers = sum(
            t.run_bytes * min(Fraction(1), tokens * share(name))
            for name, t in self.tensors.items()
            if not name.startswith(PREFIX)  # whose drafts are no part of a token's time
        )
        return int(layers) - table + read

    @property
    def token_products(self) -> int:
        """Multiplications of weights that one token of a prompt takes, the head left out."""
        config = self.config
        products = sum(
            n * k * config.tokens_share(name)
            for name, (n, k) in config.linears()
            if name not in (EMBEDDING, "lm_head.weight", *config.tables)
        )
        return int(products)

    @property
    def integer(self) -> bool:
        """Whether the layers' matrices are quantized, so that prompts are read in integers."""
        floats = tuple(FLOAT_TAGS.values())
        inner = [
            t
            for name, t in self.tensors.items()
            # routers and the gates of heads are small, and stay floating point
            if ".layers." in name and len(t.shape) == 2 and not re.search(STAY_FLOAT, name)
        ]
        return all(t.scheme not in floats and t.run_bytes == t.nbytes for t in inner)

    @property
    def scheme(self) -> str:
        """How most weights are held."""
        weights: dict[str, int] = {}
        for tensor in self.tensors.values():
            weights[tensor.scheme] = weights.get(tensor.scheme, 0) + math.prod(tensor.shape)
        return max(weights, key=lambda scheme: weights[scheme])

    def at_bits(self, bits: int) -> ModelFacts:
        """The model as `edgeq quantize --bits` would hold it.

        Raises:
            SchemeError: bits is not possible.
        """
        from edgeq.quant.recipe import Recipe  # a model as it is held needs no recipe

        return self.quantized(Recipe.from_options(bits=bits))

    def quantized(self, recipe: Recipe) -> ModelFacts:
        """The model as a recipe would hold it."""
        tensors = {
            name: scheme_facts(recipe.scheme_for(name, tensor.shape), tensor.shape)
            for name, tensor in self.tensors.items()
        }
        return ModelFacts(self.name, self.config, tensors)


def scheme_facts(scheme: Scheme, shape: tuple[int, ...]) -> TensorFacts:
    """A tensor of this shape in one of edgeq's schemes."""
    nbytes = TensorLayout(scheme, shape).nbytes
    return TensorFacts(shape, str(scheme), nbytes, nbytes)


def facts(path: str | Path) -> ModelFacts:
    """Read a model's headers: a Hugging Face folder, a GGUF file, an .edgeq file or a llama2.c
    checkpoint.

    Raises:
        FormatError: there is no such file, or it is damaged.
        UnsupportedError: a family, type or option edgeq does not know.
    """
    path = Path(path)
    return facts_of(describe(path), path.resolve().name)


def facts_of(model: Model, name: str) -> ModelFacts:
    """The facts of an open model; its weights are not read."""
    return ModelFacts(name, model.config, {n: _tensor(t) for n, t in model.tensors.items()})


def _tensor(tensor: Tensor) -> TensorFacts:
    shape = tuple(int(n) for n in tensor.shape)
    run_bytes = nbytes = int(tensor.nbytes)
    if isinstance(tensor, KeptTensor):
        run_bytes = packed_nbytes(tensor)
    elif not isinstance(tensor, QuantTensor | FloatTensor):
        run_bytes = 4 * math.prod(shape)
    return TensorFacts(shape, stored_type(tensor), nbytes, run_bytes)
