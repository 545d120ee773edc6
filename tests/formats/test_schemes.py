from __future__ import annotations

from typing import Any

import pytest

from edgeq.core.errors import SchemeError
from edgeq.formats.schemes import (
    BITS,
    BY_BITS,
    FLOAT_TAGS,
    GROUP_SIZES,
    METHOD_NAMES,
    FloatScheme,
    FloatType,
    QuantScheme,
    parse_scheme,
)

EVERY = [
    QuantScheme(bits, symmetric, granularity, group)
    for bits in BITS
    for symmetric in (True, False)
    for granularity, group in (
        ("tensor", None), ("channel", None), *(("group", size) for size in GROUP_SIZES)
    )
] + [QuantScheme(bits, codebook="palette") for bits in (2, 3, 4)]  # fmt: skip
EVERY += [QuantScheme(bits, False, "group", 32, minimum=True) for bits in BITS]
EVERY += [
    QuantScheme(bits, not minimum, "group", size, minimum=minimum, two_level=True)
    for bits in BITS
    for size in (16, 32)
    for minimum in (True, False)
]
EVERY += [QuantScheme(4, codebook="palette", two_level=True)]


@pytest.mark.parametrize("scheme", EVERY, ids=str)
def test_every_scheme_reads_back_from_its_text(scheme: QuantScheme) -> None:
    assert parse_scheme(str(scheme)) == scheme


def test_texts_are_unique() -> None:
    assert len({str(scheme) for scheme in EVERY}) == len(EVERY)


@pytest.mark.parametrize("bits", BITS)
def test_every_number_of_bits_has_a_usual_scheme(bits: int) -> None:
    scheme = BY_BITS[bits]
    assert scheme.bits == bits
    assert parse_scheme(f" {str(scheme).upper()} ") == scheme


@pytest.mark.parametrize("method", METHOD_NAMES)
@pytest.mark.parametrize("text", ["w4-g32", "w2-g16-asym", "w8-channel", "w3-g32-palette"])
def test_a_scheme_may_name_its_method(text: str, method: str) -> None:
    scheme = parse_scheme(f"{text}-{method}", method=True)
    assert isinstance(scheme, QuantScheme)
    assert (scheme.method, scheme.stored) == (method, parse_scheme(text))
    assert str(scheme) == f"{text}-{method}"
    assert parse_scheme(str(scheme), method=True) == scheme
    with pytest.raises(SchemeError, match="unknown scheme"):
        parse_scheme(f"{text}-{method}")


def test_float_types_have_other_spellings() -> None:
    for text in ("fp16", "float16", "F16"):
        assert parse_scheme(text) == FloatScheme("float16")
    assert parse_scheme("float") == parse_scheme("float32") == FloatScheme("float32")
    assert parse_scheme("bfloat16") == FloatScheme("bfloat16")


def test_the_two_bit_preset_is_asymmetric() -> None:
    assert parse_scheme("w2-g16") == QuantScheme(2, False, "group", 16)
    assert str(QuantScheme(2, True, "group", 16)) == "w2-g16-sym"


@pytest.mark.parametrize("dtype", FLOAT_TAGS)
def test_float_types(dtype: FloatType) -> None:
    scheme = parse_scheme(FLOAT_TAGS[dtype])
    assert scheme == parse_scheme(dtype) == FloatScheme(dtype)
    assert str(scheme) == FLOAT_TAGS[dtype]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("w7-g32", "bits is 7; use one of 2, 3, 4, 5, 6, 8"),
        ("w4-g48", "group_size is 48; use one of 16, 32, 64, 128, 256"),
        ("w4-g33", "group_size is 33"),
        ("q4_0", "unknown scheme 'q4_0'"),
        ("w4_g32", "did you mean 'w4-g32'"),
        ("w8-g32-palette", "a palette has 2 to 4 bits"),
        ("", "unknown scheme ''"),
        ("f64", "unknown scheme 'f64'"),
    ],
)
def test_refusals_say_what_is_allowed(text: str, words: str) -> None:
    with pytest.raises(SchemeError) as caught:
        parse_scheme(text)
    assert words in str(caught.value)


def test_impossible_combinations_are_refused_at_construction() -> None:
    with pytest.raises(SchemeError, match="leave it out"):
        QuantScheme(4, granularity="channel", group_size=32)
    with pytest.raises(SchemeError, match="unknown granularity"):
        QuantScheme(4, granularity="row")  # type: ignore[arg-type]
    with pytest.raises(SchemeError, match="unknown codebook"):
        QuantScheme(4, codebook="lut")  # type: ignore[arg-type]
    with pytest.raises(SchemeError, match="unknown float type 'f8'"):
        FloatScheme("f8")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("scheme", "k", "padded", "groups"),
    [
        ("w4-g32", 172, 192, 6),
        ("w4-g16", 33, 64, 4),
        ("w4-g128", 172, 256, 2),
        ("w8-channel", 33, 64, 1),
        ("w8-tensor", 1, 32, 1),
        ("w4-g256", 256, 256, 1),
    ],
)
def test_padding(scheme: str, k: int, padded: int, groups: int) -> None:
    chosen = parse_scheme(scheme)
    assert isinstance(chosen, QuantScheme)
    assert chosen.padded_k(k) == padded
    assert chosen.n_groups(k) == groups


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"symmetric": True, "minimum": True}, "is not symmetric"),
        ({"symmetric": False, "minimum": True, "granularity": "channel", "group_size": None},
         "only groups have a minimum"),
        ({"two_level": True, "group_size": 64}, "use 16 or 32"),
        ({"two_level": True, "symmetric": False}, "use a minimum"),
    ],
)  # fmt: skip
def test_impossible_schemes_of_others_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(SchemeError, match=words):
        QuantScheme(4, **settings)
