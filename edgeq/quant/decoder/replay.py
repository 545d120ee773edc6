"""Layer replay: a decoder over many windows of tokens, one group of matrices at a time.

A group is the matrices that are multiplied with one input (`edgeq.model.recording.LinearGroup`).
All windows pass a group before any goes on to the next. So the weights of one layer at most are in
memory, and a caller that looks at the inputs of a group may replace its weights: everything after
it is then computed with the replaced ones, as GPTQ needs it. What is computed between two groups
are the parts of `edgeq.model.decoder`, run by `edgeq.quant.decoder.fixed_order`, so that their bits
do not depend on the machine.

Memory in bytes, with n tokens in all windows, and twice that of the first two with `float_inputs`:

    n * hidden * 4                       hidden states
    n * max(H*D, ffn) * 4                inputs of o or down, kept while they are at most
                                         `KEEP_BYTES`, otherwise computed again for each use
    (q+k+v | o | gate+up | down) * 4     the group's weights as float32, and those of the group
                                         before it where its inputs are computed again
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import UsageError
from edgeq.core.progress import Progress
from edgeq.formats.tensor import Tensor
from edgeq.model.formulas import Array, Linear
from edgeq.model.model import Model
from edgeq.model.recording import LinearGroup, linear_groups
from edgeq.model.reference import checked_tokens
from edgeq.quant.decoder.replayed_model import KEPT_LOGITS, ReplayedModel


@dataclass(frozen=True)
class ReplayState:
    """A replay between two layers, from which another one can go on.

    Args:
        layer: the next one.
        hidden: its x, float32 [T, hidden] for each window.
        float_hidden: the same in the unreplaced model, if that is computed too.
    """

    layer: int
    hidden: tuple[Array, ...]
    float_hidden: tuple[Array, ...] | None = None


class Replay:
    """A model's decoder over windows of tokens, group by group.

    Iterating gives one step for each of `linear_groups(model.config)`, in order and once. A step
    is over when the next one is asked for.

    Args:
        model: float or quantized.
        windows: int64 [T] each, BOS included; each is a context of its own.
        float_inputs: also compute the unreplaced model, for `ReplayStep.float_inputs`: twice the
            work and memory.
        replaced: weights in place from the beginning. A tied head must come here if it is to be
            the embedding too, for which `ReplayStep.replace` is too late.
        linear: receives the replay's own product and returns the one to compute with, as to round
            inputs; not that of the unreplaced model.
        state: of another replay over the same model and windows; this one goes on from there.
        progress: called with the group, groups done, and of how many.

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
        state: ReplayState | None = None,
        progress: Progress | None = None,
    ) -> None:
        config = model.config
        if not len(windows):
            raise UsageError("there are no windows of tokens; give at least one")
        ids = [checked_tokens(config, window) for window in windows]
        longest = max(window.size for window in ids)
        if longest > config.context:
            raise UsageError(
                f"a window has {longest} tokens and the model supports {config.context}; "
                "cut the text into shorter ones"
            )
        self.n_tokens = sum(window.size for window in ids)
        self._groups = linear_groups(config)
        self._float = None
        if float_inputs:
            self._float = ReplayedModel(model, ids, {}, state.float_hidden if state else None)
        self._main = ReplayedModel(
            model, ids, dict(replaced or {}), state.hidden if state else None, linear, self._float
        )
        self._first_layer = state.layer if state else 0
        self._progress = progress
        self._group: LinearGroup | None = None
        self._is_done = False
        self._kept_logits: dict[int, list[Array]] = {}

    def __iter__(self) -> Iterator[ReplayStep]:
        """The steps, each valid until the next is asked for.

        Raises:
            UsageError: the replay was iterated before.
        """
        if self._group is not None:
            raise UsageError("a Replay can be iterated once; make another one")
        models = [model for model in (self._main, self._float) if model]
        for number, group in enumerate(self._groups):
            if group.layer < self._first_layer:
                continue
            if self._progress:
                self._progress(str(group), number, len(self._groups))
            self._group = group
            for model in models:
                model.begin(group)
            yield ReplayStep(self, group)
            for model in models:
                model.finish(group)
        self._is_done = True
        if self._progress:
            self._progress("logits", len(self._groups), len(self._groups))

    def run(self) -> Replay:
        """Go through all steps, after which `logits` is known; returns the replay itself."""
        for _ in self:
            pass
        return self

    def state(self) -> ReplayState:
        """Where the replay is, for another one to go on: at a layer's first step, or the head's.

        Raises:
            UsageError: it is in the middle of a layer.
        """
        if self._group is None or self._group.kind not in ("attn_in", "head"):
            where = "not begun" if self._group is None else f"at {self._group}"
            raise UsageError(f"the replay is {where}; its state is known at attn_in and the head")
        float_hidden = tuple(self._float.hidden) if self._float else None
        return ReplayState(self._group.layer, tuple(self._main.hidden), float_hidden)

    def logits(self, every: int = 1) -> Iterator[Array]:
        """Logits of each window, float32 [T, V], computed with the weights in place.

        Args:
            every: of one position in so many.

        Raises:
            UsageError: steps are left.
        """
        if not self._is_done:
            raise UsageError("logits come after the last step; go through the replay first")
        if every in self._kept_logits:
            yield from self._kept_logits[every]
            return
        # windows that have no more positions together than the longest one has share a product,
        # so that the head is read once for all of them
        longest = max(len(x) for x in self._main.hidden)
        first = total = 0
        for window, x in enumerate(self._main.hidden):
            positions = -(-len(x) // every)
            if window > first and total + positions > longest:
                yield from self._main.logits(slice(first, window), every)
                first, total = window, 0
            total += positions
        yield from self._main.logits(slice(first, None), every)

    def keep_logits(self, every: int = 1) -> None:
        """Compute the logits now and keep them, if they take at most `KEPT_LOGITS` bytes."""
        positions = sum(-(-len(x) // every) for x in self._main.hidden)
        if 4 * positions * self._main.reference.config.vocab <= KEPT_LOGITS:
            self._kept_logits[every] = list(self.logits(every))


class ReplayStep:
    """A group of matrices and its inputs in all windows.

    Attributes:
        group: the matrices.
        weights: by name, float32 [N, K]: the ones computed with, so a replaced one is seen as it
            was replaced. Converted to float32 when first asked for, and then kept until the step
            is over.
    """

    def __init__(self, replay: Replay, group: LinearGroup) -> None:
        self._replay = replay
        self.group = group
        self.weights: Mapping[str, Array] = _StepWeights(self)

    def inputs(self) -> Iterator[Array]:
        """What the matrices are multiplied with, float32 [T, K], window by window.

        Computed with the weights in place so far; may be iterated several times.
        """
        return self._inputs(self._replay._main)

    def float_inputs(self) -> Iterator[Array]:
        """The same windows' inputs in the unreplaced model, float32 [T, K].

        Raises:
            UsageError: the replay was made without float_inputs.
        """
        return self._inputs(self._float_model())

    def residual_errors(self) -> Iterator[Array]:
        """How far x is from the unreplaced model's, float32 [T, hidden], window by window.

        x is the residual stream that the output of the group's branch is added to.

        Raises:
            UsageError: the replay was made without float_inputs.
        """
        float_hidden = self._current(self._float_model()).hidden
        for x_float, x in zip(float_hidden, self._replay._main.hidden, strict=True):
            yield x_float - x

    def float_outputs(self) -> Iterator[Array]:
        """x of the unreplaced model with the output of the branch that the group ends: [T, hidden].

        Raises:
            UsageError: the replay was made without float_inputs.
        """
        yield from self._current(self._float_model()).after(self.group)

    def replace(self, name: str, w: Array) -> None:
        """Put another matrix in place: all later steps and logits are computed with it.

        Args:
            name: one of the group's.
            w: float32 [N, K]; kept until the step is over, not copied.

        Raises:
            UsageError: not of this group, or of another shape.
        """
        model = self._current(self._replay._main)
        self._check_name(name)
        shape = tuple(model.reference.model.tensors[name].shape)
        if w.shape != shape:
            raise UsageError(f"{name} is {list(shape)}; it cannot be replaced by {list(w.shape)}")
        model.weights[name] = w

    def _float_model(self) -> ReplayedModel:
        if self._replay._float is None:
            raise UsageError("the replay does not compute the float model; set float_inputs=True")
        return self._replay._float

    def _inputs(self, model: ReplayedModel) -> Iterator[Array]:
        for window in range(len(model.hidden)):
            yield self._current(model).input(self.group, window)

    def _current(self, model: ReplayedModel) -> ReplayedModel:
        if self._replay._group is not self.group:
            raise UsageError(f"the step {self.group} is over; its inputs and weights are gone")
        return model

    def _weight(self, name: str) -> Array:
        self._check_name(name)
        return self._current(self._replay._main).weight(name)

    def _check_name(self, name: str) -> None:
        if name not in self.group.linears:
            raise UsageError(f"{name} is not in {self.group} ({', '.join(self.group.linears)})")


class _StepWeights(Mapping[str, Array]):
    """A step's weights, converted to float32 when they are asked for."""

    def __init__(self, step: ReplayStep) -> None:
        self._step = step

    def __getitem__(self, name: str) -> Array:
        if name not in self._step.group.linears:
            raise KeyError(name)
        return self._step._weight(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._step.group.linears)

    def __len__(self) -> int:
        return len(self._step.group.linears)
