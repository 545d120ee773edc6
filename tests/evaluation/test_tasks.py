"""Evaluation sets: read as published, scored as said."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from edgeq.core.errors import FormatError, UsageError
from edgeq.evaluation.tasks import Item, evaluate_task, read_items
from tests.conftest import need

HELLASWAG = {
    "ind": 24, "activity_label": "Roof shingle removal", "ctx_a": "A man is sitting on a roof.",
    "ctx_b": "he", "ctx": "A man is sitting on a roof. he", "split": "val",
    "endings": ["is using wrap to wrap a pair of skis.", "is ripping level tiles off.",
                "is holding a rubik's cube. [header] Now.", "starts pulling up roofing."],
    "label": "3",
}  # fmt: skip
MMLU = {
    "question": "Which is prime?", "subject": "elementary_mathematics",
    "choices": ["4", "7", "9", "12"], "answer": 1,
}  # fmt: skip
LAMBADA = {"text": "She looked at the ring and said the name of the ring"}
GSM8K = {"question": "Two and two?", "answer": "2+2=<<2+2=4>>4\n#### 1,004"}


def written(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


class Letters:
    """A tokenizer of single characters; BOS is 0."""

    def encode(self, text: str, add_bos: bool = True, add_eos: bool | None = None) -> list[int]:
        return [0] * add_bos + [ord(c) % 128 for c in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(i) for i in ids if i)


class Wants:
    """A subject that finds the characters of one text likely after the prompt, in their order."""

    def __init__(self, text: str, context: int = 1000, say: str = "") -> None:
        self.context, self._text, self._say = context, text, say
        self.prompts: list[list[int]] = []

    def scores(self, prompt: list[int], continuation: list[int]) -> np.ndarray:
        self.prompts.append(prompt)
        logits = np.zeros((len(continuation), 128))
        for i in range(len(continuation)):
            if i < len(self._text):
                logits[i, ord(self._text[i])] = 5.0
        return logits

    def generate(self, prompt: list[int], n: int) -> Iterator[int]:
        self.prompts.append(prompt)
        yield from [ord(c) for c in self._say][:n]


def test_layouts_are_recognized_by_their_keys_and_read(tmp_path: Path) -> None:
    name, items = read_items(written(tmp_path / "h", HELLASWAG, HELLASWAG))
    assert (name, len(items)) == ("hellaswag", 2)
    assert items[0].prompt == "Roof shingle removal: A man is sitting on a roof. He"
    assert items[0].choices[3] == " starts pulling up roofing."
    assert items[0].choices[2] == " is holding a rubik's cube. Now."
    assert items[0].answer == 3
    name, items = read_items(written(tmp_path / "m", MMLU, {**MMLU, "answer": "C"}))
    assert name == "mmlu"
    assert items[0].prompt.endswith("Which is prime?\nA. 4\nB. 7\nC. 9\nD. 12\nAnswer:")
    assert "about elementary mathematics." in items[0].prompt
    assert [item.answer for item in items] == [1, 2]
    name, items = read_items(written(tmp_path / "l", LAMBADA))
    assert (name, items[0].prompt[-11:], items[0].choices) == ("lambada", "name of the", (" ring",))
    name, items = read_items(written(tmp_path / "g", GSM8K))
    assert (name, items[0].answer) == ("gsm8k", "1004")


def test_published_files_are_read() -> None:
    folder = need("data/evals_dev")
    name, items = read_items(folder / "lambada_test.jsonl")
    assert (name, len(items)) == ("lambada", 5153)
    name, items = read_items(folder / "gsm8k_test.jsonl", limit=100)
    assert (name, len(items)) == ("gsm8k", 100)
    assert items[0].answer == "18"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no lines"),
        ("[1]\n", "line 1 is a list"),
        ("not json\n", "is not JSON lines"),
        ('{"a": 1}\n', "keys a, which no known layout has"),
        (
            json.dumps({**HELLASWAG, "label": ""}),
            "line 1 is not a question of hellaswag.*no answer",
        ),
        (json.dumps({**MMLU, "answer": 9}), "answer 9 of 4 choices"),
        (json.dumps({"text": "word"}), "no second word"),
        (json.dumps(LAMBADA) + "\n" + json.dumps({"x": 1}), "line 2 has no 'text'"),
        (json.dumps({**GSM8K, "answer": "4"}), "does not end in '#### number'"),
    ],
)
def test_what_is_no_set_is_refused_by_line(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text(text, "utf-8")
    with pytest.raises(FormatError, match=words):
        read_items(path)


def test_unknown_layouts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="lambada"):
        read_items(written(tmp_path / "l", LAMBADA), "lambda")


def test_choices_are_compared_by_likelihood_and_by_character() -> None:
    # " ab" twice as likely a byte as " zzzzzzzz" but that has more characters at even odds
    items = [Item("choice", "q", (" ab", " ax"), 0), Item("choice", "q", (" ax", " zz"), 1)]
    outcome = evaluate_task("mmlu", items, Wants(" ab"), Letters())
    assert outcome.n == 2
    assert outcome.accuracy == 0.5
    assert outcome.stderr == pytest.approx(math.sqrt(0.125))
    # the right ending is long: less likely as a whole, likelier a byte
    long = [Item("choice", "q", (" a", " " + "b" * 30), 1)]
    wants = Wants(" " + "b" * 30)
    found = evaluate_task("mmlu", long, wants, Letters())
    hit = 5 - math.log(127 + math.exp(5))
    assert found.nll_per_byte == pytest.approx(-hit)
    assert found.accuracy == float(31 * hit > hit - math.log(127 + math.exp(5)))
    assert found.accuracy_normalized == 1.0


def test_the_space_before_a_choice_does_not_count_for_its_length() -> None:
    # every letter is as likely: 3 of them for 2 characters, 4 for 3
    items = [Item("choice", "q", (" ab", " abc"), 1)]
    assert evaluate_task("mmlu", items, Wants("none"), Letters()).accuracy_normalized == 1.0


def test_last_words_are_right_when_every_token_is_the_likeliest() -> None:
    items = [Item("last word", "the", (" ring",), 0), Item("last word", "the", (" rinx",), 0)]
    outcome = evaluate_task("lambada", items, Wants(" ring"), Letters())
    assert outcome.accuracy == 0.5
    assert outcome.accuracy_normalized is None


@pytest.mark.parametrize(
    ("said", "right"),
    [("It is 2.\n#### 1,004\nmore 7", True), ("so 1004.0", True), ("#### 5\n", False),
     ("no idea", False), ("1004\nQuestion: 5", True)],
)  # fmt: skip
def test_numbers_are_taken_from_what_is_generated(said: str, right: bool) -> None:
    items = [Item("number", "Question: x\nAnswer:", (), "1004")]
    outcome = evaluate_task("gsm8k", items, Wants("", say=said), Letters())
    assert outcome.accuracy == float(right)
    assert outcome.nll_per_byte is None


def test_changed_answers_are_counted() -> None:
    items = [Item("choice", "q", (" a", " b"), 0), Item("choice", "q", (" a", " c"), 1)]
    outcome = evaluate_task("mmlu", items, Wants(" a"), Letters(), base=Wants(" b"))
    assert outcome.base_accuracy == 0.0
    assert (outcome.flips, outcome.flips_right, outcome.flips_base_right) == (1, 1, 0)


def test_long_questions_lose_their_beginning_and_say_so() -> None:
    wants = Wants(" a", context=8)
    items = [Item("choice", "0123456789", (" a", " b"), 0)]
    outcome = evaluate_task("mmlu", items, wants, Letters())
    assert outcome.truncated == 1
    assert wants.prompts[0] == [ord(c) for c in "456789"]
    with pytest.raises(UsageError, match="too long"):
        evaluate_task("mmlu", [Item("choice", "q", (" " + "a" * 20,), 0)], wants, Letters())
    with pytest.raises(UsageError, match="no questions"):
        evaluate_task("mmlu", [], wants, Letters())
