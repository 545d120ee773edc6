"""The float decoder, one site at a time, over many windows of tokens.

A *site* is a place where activations meet weights: the matrices there are multiplied with one and
the same input. A layer has four, the model one more:

    attn_in   q, k, v    norm of x                       [T, hidden]
    attn_out  o          values mixed by attention       [T, H*D]
    mlp_in    gate, up   norm of x                       [T, hidden]
    mlp_out   down       activation(gate) * up           [T, ffn]
    head      head       last norm of x                  [T, hidden]

All windows pass a site before any goes on to the next, so the weights of one layer at most are
held, and whoever looks at a site's inputs may put other weights in its place: all that comes after
is computed with those. The formulas are `edgeq.model.reference`'s.

Memory in bytes, with n tokens in all windows, and twice that of the first two with `float_inputs`:

    n * hidden * 4                       hidden states
    n * max(H*D, ffn) * 4                inputs of o or down, kept while they are at most
                                         `KEEP_BYTES`, else computed anew each time they are asked
    (q+k+v | o | gate+up | down) * 4     the site's weights as float32, and those of the site
                                         before it where its inputs are computed anew
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import UsageError
from edgeq.core.progress import Progress
from edgeq.formats.safetensors_file import release
from edgeq.formats.tensor import Tensor
from edgeq.model.config import ModelConfig
from edgeq.model.decoder import (
    attention_in,
    attention_mix,
    attention_out,
    feed_forward_act,
    feed_forward_in,
    feed_forward_out,
    head_in,
)
from edgeq.model.formulas import Array, Linear, dense
from edgeq.model.model import Model
from edgeq.model.reference import Reference, checked_tokens

Kind = Literal["attn_in", "attn_out", "mlp_in", "mlp_out", "head"]

KEEP_BYTES = 512 << 20
"""Inputs of one site that are kept rather than computed anew."""


@dataclass(frozen=True)
class Site:
    """Where one input meets one or several matrices.

    Args:
        layer: of the model; their number for the head.
        kind: which of the layer's sites.
        linears: names of the matrices.
    """

    layer: int
    kind: Kind
    linears: tuple[str, ...]

    def __str__(self) -> str:
        return self.kind if self.kind == "head" else f"layer {self.layer} {self.kind}"


def sites(config: ModelConfig) -> tuple[Site, ...]:
    """Every site of a model, in the order they are computed."""
    found = []
    for layer in range(config.layers):
        attention, mlp = f"model.layers.{layer}.self_attn.", f"model.layers.{layer}.mlp."
        found += [
            Site(layer, "attn_in", tuple(f"{attention}{m}_proj.weight" for m in "qkv")),
            Site(layer, "attn_out", (attention + "o_proj.weight",)),
            Site(layer, "mlp_in", (mlp + "gate_proj.weight", mlp + "up_proj.weight")),
            Site(layer, "mlp_out", (mlp + "down_proj.weight",)),
        ]
    return (*found, Site(config.layers, "head", (config.head_name,)))


@dataclass(frozen=True)
class WalkState:
    """A walk between two layers, from which it can be taken up again.

    Args:
        layer: the next one.
        hidden: its x, float32 [T, hidden] for each window.
        float_hidden: the same in the unreplaced model, if that is computed too.
    """

    layer: int
    hidden: tuple[Array, ...]
    float_hidden: tuple[Array, ...] | None = None


class Walk:
    """A model's decoder over windows of tokens, site by site.

    Iterating gives the stages in the order of `sites(model.config)`, once. A stage is over when
    the next one is asked for.

    Args:
        model: float or quantized.
        windows: int64 [T] each, BOS included; each is a context of its own.
        float_inputs: compute the unreplaced model beside, for `Stage.float_inputs`: twice the
            work and memory.
        replaced: weights in place from the beginning. A tied head must come here if it is to be
            the embedding too, for which `Stage.replace` is too late.
        linear: given the walk's own product, makes the one to compute with, as to round inputs;
            not that of the unreplaced model.
        state: where another walk over the same model and windows was; goes on from there.
        progress: called with the site, sites done, and of how many.

    Attributes:
        n_tokens: in all windows.

    Raises:
        UsageError: no windows, an empty one, one longer than the model's context, or a token
            outside the vocabulary.
    """

    def __init__(
        self,
        model: Model,
        windows: Sequence[NDArray[np.int64]],
        *,
        float_inputs: bool = False,
        replaced: Mapping[str, Tensor] | None = None,
        linear: Callable[[Linear], Linear] | None = None,
        state: WalkState | None = None,
        progress: Progress | None = None,
    ) -> None:
        config = model.config
        if not len(windows):
            raise UsageError("there are no windows to walk over; give at least one")
        ids = [checked_tokens(config, window) for window in windows]
        longest = max(window.size for window in ids)
        if longest > config.context:
            raise UsageError(
                f"a window has {longest} tokens and the model supports {config.context}; "
                "cut the text into shorter ones"
            )
        self.n_tokens = sum(window.size for window in ids)
        placed = dict(replaced or {})
        self._sites = sites(config)
        self._main = _Stream(model, ids, placed, state.hidden if state else None, linear)
        self._float = None
        if float_inputs:
            self._float = _Stream(model, ids, {}, state.float_hidden if state else None)
        self._first = state.layer if state else 0
        self._progress = progress
        self._at: Site | None = None
        self._done = False

    def __iter__(self) -> Iterator[Stage]:
        """The stages, each valid until the next is asked for.

        Raises:
            UsageError: the walk was begun before; a second one needs a `Walk` of its own.
        """
        if self._at is not None:
            raise UsageError("a walk goes one way, once; make another Walk")
        streams = [stream for stream in (self._main, self._float) if stream]
        for number, site in enumerate(self._sites):
            if site.layer < self._first:
                continue
            if self._progress:
                self._progress(str(site), number, len(self._sites))
            self._at = site
            for stream in streams:
                stream.begin(site)
            yield Stage(self, site)
            if site.kind != "head":
                for stream in streams:
                    stream.finish(site)
        self._done = True
        if self._progress:
            self._progress("logits", len(self._sites), len(self._sites))

    def state(self) -> WalkState:
        """Where the walk is, to be taken up later: at a layer's first stage, or the head's.

        Raises:
            UsageError: it is in the middle of a layer.
        """
        if self._at is None or self._at.kind not in ("attn_in", "head"):
            where = "not begun" if self._at is None else f"at {self._at}"
            raise UsageError(f"the walk is {where}; its state is whole at attn_in and the head")
        beside = tuple(self._float.hidden) if self._float else None
        return WalkState(self._at.layer, tuple(self._main.hidden), beside)

    def logits(self, every: int = 1) -> Iterator[Array]:
        """Logits of each window, float32 [T, V], computed with the weights in place.

        Args:
            every: of one position in so many.

        Raises:
            UsageError: stages are left.
        """
        if not self._done:
            raise UsageError("logits come after the last stage; go through the walk first")
        for window in range(len(self._main.hidden)):
            yield self._main.logits(window, every)


class Stage:
    """One site of a walk, all windows.

    Attributes:
        site: where it is.
        weights: its matrices by name, float32 [N, K]: the ones computed with, so a replaced one
            is seen as it was replaced. Turned to float32 when first asked for, and then held
            until the site is passed.
    """

    def __init__(self, walk: Walk, site: Site) -> None:
        self._walk = walk
        self.site = site
        self.weights: Mapping[str, Array] = _Weights(self)

    def inputs(self) -> Iterator[Array]:
        """What the matrices are multiplied with, float32 [T, K], window by window.

        Computed with the weights in place so far; may be gone through several times.
        """
        return self._inputs(self._walk._main)

    def float_inputs(self) -> Iterator[Array]:
        """The same windows' inputs in the unreplaced model, float32 [T, K].

        Raises:
            UsageError: the walk was made without float_inputs.
        """
        if self._walk._float is None:
            raise UsageError("this walk has no float stream; make it with float_inputs=True")
        return self._inputs(self._walk._float)

    def drifts(self) -> Iterator[Array]:
        """How far x is from the unreplaced model's, float32 [T, hidden], window by window.

        Of the x that what comes of the site is added to, if it is the last of its branch.

        Raises:
            UsageError: the walk was made without float_inputs.
        """
        if self._walk._float is None:
            raise UsageError("this walk has no float stream; make it with float_inputs=True")
        streams = self._current(self._walk._float).hidden, self._walk._main.hidden
        for x_float, x in zip(*streams, strict=True):
            yield x_float - x

    def replace(self, name: str, w: Array) -> None:
        """Put another matrix in place: all later stages and logits are computed with it.

        Args:
            name: one of the site's.
            w: float32 [N, K]; kept until the site is passed, not copied.

        Raises:
            UsageError: not of this site, or of another shape.
        """
        stream = self._current(self._walk._main)
        self._check_name(name)
        shape = tuple(stream.reference.model.tensors[name].shape)
        if w.shape != shape:
            raise UsageError(f"{name} is {list(shape)}; it cannot be replaced by {list(w.shape)}")
        stream.weights[name] = w

    def _inputs(self, stream: _Stream) -> Iterator[Array]:
        for window in range(len(stream.hidden)):
            yield self._current(stream).input(self.site, window)

    def _current(self, stream: _Stream) -> _Stream:
        if self._walk._at is not self.site:
            raise UsageError(f"the stage {self.site} is over; its inputs and weights are gone")
        return stream

    def _weight(self, name: str) -> Array:
        self._check_name(name)
        return self._current(self._walk._main).weight(name)

    def _check_name(self, name: str) -> None:
        if name not in self.site.linears:
            raise UsageError(f"{name} is not at {self.site} ({', '.join(self.site.linears)})")


class _Weights(Mapping[str, Array]):
    """A stage's weights, turned to float32 when they are asked for."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def __getitem__(self, name: str) -> Array:
        if name not in self._stage.site.linears:
            raise KeyError(name)
        return self._stage._weight(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stage.site.linears)

    def __len__(self) -> int:
        return len(self._stage.site.linears)


class _Stream:
    """One model's hidden states and the weights of the site it is at.

    Args:
        model: whose decoder it is.
        windows: tokens.
        placed: tensors in place of the model's.
        hidden: x of each window where a walk goes on; the embeddings if None.
        linear: see `Walk`.
    """

    def __init__(
        self,
        model: Model,
        windows: Sequence[NDArray[np.int64]],
        placed: Mapping[str, Tensor],
        hidden: Sequence[Array] | None,
        linear: Callable[[Linear], Linear] | None = None,
    ) -> None:
        if placed:
            model = _with_tensors(model, placed)
        self.weights: dict[str, Array] = {}
        self.tokens = windows
        self.reference = Reference(model, linear=linear(self._product) if linear else self._product)
        self._head = model.config.head_name
        if hidden is None:
            hidden = [self._embedded(window) for window in windows]
            release(model.tensors["model.embed_tokens.weight"])
        self.hidden = list(hidden)
        self._kept: list[Array] | None = None

    def begin(self, site: Site) -> None:
        """Compute and keep the site's inputs, if they are more than a norm and not too large."""
        if site.kind not in ("attn_out", "mlp_out"):
            return
        width = self.reference.model.tensors[site.linears[0]].shape[1]
        if 4 * width * sum(x.shape[0] for x in self.hidden) <= KEEP_BYTES:
            self._kept = [self.input(site, window) for window in range(len(self.hidden))]
            self.weights.clear()

    def input(self, site: Site, window: int) -> Array:
        """What the site's matrices are multiplied with, float32 [T, K]."""
        if self._kept is not None:
            return self._kept[window]
        ref, x, layer = self.reference, self.hidden[window], site.layer
        config = ref.config
        if site.kind == "head":
            return head_in(ref, x)
        if site.kind == "attn_in":
            return attention_in(ref, config, layer, x)
        if site.kind == "attn_out":
            ref.begin(self.tokens[window])
            return attention_mix(ref, config, layer, attention_in(ref, config, layer, x))
        h = feed_forward_in(ref, config, layer, x)
        return h if site.kind == "mlp_in" else feed_forward_act(ref, config, layer, h)

    def finish(self, site: Site) -> None:
        """Add to the hidden states what the site's matrices give, if that is where it goes."""
        if site.kind not in ("attn_out", "mlp_out"):
            return
        ref = self.reference
        out = attention_out if site.kind == "attn_out" else feed_forward_out
        for window, x in enumerate(self.hidden):
            self.hidden[window] = x + out(ref, ref.config, site.layer, self.input(site, window))
        self._kept = None
        self.weights.clear()

    def logits(self, window: int, every: int = 1) -> Array:
        ref = self.reference
        return ref.linear("logits", head_in(ref, self.hidden[window][::every]), self._head)

    def _embedded(self, window: NDArray[np.int64]) -> Array:
        self.reference.begin(window)
        return self.reference.embed("embed")

    def weight(self, name: str) -> Array:
        """The matrix in place as float32, held from now on."""
        if name not in self.weights:
            tensor = self.reference.model.tensors[name]
            self.weights[name] = tensor.numpy()
            release(tensor)
        return self.weights[name]

    def _product(self, name: str, x: Array, tensor: Tensor) -> Array:
        # a head is large and used once: it is held only if somebody asked for it
        if name == self._head and name not in self.weights:
            return dense(name, x, _GivenBack(tensor))
        return x @ self.weight(name).T


class _GivenBack:
    """A tensor whose pages are given back to the system as soon as its rows are read."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self.shape, self.nbytes = tuple(tensor.shape), tensor.nbytes

    def rows(self, start: int, stop: int) -> Array:
        """Rows ``start:stop`` as float32."""
        values = self._tensor.rows(start, stop)
        release(self._tensor)
        return values

    def numpy(self) -> Array:
        """The whole tensor as float32."""
        return self.rows(0, self.shape[0])


def _with_tensors(model: Model, placed: Mapping[str, Tensor]) -> Model:
    for name, tensor in placed.items():
        if name not in model.tensors:
            raise UsageError(f"the model has no tensor {name} that could be replaced")
        if tuple(tensor.shape) != tuple(model.tensors[name].shape):
            raise UsageError(
                f"{name} is {list(model.tensors[name].shape)}; "
                f"it cannot be replaced by {list(tensor.shape)}"
            )
    return Model(model.config, {**model.tensors, **placed}, model.files, model.provenance)
