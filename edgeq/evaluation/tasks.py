"""Evaluate a model on published question sets, which are JSON lines files.

    layout     a line holds                        asked                      right if
    hellaswag  ctx_a, ctx_b, activity_label,       which ending is likeliest  it is `label`
               endings, label
    mmlu       question, choices, answer, subject  which letter is likeliest  it is `answer`
    lambada    text                                the last word              every token of it is
                                                                              the likeliest
    gsm8k      question, answer ending "#### n"    greedy generation          its last number is n

Choices are compared by their log-likelihood after the question, as it is and divided by the
choice's length in characters without the space before it ("normalized", the harness' acc_norm),
zero-shot. Prompts are those of the Language Model
Evaluation Harness, so that figures compare; what was done is said in the result's protocol.

Source: Zellers et al. 2019 (HellaSwag), Hendrycks et al. 2021 (MMLU), Paperno et al. 2016
(LAMBADA), Cobbe et al. 2021 (GSM8K); prompts and normalization: EleutherAI lm-evaluation-harness.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import FormatError, UsageError, unknown
from edgeq.core.progress import Progress
from edgeq.evaluation.text import log_softmax

Kind = Literal["choice", "last word", "number"]
GENERATED = 256
"""Most tokens of an answer that is generated."""


@dataclass(frozen=True)
class Item:
    """A question.

    Args:
        kind: how it is answered.
        prompt: what the model is given.
        choices: what may follow; for a last word just that.
        answer: index of the right choice, or the number.
    """

    kind: Kind
    prompt: str
    choices: tuple[str, ...]
    answer: int | str


class AnsweringModel(Protocol):
    """What a model must do to be asked."""

    context: int
    """Most tokens it can see."""

    def scores(self, prompt: list[int], continuation: list[int]) -> NDArray[np.floating]:
        """Logits from which each token of the continuation is predicted, [C, V]."""

    def generate(self, prompt: list[int], n: int) -> Iterator[int]:
        """Greedy tokens after the prompt, at most n, none past the end of the text."""


class Encoder(Protocol):
    """The part of a tokenizer that tasks need."""

    def encode(self, text: str, add_bos: bool = True, add_eos: bool | None = None) -> list[int]:
        """Text to tokens."""

    def decode(self, ids: Sequence[int]) -> str:
        """Tokens to text."""


@dataclass(frozen=True)
class Outcome:
    """How a model did; None is "does not apply" or "not measured".

    Args:
        layout: of the set.
        protocol: what was asked and how it was scored, in words.
        n: questions.
        accuracy: share answered rightly.
        accuracy_normalized: the same by log-likelihood per character.
        stderr: standard error of the accuracy.
        nll_per_byte: mean negative log-likelihood of the right answers, nats a byte.
        truncated: questions that had to lose their beginning to fit the context.
        base_accuracy: of the base model.
        flips: questions that the two answer differently.
        flips_right, flips_base_right: those of them that the model had right, and the base.
    """

    layout: str
    protocol: str
    n: int
    accuracy: float
    accuracy_normalized: float | None
    stderr: float
    nll_per_byte: float | None
    truncated: int
    base_accuracy: float | None = None
    flips: int | None = None
    flips_right: int | None = None
    flips_base_right: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary with these names as keys."""
        return asdict(self)


# --- layouts ----------------------------------------------------------------------------------


def _hellaswag(row: Mapping[str, Any]) -> Item:
    head = _clean(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
    endings = tuple(" " + _clean(text) for text in row["endings"])
    return Item("choice", head, endings, _index(row["label"], endings))


def _mmlu(row: Mapping[str, Any]) -> Item:
    letters = "ABCDEFGHIJ"[: len(row["choices"])]
    subject = str(row.get("subject") or "").replace("_", " ")
    about = f" about {subject}" if subject else ""
    lines = [
        f"The following are multiple choice questions (with answers){about}.\n",
        row["question"].strip(),
        *(f"{letter}. {text}" for letter, text in zip(letters, row["choices"], strict=True)),
        "Answer:",
    ]
    answer = row["answer"]
    if isinstance(answer, str) and answer in letters:
        answer = letters.index(answer)
    choices = tuple(f" {letter}" for letter in letters)
    return Item("choice", "\n".join(lines), choices, _index(answer, choices))


def _lambada(row: Mapping[str, Any]) -> Item:
    head, space, word = row["text"].rstrip().rpartition(" ")
    if not space or not head:
        raise ValueError("the text has no second word")
    return Item("last word", head, (" " + word,), 0)


def _gsm8k(row: Mapping[str, Any]) -> Item:
    _, mark, number = row["answer"].rpartition("####")
    if not mark:
        raise ValueError("the answer does not end in '#### number'")
    return Item("number", f"Question: {row['question']}\nAnswer:", (), _number(number) or "")


LAYOUTS: dict[str, tuple[frozenset[str], Callable[[Mapping[str, Any]], Item]]] = {
    "hellaswag": (frozenset({"ctx_a", "ctx_b", "activity_label", "endings", "label"}), _hellaswag),
    "mmlu": (frozenset({"question", "choices", "answer"}), _mmlu),
    "gsm8k": (frozenset({"question", "answer"}), _gsm8k),
    "lambada": (frozenset({"text"}), _lambada),
}
"""Name -> the keys that tell it and its reader; the first whose keys are all there is taken."""


def read_items(
    path: str | Path, layout: str | None = None, limit: int | None = None
) -> tuple[str, list[Item]]:
    """Read an evaluation set.

    Args:
        path: JSON lines, UTF-8.
        layout: a name of `LAYOUTS`; told by the first line's keys if None.
        limit: only so many lines, from the first.

    Returns:
        The layout's name, and the questions.

    Raises:
        FormatError: the file is empty, not JSON lines, or a line lacks what its layout needs;
            names the line.
        UsageError: an unknown layout, or limit is not positive.
    """
    if layout is not None and layout not in LAYOUTS:
        raise UsageError(unknown("layout", layout, tuple(LAYOUTS)))
    if limit is not None and limit < 1:
        raise UsageError(f"limit is {limit}; use at least 1")
    items: list[Item] = []
    for number, row in _rows(Path(path)):
        if layout is None:
            layout = _layout_of(row, f"{path}, line {number}")
        keys, read = LAYOUTS[layout]
        if lacking := sorted(keys - set(row)):
            raise FormatError(f"{path}, line {number} has no {lacking[0]!r}, as {layout} must")
        try:
            items.append(read(row))
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as err:
            raise FormatError(
                f"{path}, line {number} is not a question of {layout}: {err}"
            ) from err
        if len(items) == limit:
            break
    if layout is None:
        raise FormatError(f"{path} has no lines; give a set in JSON lines")
    return layout, items


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise FormatError(
                        f"{path}, line {number} is a {type(row).__name__}, expected an object"
                    )
                yield number, row
    except OSError as err:
        raise FormatError(f"{path} cannot be read: {err.strerror or err}") from err
    except (UnicodeDecodeError, json.JSONDecodeError) as err:
        raise FormatError(f"{path} is not JSON lines: {err}") from err


def _layout_of(row: Mapping[str, Any], where: str) -> str:
    for name, (keys, _) in LAYOUTS.items():
        if keys <= set(row):
            return name
    raise FormatError(
        f"{where} has the keys {', '.join(sorted(row))}, which no known layout has; "
        f"supported: {', '.join(LAYOUTS)}"
    )


def _index(answer: Any, choices: Sequence[str]) -> int:
    if answer in (None, ""):
        raise ValueError("it has no answer; take a set with answers, such as the validation split")
    index = int(answer)
    if not 0 <= index < len(choices):
        raise ValueError(f"answer {index} of {len(choices)} choices")
    return index


def _clean(text: str) -> str:
    """WikiHow's headings and bracketed marks taken out, as the harness does."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _number(text: str) -> str | None:
    """The last number of a text in plain form, or None."""
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    if not numbers:
        return None
    value = float(numbers[-1].replace(",", ""))
    return str(int(value)) if value == int(value) else str(value)


# --- asking -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Answer:
    given: int | str | None
    right: bool
    right_normalized: bool
    nll: float
    nbytes: int
    truncated: bool


def evaluate_task(
    layout: str,
    items: Sequence[Item],
    model: AnsweringModel,
    encoder: Encoder,
    *,
    base: AnsweringModel | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Ask a model all questions, and a base model too if one is given.

    Args:
        layout: the set's name, for the result.
        items: questions.
        model: the model.
        encoder: its tokenizer.
        base: another model of the same vocabulary, whose answers are compared.
        progress: called with ("questions", done, total).

    Raises:
        UsageError: no questions.
    """
    if not items:
        raise UsageError("there are no questions; give at least one")
    answers: list[_Answer] = []
    before: list[_Answer] = []
    for item in items:
        answers.append(_ask(item, model, encoder))
        if base is not None:
            before.append(_ask(item, base, encoder))
        if progress:
            progress("questions", len(answers), len(items))
    n = len(items)
    accuracy = sum(a.right for a in answers) / n
    scored = sum(a.nbytes for a in answers)
    flipped = [
        (a, b)
        for a, b in zip(answers, before, strict=False)
        if (a.given != b.given if items[0].kind == "choice" else a.right != b.right)
    ]
    return Outcome(
        layout=layout,
        protocol=_PROTOCOL[items[0].kind],
        n=n,
        accuracy=accuracy,
        accuracy_normalized=(
            sum(a.right_normalized for a in answers) / n if items[0].kind == "choice" else None
        ),
        stderr=math.sqrt(accuracy * (1 - accuracy) / n),
        nll_per_byte=sum(a.nll for a in answers) / scored if scored else None,
        truncated=sum(a.truncated for a in answers),
        base_accuracy=sum(b.right for b in before) / n if before else None,
        flips=len(flipped) if before else None,
        flips_right=sum(a.right for a, _ in flipped) if before else None,
        flips_base_right=sum(b.right for _, b in flipped) if before else None,
    )


_PROTOCOL: dict[Kind, str] = {
    "choice": "zero-shot, the choice of highest log-likelihood after the question; normalized: "
    "divided by its characters",
    "last word": "the last word right if each of its tokens is the likeliest after those before",
    "number": f"zero-shot, greedy, at most {GENERATED} tokens; the number after '####', else the "
    "last one",
}


def _ask(item: Item, model: AnsweringModel, encoder: Encoder) -> _Answer:
    if item.kind == "number":
        return _generated(item, model, encoder)
    results = [_scored(item.prompt, text, model, encoder) for text in item.choices]
    sizes = [len(text.encode()) for text in item.choices]
    logs = [result[0] for result in results]
    if item.kind == "last word":
        right = results[0][1]
        return _Answer(None, right, right, -logs[0], sizes[0], results[0][2])
    assert isinstance(item.answer, int)
    given = int(np.argmax(logs))
    lengths = [max(len(text.removeprefix(" ")), 1) for text in item.choices]
    normalized = int(np.argmax([log / n for log, n in zip(logs, lengths, strict=True)]))
    return _Answer(
        given, given == item.answer, normalized == item.answer,
        -logs[item.answer], sizes[item.answer], any(result[2] for result in results),
    )  # fmt: skip


def _scored(
    prompt: str, text: str, model: AnsweringModel, encoder: Encoder
) -> tuple[float, bool, bool]:
    """Log-likelihood of a text after a prompt, whether it is greedy, and whether it was cut."""
    head = encoder.encode(prompt, add_eos=False)
    whole = encoder.encode(prompt + text, add_eos=False)
    # tokens may join across the seam; what follows as many tokens as the prompt has is scored
    follows = whole[len(head) :] or whole[-1:]
    before = whole[: len(whole) - len(follows)]
    room = model.context - len(follows)
    if room < 1:
        raise UsageError(
            f"an answer has {len(follows)} tokens and the model sees {model.context}; "
            "this set is too long for it"
        )
    cut = len(before) > room
    logits = model.scores(before[-room:], follows)
    logs = log_softmax(logits)
    total = float(logs[np.arange(len(follows)), follows].sum())
    return total, bool((logits.argmax(axis=1) == follows).all()), cut


def _generated(item: Item, model: AnsweringModel, encoder: Encoder) -> _Answer:
    prompt = encoder.encode(item.prompt, add_eos=False)
    room = max(1, model.context - GENERATED)
    tokens: list[int] = []
    text = ""
    for token in model.generate(prompt[-room:], min(GENERATED, model.context - 1)):
        tokens.append(token)
        text = encoder.decode(tokens)
        if "Question:" in text or re.search(r"####.*\n", text):
            text = text.split("Question:")[0]
            break
    _, mark, last = text.rpartition("####")
    given = _number(last.splitlines()[0] if mark and last.strip() else text)
    right = given is not None and given == item.answer
    return _Answer(given, right, right, 0.0, 0, len(prompt) > room)
