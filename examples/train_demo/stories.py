"""The stories the demo model learns from: cleaned, re-cased, split, and cut into tokens.

Two plain files of TinyStories text are read: one in the original case, one all lower-case whose
first half is the same stories. The half that the first file lacks is given its capitals back by
counts taken from the cased training stories (`Recaser`), so the model only ever reads properly
cased English. Whole stories are set aside, some to choose the checkpoint by and others to
measure it on; training stories that share a tenth of their ten-word runs with them are dropped.
"""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BOS, EOS = "<|bos|>", "<|eos|>"
CASED, LOWER = "tinystories_train_2MB.txt", "tinystories_train_lowercase_4MB.txt"
MOJIBAKE = {"â€œ": '"', "â€™": "'", "â€˜": "'", "â€“": "-", "â€”": "-", "â€¦": "...", "â€": '"'}
PUNCTUATION = {"“": '"', "”": '"', "’": "'", "‘": "'", "–": "-", "—": "-", "…": "..."}


def clean(story: str) -> str:
    """Straight quotes, one newline between paragraphs, no doubled spaces."""
    for wrong, right in (MOJIBAKE | PUNCTUATION).items():
        story = story.replace(wrong, right)
    return re.sub(r"\s*\n\s*", "\n", re.sub(r"[ \t]+", " ", story)).strip()


def shingles(story: str) -> set[str]:
    """Every run of ten words, without case or punctuation."""
    words = re.findall(r"[a-z']+", story.lower())
    return {" ".join(words[i : i + 10]) for i in range(len(words) - 9)}


def without_overlap(stories: Iterable[str], known: set[str]) -> list[str]:
    """The stories of which less than a tenth of the ten-word runs are in `known`."""
    return [s for s in stories if (own := shingles(s)) and len(own & known) < 0.1 * len(own)]


class Recaser:
    """Gives lower-case text its capitals back, by counts from cased text.

    A word's form is looked up by what stands before it (the punctuation, or the previous word)
    and after it, then by what stands before alone, then by the word alone.
    """

    WORD = re.compile(r"[A-Za-z]+(?:'[A-Za-z]+)*")

    def __init__(self, stories: Iterable[str]) -> None:
        self.forms: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
        self.upper: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for story in stories:
            for before, word, after in self._words(story):
                key = word.lower()
                self.upper[before][word[0].isupper()] += 1
                for k in ((before, key, after), (before, key)):
                    self.forms[k][word] += 1
                if before[0].isalpha() or before == ", ":  # not the start of a sentence
                    self.forms[(key,)][word] += 1

    def _words(self, story: str) -> Iterator[tuple[str, str, str]]:
        found = list(self.WORD.finditer(story))
        for i, m in enumerate(found):
            gap = story[found[i - 1].end() : m.start()] if i else "\n"
            after = story[m.end() : m.end() + 1].strip()
            if not after and i + 1 < len(found):
                after = found[i + 1].group().lower()
            yield (found[i - 1].group().lower() if gap == " " else gap), m.group(), after

    def __call__(self, story: str) -> str:
        """The story, given in lower case, with capitals."""
        out, names = [], set()
        for before, word, after in self._words(story):
            form = None
            for key in ((before, word, after), (before, word), (word,)):
                counts = self.forms.get(key)
                if counts and counts.total() >= 2 and (len(key) > 1 or before[0].isalpha()):
                    form = counts.most_common(1)[0][0]
                    break
            lower, upper = self.upper.get(before, (0, 1))
            if form is None:  # after something that mostly has a capital after it, or a new name
                upper -= 2 * lower + 2 if before[0].isalpha() else 0
                form = word.capitalize() if upper > lower or word in names else word
            if before == "named" or (word.removesuffix("'s") in names and form == word):
                form = word[0].upper() + word[1:]
            if form[0].isupper() and ((word,) not in self.forms or before == "named"):
                names.add(word)
            out.append(form)
        rest = iter(out)
        return self.WORD.sub(lambda _: next(rest), story)


def load_stories(data: Path) -> tuple[list[str], list[str], list[str]]:
    """Training, validation and held-out stories."""
    text = (data / CASED).read_text(encoding="utf-8", errors="replace")
    cased = [clean(s) for s in text.split("<|endoftext|>")][:-1]  # the last one is cut short
    cased = [s for s in dict.fromkeys(cased) if s.isascii() and len(s) > 200]
    test = [s for i, s in enumerate(cased) if i % 13 == 6]
    valid = [s for i, s in enumerate(cased) if i % 39 == 1]
    kept_apart = set().union(*map(shingles, test + valid))
    train = without_overlap(cased, kept_apart)

    # In the lower-case file a lone newline ends a story, but also some paragraphs.
    lower: list[str] = []
    for part in re.split(r"(?<!\n)\n(?!\n)", (data / LOWER).read_text(encoding="utf-8")):
        if len(part) >= 400 or part.startswith("once") or not lower:
            lower.append(part)
        else:
            lower[-1] += "\n" + part
    lower = [s for s in dict.fromkeys(map(clean, lower)) if s.isascii() and len(s) > 200]
    lower = without_overlap(lower, set().union(*map(shingles, text.split("<|endoftext|>"))))
    recase = Recaser(train)
    right = total = 0
    for story in valid:
        pairs = list(
            zip(
                Recaser.WORD.findall(story),
                Recaser.WORD.findall(recase(story.lower())),
                strict=True,
            )
        )
        right, total = right + sum(a == b for a, b in pairs), total + len(pairs)
    print(
        f"{len(train)} cased, {len(lower)} re-cased, {len(valid)} validation, {len(test)} "
        f"held-out stories; {right / total:.2%} of validation words re-cased right",
        flush=True,
    )
    return train + [recase(s) for s in lower], valid, test


def train_tokenizer(stories: Iterable[str], vocab: int) -> Tokenizer:
    """A byte-level BPE that puts the begin token before a text."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(
        stories,
        trainers.BpeTrainer(
            vocab_size=vocab,
            special_tokens=[BOS, EOS],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    tok.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 0)]
    )
    return tok


def packed(stories: list[list[int]], length: int, rng: random.Random) -> Iterator[list[int]]:
    """Windows of `length` tokens for ever: whole stories one after another, then -1 to the end."""
    while True:
        started: list[list[int]] = []
        for story in rng.sample(stories, len(stories)):
            story = story[:length]
            roomy = [w for w in started if len(w) + len(story) <= length]
            window = max(roomy, key=len, default=None)
            if window is None:
                started.append(window := [])
            window += story
            if len(window) > length - 40 or len(started) > 64:
                full = max(started, key=len)
                started = [w for w in started if w is not full]
                yield full + [-1] * (length - len(full))
