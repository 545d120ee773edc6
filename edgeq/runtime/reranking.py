"""How relevant documents are to a query, as a model that was trained to say yes or no judges it.

The model reads an instruction, the query and a document, and the probability of yes against that of
no, as the next token, is the score.

Source: https://huggingface.co/Qwen/Qwen3-Reranker-0.6B (arXiv 2506.05176), whose prompt this is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from edgeq.core.errors import FormatError, UnsupportedError, UsageError
from edgeq.model.config import ModelConfig
from edgeq.model.memory_layout import BATCH
from edgeq.runtime.engine import Engine
from edgeq.runtime.sampling import NOT_FINITE
from edgeq.runtime.tokenizer import Tokenizer

INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
"""What a document is judged by where nothing else is asked, as Qwen3-Reranker has it."""
FAMILIES = ("qwen3",)
_BEFORE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and "
    'the Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
    "<|im_start|>user\n"
)
_AFTER = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
_ANSWERS = ("yes", "no")
_MARKS = ("<|im_start|>", "<|im_end|>")


class RerankPrompts:
    """The prompts of Qwen3-Reranker, as tokens.

    Args:
        config: of the model.
        tokenizer: the model's.

    Attributes:
        yes, no: the tokens whose logits are compared.

    Raises:
        UnsupportedError: the model is of another family, or its tokenizer lacks a token.
    """

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer) -> None:
        if config.family not in FAMILIES:
            raise UnsupportedError(
                f"the model is of the family {config.family}; edgeq reranks with models of "
                f"{', '.join(FAMILIES)}, as Qwen3-Reranker, whose prompt and scores it knows"
            )
        single = {word: tokenizer.encode(word, add_bos=False) for word in (*_ANSWERS, *_MARKS)}
        for word, ids in single.items():
            if len(ids) != 1:
                raise UnsupportedError(
                    f"the model's tokenizer has no token {word!r}, which the prompt of "
                    "Qwen3-Reranker needs"
                )
        self.yes, self.no = (single[word][0] for word in _ANSWERS)
        self._tokenizer = tokenizer
        self._before, self._after = (
            tokenizer.encode(text, add_bos=False) for text in (_BEFORE, _AFTER)
        )

    def tokens(self, query: str, document: str, instruction: str | None = None) -> list[int]:
        """Tokens of the prompt for a document. The parts are tokenized one by one, as published.

        Args:
            query: what is looked for.
            document: what is judged.
            instruction: how it is judged; None for `INSTRUCTION`.
        """
        asked = INSTRUCTION if instruction is None else instruction
        text = f"<Instruct>: {asked}\n<Query>: {query}\n<Document>: {document}"
        return [*self._before, *self._tokenizer.encode(text, add_bos=False), *self._after]

    def score(
        self, engine: Engine, tokens: Sequence[int], between: Callable[[], None] | None = None
    ) -> float:
        """The probability of yes after a prompt, of 0 to 1.

        The engine's sequence is the prompt's afterwards; what it has in common with the sequence
        before is not run again.

        Args:
            engine: runs the model.
            tokens: of a prompt.
            between: called after each batch of tokens; what it raises ends the work.

        Raises:
            UsageError: the prompt is longer than the context.
            FormatError: the logits are not numbers.
        """
        if len(tokens) > engine.context:
            raise UsageError(
                f"the prompt for a document has {len(tokens)} tokens, and the context holds "
                f"{engine.context}; split the document, or use a longer context (up to "
                f"{engine.config.context})"
            )
        fresh = engine.reuse(tokens)
        logits = np.zeros(0, np.float32)
        for start in range(0, len(fresh), BATCH):
            logits = engine.forward(fresh[start : start + BATCH])
            if between is not None:
                between()
        if not np.isfinite(logits).all():
            raise FormatError(NOT_FINITE)
        margin = float(logits[self.yes]) - float(logits[self.no])
        return 1 / (1 + math.exp(-margin)) if margin > -700 else 0.0
