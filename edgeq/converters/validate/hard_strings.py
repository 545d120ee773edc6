"""Two hundred texts on which tokenizers differ when they are not the same.

The texts are fixed, but for those that hold the special tokens of the tokenizer in hand.
"""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Sequence

COUNT = 200
"""Texts that are compared."""

_WHITESPACE = (
    "",
    " ",
    "  ",
    "   ",
    "    ",
    "\n",
    "\n\n",
    "\n\n\n",
    "\t",
    "\t\t",
    " \t",
    "\t ",
    "\r\n",
    "\r",
    "\n \n",
    " \n",
    "\n ",
    "  \n\n  ",
    "a\nb",
    "a \nb",
    "a\n b",
    "a\r\nb\r\n",
    "a\tb",
    "a  b",
    "a   b",
    "a     b",
    " a",
    "  a",
    "   a",
    "a ",
    "a  ",
    " a ",
    "\ta",
    "\na",
    "a\n",
    "a\n\n",
    "\n  indented",
    "\u00a0a",
    "a\u00a0b",
    "a\u2003b",
    "a\u3000b",
    "a\u200bb",
    "a\u2028b",
    "a\x0bb\x0cc",
    "\x85a",
    " " * 17 + "x",
    "x" + " " * 33,
    "\n" * 9,
    "\t" * 7 + "x",
    "one\n\n\n\ntwo",
    ". \n\n ",
    "- a\n  - b\n",
)
_LATIN = (
    "Hello World",
    "hello world",
    "HELLO WORLD",
    "hELLo wORLd",
    "Once upon a time, there was a fox.",
    "It's John's, they're, we'll, I'd, I'VE, DON'T, o'clock, 'tis",
    "rock'n'roll 'quoted' \"said\"",
    "caf\u00e9 na\u00efve r\u00e9sum\u00e9 \u00fcber stra\u00dfe",
    "cafe\u0301 nai\u0308ve re\u0301sume\u0301",
    "\u0130stanbul \u0131\u015f\u0131k \u00c5ngstr\u00f6m A\u030angstro\u0308m",
    "\ufb01ne \ufb02ow \u00bd \u2460 \u2122 \u210c",
    "\uff28\uff45\uff4c\uff4c\uff4f\u3000\uff11\uff12\uff13\uff01",
    "x\u00b2 + y\u2083 = \u221e \u00b1 \u221a2 \u2260 \u2264",
    "\u03a3\u03af\u03c3\u03c5\u03c6\u03bf\u03c2 \u03bf\u03b4\u03cc\u03c2",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! \u0419\u0438\u0419",
    "\u0418\u0306 \u0415\u0308",
    "\u01c4 \u01c5 \u01c6 \u0132",
    "e\u0301\u0323\u0302 q\u0307\u0323",
    "a\u0300\u0301\u0302\u0303\u0304",
    "\u201cquotes\u201d \u2018single\u2019 \u2014 dash \u2013 en\u2026",
    "`` '' `code` ``` ",
    "a.b.c,d;e:f!g?h",
    "...",
    "!!!???",
    "--- *** ===",
    "(parentheses) [brackets] {braces} <angles>",
    "a&b @user #tag $5 50% 1^2 ~x |y| \\z /w",
    "_under_score__dunder__",
    "e-mail: some.one+tag@example.co.uk",
    "https://example.com/a/b?q=1&r=%20x#frag",
    "ftp://x.y:80/\u00e9",
    "C:\\Users\\name\\file.txt",
    "/usr/local/bin/../lib",
    "The end .  Really ? Yes ! ( ok ) n't 's",
)
_NUMBERS = (
    "0",
    "1",
    "12",
    "123",
    "1234",
    "12345",
    "1234567890",
    "3.14159",
    "1,000,000.00",
    "1e-5",
    "0x1F",
    "2024-02-29T23:59:60Z",
    "12:34",
    "+1 (555) 010-9999",
    "1/2 \u00bc \u2156",
    "\u0661\u0662\u0663 \u0967\u0968\u0969 \u0e51\u0e52",
    "\u2160\u2161\u2162 \u4e00\u4e8c\u4e09",
    "v1.2.3-rc.4",
    "100%",
    "a1b22c333",
)
_SCRIPTS = (
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002",
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8\u3067\u3059\u3002",
    "\u30ab\u3099 \u30ac \u304b\u3099",
    "\ud55c\uad6d\uc5b4 \ubb38\uc7a5",
    "\u1112\u1161\u11ab\u1100\u116e\u11a8",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645",
    "\u0627\u0644\u0644\u0651\u064e\u0647\u0650 \ufdfa",
    "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd",
    "\u05e9\u05b8\u05c1\u05dc\u05d5\u05b9\u05dd",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e",
    "\u0995\u09cd\u09b7 \u0995\u09cb",
    "\u0ba4\u0bae\u0bbf\u0bb4\u0bcd \u0bc6\u0bbe",
    "\u0c24\u0c46\u0c32\u0c41\u0c17\u0c41",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e0a\u0e32\u0e27\u0e42\u0e25\u0e01",
    "\u0e01\u0e33 \u0e01\u0e4d\u0e32",
    "\u1019\u103c\u1014\u103a\u1019\u102c",
    "\u17a2\u1780\u17d2\u179f\u179a",
    "\u12a0\u121b\u122d\u129b",
    "\u10e5\u10d0\u10e0\u10d7\u10e3\u10da\u10d8",
    "\u0540\u0561\u0575\u0565\u0580\u0565\u0576",
    "\U00010348\U0001d11e\U00020bb7",
    "ti\u1ebfng Vi\u1ec7t",
    "tie\u0302\u0301ng Vie\u0323\u0302t",
    "mixed \u4e2d\u6587 and English \u0438 \u0440\u0443\u0441\u0441\u043a\u0438\u0439",
    "\u2581\u2581low line \u2581x",
    "\u0120Hello \u010a\u0122",
    "<0x41><0x0A> [UNK] ##ing",
)
_EMOJI = (
    "\U0001f600",
    "\U0001f600\U0001f601\U0001f602",
    "a\U0001f600b",
    "\U0001f44d\U0001f3fd",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466",
    "\U0001f3f3\ufe0f\u200d\U0001f308",
    "\U0001f1e9\U0001f1ea\U0001f1eb\U0001f1f7",
    "1\ufe0f\u20e3 \u2764\ufe0f \u2764",
    " \U0001f680 to the moon",
)
_CODE = (
    "def f(x):\n    return x**2  # square\n",
    "for (int i = 0; i < n; ++i) {\n\ta[i] += b[i];\n}\n",
    "if x != None and not y:\n        pass",
    '<html>\n  <body class="a">&nbsp;</body>\n</html>',
    '{"key": [1, 2.5, null, true], "n": {"a": "b\\n"}}',
    "SELECT * FROM t WHERE a='b' -- c\n",
    "x = 'it''s' + \"\\\"q\\\"\"",
    "a->b::c<<d>>e&&f||!g",
    "| a | b |\n|---|---|\n| 1 | 2 |",
    "# Title\n\n* item\n* item 2\n\n> quote",
    "\\begin{align} \\frac{a}{b} \\end{align}",
    "camelCaseAndPascalCase snake_case kebab-case SCREAMING_CASE",
)
_ODD = (
    "\ufeffwith a byte order mark",
    "bell\x07 escape\x1b[31m delete\x7f",
    "\x01\x02\x1c\x1f",
    "soft\u00adhyphen",
    "\u202eright to left\u202c",
    "\ufffd\ufffe",
    "\U0010ffff",
    "\ue000 private",
    "a" * 300,
    "ab" * 150,
    "Donaudampfschifffahrtsgesellschaftskapit\u00e4nspatent" * 3,
    "\u00e9" * 40,
    "\u4e2d" * 40,
    "1" * 70,
    "!" * 50,
    "aAbBcC" * 20,
)
_FRAMES = (
    "{0}",
    "a{0}b",
    "a {0} b",
    "{0} a",
    " {0}",
    "a  {0}  b",
    "{0}\nHi{0}\n",
    "a\n{0}\n\nb",
    "{0}{0}",
    "x{0} 1{0}é",
)
"""How special tokens are put into text."""


def hard_strings(special: Sequence[str] = ()) -> list[str]:
    """`COUNT` texts: whitespace, languages, numbers, code, emoji, and special tokens in text.

    Args:
        special: texts of added tokens, of which the first and the last ones are used.
    """
    fixed = [*_WHITESPACE, *_LATIN, *_NUMBERS, *_SCRIPTS, *_EMOJI, *_CODE, *_ODD]
    picked = list(dict.fromkeys((*special[:4], *special[-4:])))
    texts = [
        frame.format(token) if "{0}" in frame else frame
        for frame, token in itertools.product(_FRAMES, picked)
    ]
    if len(picked) > 1:  # turns of a chat
        first, second = picked[0], picked[-1]
        texts.insert(0, f"{first}user\nWhat is 2+2?{second}\n{first}assistant\n")
        texts.insert(1, f"{first} user {second} {first}\n\n assistant")
    room = max(COUNT - len(fixed), 20)
    every = texts[:: max(1, len(texts) // room)] if texts else []
    chosen = list(dict.fromkeys((*every[:room], *fixed)))
    filler = (f"{a} {b}" for a, b in itertools.product(_LATIN, _SCRIPTS))
    while len(chosen) < COUNT:
        text = next(filler)
        if text not in chosen:
            chosen.append(text)
    return chosen[:COUNT]


def composed(text: str) -> str:
    """The text in Unicode's composed form, NFC."""
    return unicodedata.normalize("NFC", text)
