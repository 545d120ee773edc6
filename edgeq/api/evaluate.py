"""Accuracy on a question set or on labeled samples, and perplexity of a text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import UsageError
from edgeq.core.progress import Progress
from edgeq.evaluation import text as text_evaluation
from edgeq.evaluation.tasks import Outcome, evaluate_task, read_items
from edgeq.evaluation.text import Evaluation, LogitsFn, Score
from edgeq.importers import load
from edgeq.model.kv_bits import KvBits
from edgeq.model.model import Model
from edgeq.model.reference import Reference
from edgeq.runtime.engine import Engine
from edgeq.runtime.generate import all_end_ids
from edgeq.runtime.tokenizer import Tokenizer


def evaluate(
    model: Model | str | Path,
    task: str | Path,
    *,
    layout: str | None = None,
    limit: int | None = None,
    base: Model | str | Path | None = None,
    context: int = 2048,
    threads: int | None = None,
    kv_bits: KvBits = 8,
    backend: str = "numba",
    progress: Progress | None = None,
) -> Outcome:
    """Count how many questions a language model answers correctly.

    Questions are asked zero-shot with the prompts of lm-evaluation-harness.

    Args:
        model: a model or the path of one.
        task: the question set as published (JSON lines): HellaSwag, MMLU, LAMBADA or GSM8K.
        layout: hellaswag, mmlu, lambada or gsm8k; detected from the file if None.
        limit: use only this many questions from the start.
        base: another model, such as the float model: answers that differ are counted, since a
            quantized model can have the same accuracy and yet give different answers.
        context: longest question in tokens, at most the model's own context length.
        threads, kv_bits, backend: as `Engine` takes them.
        progress: called after every question.

    Raises:
        FormatError: the model or the question set cannot be read.
        UsageError: models of different vocabularies, or no questions.

    Example:
        >>> outcome = edgeq.evaluate("model.edgeq", "lambada.jsonl", layout="lambada")
        >>> outcome.n, 0 <= outcome.accuracy <= 1
        (2, True)
    """
    name, items = read_items(str(task), layout, limit)
    opened = _opened(model)
    other = None if base is None else _opened(base)
    if other is not None:
        check_vocabularies(opened, other, "--base")
    tokenizer = Tokenizer(opened)
    settings: dict[str, Any] = {
        "context": min(context, opened.config.context), "threads": threads, "kv_bits": kv_bits,
        "backend": backend,
    }  # fmt: skip
    with ExitStack() as engines:
        asked = EngineAnswers(engines.enter_context(Engine(opened, **settings)), tokenizer)
        compared = None
        if other is not None:
            compared = EngineAnswers(engines.enter_context(Engine(other, **settings)), tokenizer)
        return evaluate_task(name, items, asked, tokenizer, base=compared, progress=progress)


def perplexity(
    model: Model | str | Path,
    text: str,
    *,
    context: int = 512,
    windows: int | None = None,
    score: Score = "all",
    base: Model | str | Path | None = None,
    threads: int | None = None,
    kv_bits: KvBits = 8,
    backend: str = "numba",
    progress: Progress | None = None,
) -> Evaluation:
    """Score a text: perplexity, bits per byte, and KL divergence from another model.

    Perplexities are comparable only with the same tokenizer, context length and protocol; bits
    per byte are comparable across tokenizers.

    Args:
        model: a model or the path of one.
        text: the text itself.
        context: tokens in each window, at most the model's own context length.
        windows: use only this many windows from the start of the text.
        score: "all" scores every token of a window but the first, "half" the second half of each
            window, as llama.cpp does.
        base: compare with this model, such as the float model, run in float32: a float model by
            the compiled engine with keys and values in float16, any other by NumPy.
        threads, kv_bits, backend: as `Engine` takes them.
        progress: called after every window.

    Raises:
        FormatError: the model cannot be read.
        UsageError: a text too short for one window, or models of different vocabularies.

    Example:
        >>> text = pathlib.Path("text.txt").read_text("utf-8")
        >>> result = edgeq.perplexity("model.edgeq", text, context=64, windows=2, base="model")
        >>> 1 < result.ppl < 100, result.kl_mean < 0.1
        (True, True)
    """
    opened = _opened(model)
    tokenizer = Tokenizer(opened)
    ids = tokenizer.encode(text, add_bos=False)
    context = min(context, opened.config.context)
    settings: dict[str, Any] = {"context": context, "threads": threads, "backend": backend}
    with ExitStack() as engines:
        against: LogitsFn | None = None
        if base is not None:
            other = _opened(base)
            check_vocabularies(opened, other, "--kl-base")
            if other.is_float:
                against = _whole_windows(
                    engines.enter_context(Engine(other, kv_bits=16, **settings))
                )
            else:  # the engine would round what its matrices are multiplied with
                against = Reference(other, context=context).forward
        engine = engines.enter_context(Engine(opened, kv_bits=kv_bits, **settings))
        return text_evaluation.perplexity(
            _whole_windows(engine),
            ids,
            context=context,
            bos=tokenizer.text_bos,
            score=score,
            base=against,
            decode=tokenizer.decode,
            max_tokens=_tokens_of(windows, context, tokenizer.text_bos, score),
            progress=progress,
        )


def _whole_windows(engine: Engine) -> LogitsFn:
    """The logits of all tokens of a sequence of its own."""

    def logits(tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        engine.reset()
        return engine.forward(tokens, all_logits=True)

    return logits


def _tokens_of(windows: int | None, context: int, bos: int | None, score: Score) -> int | None:
    """Tokens of text in so many windows; one of a window is BOS where every token is scored."""
    if windows is None:
        return None
    return windows * (context - 1 if bos is not None and score == "all" else context)


def check_vocabularies(model: Model, base: Model, option: str) -> None:
    """Refuse to compare models of different vocabularies.

    Args:
        model, base: the models.
        option: the option that names the base model, for the message.

    Raises:
        UsageError: they differ.
    """
    if base.config.vocab != model.config.vocab:
        raise UsageError(
            f"{option} has {base.config.vocab} tokens in its vocabulary and MODEL has "
            f"{model.config.vocab}; give the model that MODEL was quantized from"
        )


class EngineAnswers:
    """An engine with the interface of `edgeq.evaluation.tasks`; a shared prefix of prompts is read
    once.

    Args:
        engine: runs the model.
        tokenizer: the model's.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer) -> None:
        self._engine, self._ends = engine, all_end_ids(engine, tokenizer)
        self.context = engine.context

    def scores(self, prompt: list[int], continuation: list[int]) -> Any:
        """Logits from which each token of the continuation is predicted, [C, V]."""
        tokens = [*self._engine.reuse(prompt), *continuation[:-1]]
        return self._engine.forward(tokens, all_logits=True)[-len(continuation) :]

    def generate(self, prompt: list[int], n: int) -> Iterator[int]:
        """Greedy tokens after the prompt, at most n, none past the end of the text."""
        self._engine.reset()
        token = int(self._engine.forward(prompt).argmax())
        for left in range(min(n, self.context - len(prompt)), 0, -1):
            if token in self._ends:
                return
            yield token
            if left > 1:
                token = int(self._engine.forward([token]).argmax())


def _opened(model: Model | str | Path) -> Model:
    return model if isinstance(model, Model) else load(model)
