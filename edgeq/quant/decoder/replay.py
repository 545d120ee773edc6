"""Layer replay: run a decoder on many windows of tokens, one group of matrices at a time.

A group is the matrices that are multiplied with the same input
(`edgeq.model.recording.LinearGroup`). All windows pass a group before the next group starts.
Therefore the weights of at most one layer are in memory, and the caller may replace the weights of
a group after it has read the group's inputs; everything later is then computed with the replaced
weights, as GPTQ needs it. The computations between two groups are the parts of
`edgeq.model.decoder`, run by `edgeq.quant.decoder.fixed_order`, so that their bits do not depend on
the machine.

Memory in bytes, with n tokens in all windows. With `float_inputs` the first two are twice as large.

    n * hidden * 4                       hidden states
    n * max(mix_width, ffn) * 4          inputs of o or down. They are kept if they take at most
                                         `KEEP_BYTES`; otherwise they are computed for each use.
    (q+k+v | o | gate+up | down) * 4     the group's weights as float32, and those of the group
                                         before it if its inputs are computed for each use
    see `edgeq.quant.decoder.replayed_experts` for a layer with experts
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
from edgeq.quant.decoder.layerwise import check_layerwise
from edgeq.quant.decoder.replayed_model import KEPT_LOGITS, ReplayedModel


@dataclass(frozen=True)
class ReplayState:
    """The state of a replay between two layers, from which another replay can continue.

    Args:
        layer: number of the next layer.
        hidden: input of that layer, float32 [T, hidden] for each window.
        float_hidden: the same in the original model, if that is computed too.
    """

    layer: int
    hidden: tuple[Array, ...]
    float_hidden: tuple[Array, ...] | None = None


class Replay:
    """Runs a model's decoder on windows of tokens, group by group.

    Iterating gives one step for each group of `linear_groups(model.config)`, in order. A replay can
    be iterated once, and a step is valid until the next one.

    Args:
        model: a float or quantized model.
        windows: token ids, int64 [T] each, including BOS; each window is a context of its own.
        float_inputs: also compute the original model, for `ReplayStep.float_inputs`. That doubles
            work and memory.
        replaced: weights that replace those of the model from the beginning. A tied head must be
            given here if it should replace the embedding too, for which `ReplayStep.replace` is too
            late.
        linear: wraps the replay's product, for example to round inputs. It does not apply to the
            original model.
        state: state of another replay of the same model and windows, from which to continue.
        progress: called with the group, groups done, and number of groups.

    Attributes:
        n_tokens: number of tokens in all windows.

    Raises:
        UsageError: there are no windows, a window is empty or longer than the model's context, or a
            token is outside the vocabulary.
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
        check_layerwise(config, "this computation")
        if not len(windows):
            raise UsageError("there are no windows of tokens; give at least one")
        ids = [checked_tokens(config, window) for window in windows]
        longest = max(window.size for window in ids)
        if longest > config.context:
            raise UsageError(
                f"a window has {longest} tokens, and the model supports {config.context}; "
                "cut the text into shorter windows"
            )
        self.n_tokens = sum(window.size for window in ids)
        self._groups = linear_groups(config)
        self._float = None
        if float_inputs:
            self._float = ReplayedModel(model, ids, {}, state.float_hidden if state else None)
        self._main = ReplayedModel(
            model, ids, dict(replaced or {}), state.hidden if state else None, linear, self._float
        )
        if self._float is not None:
            self._float.chooser = self._main
        self._first_layer = state.layer if state else 0
        self._progress = progress
        self._group: LinearGroup | None = None
        self._is_done = False
        self._kept_logits: dict[int, list[Array]] = {}

    def __iter__(self) -> Iterator[ReplayStep]:
        """The steps. Each is valid until the next one.

        Raises:
            UsageError: the replay was iterated before.
        """
        if self._group is not None:
            raise UsageError("this Replay was iterated already; make another one")
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
        """Run all steps, after which `logits` can be called; returns the replay itself."""
        for _ in self:
            pass
        return self

    def state(self) -> ReplayState:
        """The state at the first step of a layer or at the head, for another replay.

        Raises:
            UsageError: the replay is in the middle of a layer, or has not started.
        """
        if self._group is None or self._group.kind not in ("attn_in", "head"):
            where = "not begun" if self._group is None else f"at {self._group}"
            raise UsageError(f"the replay is {where}; call state at the steps attn_in and head")
        float_hidden = tuple(self._float.hidden) if self._float else None
        return ReplayState(self._group.layer, tuple(self._main.hidden), float_hidden)

    def logits(self, every: int = 1) -> Iterator[Array]:
        """Logits of each window, float32 [T, V], computed with the current weights.

        Args:
            every: compute the logits of every ``every``-th position.

        Raises:
            UsageError: not all steps were run.
        """
        if not self._is_done:
            raise UsageError("the replay has steps left; run all of them before logits")
        if every in self._kept_logits:
            yield from self._kept_logits[every]
            return
        # windows with together at most as many positions as the longest window share a product,
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
        group: the group of matrices.
        weights: name -> the current weights, float32 [N, K], including replaced ones. A matrix is
            converted to float32 at the first access and kept until the step is over.
    """

    def __init__(self, replay: Replay, group: LinearGroup) -> None:
        self._replay = replay
        self.group = group
        self.weights: Mapping[str, Array] = _StepWeights(self)

    def inputs(self) -> Iterator[Array]:
        """The inputs of the matrices, float32 [T, K], window by window.

        Those of an expert are the tokens that go through it, perhaps none of a window.

        They are computed with the weights that are replaced so far, and can be iterated over more
        than once.
        """
        return self._inputs(self._replay._main)

    def float_inputs(self) -> Iterator[Array]:
        """The inputs of the matrices in the original model, float32 [T, K], window by window.

        Raises:
            UsageError: the replay was made without float_inputs.
        """
        return self._inputs(self._float_model())

    def residual_errors(self) -> Iterator[Array]:
        """The residual stream of the original model minus that of the replayed model.

        It is the residual stream that the output of the group's branch is added to, float32
        [T, hidden], window by window.

        Raises:
            UsageError: the replay was made without float_inputs.
        """
        float_hidden = self._current(self._float_model()).hidden
        for x_float, x in zip(float_hidden, self._replay._main.hidden, strict=True):
            yield x_float - x

    def float_outputs(self) -> Iterator[Array]:
        """The residual stream of the original model after the group's branch, float32 [T, hidden].

        Raises:
            UsageError: the replay was made without float_inputs.
        """
        yield from self._current(self._float_model()).after(self.group)

    def replace(self, name: str, w: Array) -> None:
        """Replace a matrix; all later steps and the logits are computed with the new one.

        Args:
            name: name of a matrix of the group.
            w: float32 [N, K]; it is kept until the step is over and not copied.

        Raises:
            UsageError: the matrix is not in this group, or has another shape.
        """
        model = self._current(self._replay._main)
        self._check_name(name)
        shape = tuple(model.reference.model.tensors[name].shape)
        if w.shape != shape:
            raise UsageError(
                f"{name} has the shape {list(shape)} and cannot be replaced by {list(w.shape)}"
            )
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
            raise UsageError(
                f"the step {self.group} is over; read its inputs and weights before the next step"
            )
        return model

    def _weight(self, name: str) -> Array:
        self._check_name(name)
        return self._current(self._replay._main).weight(name)

    def _check_name(self, name: str) -> None:
        if name not in self.group.linears:
            raise UsageError(
                f"{name} is not in {self.group}; use one of {', '.join(self.group.linears)}"
            )


class _StepWeights(Mapping[str, Array]):
    """The weights of a step, which are converted to float32 at the first access."""

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
