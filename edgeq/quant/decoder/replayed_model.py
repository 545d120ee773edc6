"""One model of a layer replay: its hidden states and the weights of the current group."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import UsageError
from edgeq.formats.mapped_file import release
from edgeq.formats.tensor import Tensor
from edgeq.model import decoder
from edgeq.model.formulas import Array, Linear
from edgeq.model.model import Model
from edgeq.model.recording import LinearGroup
from edgeq.quant.decoder.fixed_order import FixedOrderReference, fixed_order_dense
from edgeq.quant.decoder.replayed_experts import ReplayedExperts
from edgeq.quant.kernels.products import product

KEEP_BYTES = 512 << 20
"""Most bytes of the inputs of a group that are kept; more are computed again for each use."""
TOGETHER = 2048
"""Most tokens of several windows that are computed at once in operations on single tokens."""
KEPT_LOGITS = 128 << 20
"""Most bytes of the float model's logits that are kept for comparisons with several models."""

_ENDS = {"attn_out": decoder.attention_out, "mlp_out": decoder.feed_forward_out}
"""Kind of a group at the end of a branch -> the part of the decoder that computes its output."""


class ReplayedModel:
    """A model's hidden states between two groups.

    Args:
        model: the model.
        windows: token ids of each window.
        replaced: tensors that replace those of the model.
        hidden: hidden states of each window from which a replay continues; None computes the
            embeddings.
        linear: see `edgeq.quant.decoder.replay.Replay`.
        source: another model at the same group. Matrices that both models have are converted to
            float32 once.

    Attributes:
        hidden: hidden states of each window, float32 [T, hidden].
        weights: matrices of the current group that were converted to float32 or replaced.
        reference: computes the parts of the decoder.
        chooser: the model whose routers choose the tokens that are the inputs of experts; None for
            this one.
    """

    def __init__(
        self,
        model: Model,
        windows: Sequence[NDArray[np.int64]],
        replaced: Mapping[str, Tensor],
        hidden: Sequence[Array] | None,
        linear: Callable[[Linear], Linear] | None = None,
        source: ReplayedModel | None = None,
    ) -> None:
        if replaced:
            model = _with_tensors(model, replaced)
        self.weights: dict[str, Array] = {}
        self.reference = FixedOrderReference(
            model, linear=linear(self._product) if linear else self._product
        )
        self._windows = windows
        self._head = model.config.head_name
        if hidden is None:
            hidden = [self._embedding(window) for window in windows]
            release(model.tensors["model.embed_tokens.weight"])
        self.hidden = list(hidden)
        self._kept: list[Array] | None = None
        self._after: list[Array] | None = None
        self._source = source
        self.chooser: ReplayedModel | None = None
        self._experts: ReplayedExperts | None = None

    def begin(self, group: LinearGroup) -> None:
        """Compute and keep the inputs of a group that ends a branch, if they are not too large."""
        if group.kind not in _ENDS or group.expert is not None:
            return
        width = self.reference.model.tensors[group.linears[0]].shape[1]
        if 4 * width * sum(x.shape[0] for x in self.hidden) <= KEEP_BYTES:
            if group.kind == "mlp_out":
                self._kept = self._together(self.hidden, partial(self._activated, group.layer))
            else:
                self._kept = [self.input(group, window) for window in range(len(self.hidden))]
            self.weights.clear()

    def input(self, group: LinearGroup, window: int) -> Array:
        """The inputs of the group's matrices for a window, float32 [T, K]."""
        if self._kept is not None:
            return self._kept[window]
        ref, x, layer = self.reference, self.hidden[window], group.layer
        if group.kind == "head":
            return decoder.head_in(ref, x)
        if group.kind in ("attn_in", "attn_out"):
            h = decoder.attention_in(ref, ref.config, layer, x)
            if group.kind == "attn_in":
                return h
            ref.begin(self._windows[window])
            return decoder.attention_mix(ref, ref.config, layer, h)
        if group.expert is not None:
            assert self._experts is not None  # of the group of the layer's router
            compute = self._experts.inputs if group.kind == "mlp_in" else self._experts.activated
            return compute(group.expert, window)
        if group.kind == "mlp_in":
            return decoder.feed_forward_in(ref, ref.config, layer, x)
        return self._activated(layer, x)

    def finish(self, group: LinearGroup) -> None:
        """Add the output of a branch to the hidden states, if the group is at the end of one."""
        if group.kind in ("mlp_in", "mlp_out"):
            experts = self.reference.config.blocks[group.layer].experts
            if experts is not None:
                self._finish_experts(group, experts.count)
                return
        if group.kind not in _ENDS:
            return
        self.hidden = self.after(group)
        self._kept = self._after = None
        self.weights.clear()

    def _finish_experts(self, group: LinearGroup, count: int) -> None:
        """Route the tokens when the router is finished, and add up the outputs of the experts."""
        if group.expert is None:
            chooser = None if self.chooser is None else self.chooser._experts
            self._experts = ReplayedExperts(self.reference, group.layer, self.hidden, chooser)
            self.weights.clear()
            return
        if group.kind == "mlp_in":
            return
        assert self._experts is not None  # of the group of the layer's router
        self._experts.add(group.expert)
        self.weights.clear()
        if group.expert == count - 1:
            outputs = self._experts.outputs()
            self.hidden = [x + added for x, added in zip(self.hidden, outputs, strict=True)]
            self._experts = None

    def after(self, group: LinearGroup) -> list[Array]:
        """The hidden states of each window after the group's branch.

        They are kept until the group is finished, so its weights must not be replaced after this.
        """
        if self._after is None:
            ref, layer, out = self.reference, group.layer, _ENDS[group.kind]
            inputs = (self.input(group, window) for window in range(len(self.hidden)))
            outputs = self._together(inputs, lambda x: out(ref, ref.config, layer, x))
            self._after = [x + added for x, added in zip(self.hidden, outputs, strict=True)]
        return self._after

    def _activated(self, layer: int, x: Array) -> Array:
        """The inputs of the down projection for hidden states x [T, hidden]."""
        ref = self.reference
        h = decoder.feed_forward_in(ref, ref.config, layer, x)
        return decoder.feed_forward_act(ref, ref.config, layer, h)

    def _together(self, parts: Iterable[Array], compute: Callable[[Array], Array]) -> list[Array]:
        """Apply a token-wise function to each part, for up to `TOGETHER` tokens of them at once."""
        results: list[Array] = []
        waiting: list[Array] = []

        def flush() -> None:
            cuts = np.cumsum([len(part) for part in waiting[:-1]])
            results.extend(np.split(compute(np.concatenate(waiting)), cuts))
            waiting.clear()

        for part in parts:
            if waiting and sum(map(len, waiting)) + len(part) > TOGETHER:
                flush()
            waiting.append(part)
        flush()
        return results

    def logits(self, windows: slice, every: int) -> list[Array]:
        """Logits of every ``every``-th position, float32 [T, V] for each window."""
        ref = self.reference
        parts = [x[::every] for x in self.hidden[windows]]
        logits = decoder.head(ref, ref.config, decoder.head_in(ref, np.concatenate(parts)))
        return np.split(logits, np.cumsum([len(part) for part in parts[:-1]]))

    def weight(self, name: str) -> Array:
        """The current matrix as float32, which is kept from now on."""
        if name not in self.weights:
            tensor = self.reference.model.tensors[name]
            if self._source and self._source.reference.model.tensors.get(name) is tensor:
                self.weights[name] = self._source.weight(name)
            else:
                self.weights[name] = tensor.numpy()
                release(tensor)
        return self.weights[name]

    def _embedding(self, window: NDArray[np.int64]) -> Array:
        self.reference.begin(window)
        return self.reference.embed("embed")

    def _product(self, name: str, x: Array, tensor: Tensor) -> Array:
        # the head is large and used once, so it is kept only if a caller has read it
        if name == self._head and name not in self.weights:
            return fixed_order_dense(name, x, _ReleasedTensor(tensor))
        return product(x, self.weight(name))


class _ReleasedTensor:
    """A tensor whose pages are released to the system as soon as its rows are read."""

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


def _with_tensors(model: Model, replaced: Mapping[str, Tensor]) -> Model:
    for name, tensor in replaced.items():
        if name not in model.tensors:
            raise UsageError(f"the model has no tensor {name}, so it cannot be replaced")
        if tuple(tensor.shape) != tuple(model.tensors[name].shape):
            raise UsageError(
                f"{name} has the shape {list(model.tensors[name].shape)} and cannot be replaced by "
                f"{list(tensor.shape)}; give a tensor of the same shape"
            )
    return Model(model.config, {**model.tensors, **replaced}, model.files, model.provenance)
