"""Which container holds which integers, their common terms, and the decoder in NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from edgeq.converters.encoding import (
    Container,
    Encoding,
    encode,
    folded,
    group_size,
    levels,
    spread,
)
from edgeq.converters.validate.kernels import ggml
from edgeq.core.errors import FormatError, UnsupportedError
from edgeq.formats.schemes import GROUP_SIZES, QuantScheme, parse_scheme
from edgeq.formats.tensor import QuantTensor
from edgeq.model.reference import Reference
from edgeq.model.trace import TracedReference
from tests.families import FAMILIES, quantized, random_model, rounded, tiny_config

FOUR = Container(4, groups=(32, 64))
FOUR_ASYM = Container(4, groups=(32,), asymmetric=True)
FIVE = Container(5, groups=(32,), folds=True)
EIGHT = Container(8, groups=(32,), channel=True)
PALETTE = Container(4, groups=(32,), palette=True)


def scheme(text: str) -> QuantScheme:
    found = parse_scheme(text)
    assert isinstance(found, QuantScheme)
    return found


@pytest.mark.parametrize(
    ("text", "containers", "want"),
    [
        ("w4-g32", (EIGHT, FOUR), Encoding(FOUR, 32)),
        ("w4-g64", (EIGHT, FOUR), Encoding(FOUR, 64)),
        ("w4-g128", (EIGHT, FOUR), Encoding(FOUR, 64)),
        ("w3-g32", (EIGHT, FOUR), Encoding(FOUR, 32)),
        ("w2-g32-sym", (EIGHT, FOUR), Encoding(FOUR, 32)),
        ("w4-channel", (EIGHT, FOUR), Encoding(FOUR, 64)),
        ("w4-tensor", (EIGHT,), Encoding(EIGHT, None)),
        ("w8-channel", (EIGHT, FOUR), Encoding(EIGHT, None)),
        ("w4-g32-asym", (FOUR, FOUR_ASYM, FIVE), Encoding(FOUR_ASYM, 32)),
        ("w4-g32-asym", (FOUR, FIVE), Encoding(FIVE, 32)),
        ("w4-g32-palette", (FOUR, EIGHT, PALETTE), Encoding(PALETTE, 32)),
        ("w4-g32-palette", (FOUR, EIGHT), Encoding(EIGHT, 32)),
    ],
)
def test_the_narrowest_container_that_is_exact(
    text: str, containers: tuple[Container, ...], want: Encoding
) -> None:
    assert encode("w", scheme(text), 512, containers, "it") == want


@pytest.mark.parametrize(
    ("text", "containers", "words"),
    [
        ("w4-g16", (FOUR, EIGHT), "it cannot hold w as w4-g16; quantize it as one of w4-g32"),
        ("w4-g32-asym", (FOUR, EIGHT), "as w4-g32-asym"),
        ("w8-g32-asym", (FIVE,), "as w8-g32-asym"),
        ("w8-g32", (FOUR,), "w4-g32, w4-g64"),
    ],
)
def test_what_none_holds_is_refused_with_what_would_do(
    text: str, containers: tuple[Container, ...], words: str
) -> None:
    with pytest.raises(UnsupportedError, match=words):
        encode("w", scheme(text), 512, containers, "it")


@pytest.mark.parametrize("k", [32, 48, 76, 172, 256, 300])
@pytest.mark.parametrize(
    "text",
    ["w4-g32", "w4-g16", "w3-g64", "w2-g16-asym", "w4-g32-asym", "w4-g32-palette", "w8-channel",
     "w4-tensor"],
)  # fmt: skip
def test_levels_and_scales_are_the_weights(text: str, k: int) -> None:
    weights = np.random.default_rng(k).standard_normal((37, k)).astype(np.float32)
    tensor = rounded(weights, text)
    size = tensor.scheme.group_size
    for fold in (False, True):
        codes, scales, zeros = levels(tensor, 5, 30, fold=fold)
        assert (zeros is None) == (tensor.scheme.symmetric or fold)
        whole = folded(codes, zeros)
        finest = min(size or 16, 16)
        each = np.repeat(spread(scales, k, size, finest), finest, axis=1)[:, :k]
        np.testing.assert_array_equal(whole * each, tensor.rows(5, 30))


@pytest.mark.parametrize("k", [16, 17, 33, 40, 48, 100, 172, 512])
def test_a_group_s_size_follows_from_how_many_there_are(k: int) -> None:
    for size in GROUP_SIZES:
        if size < k:
            assert group_size(k, -(-k // size)) == size
            assert group_size(k, QuantScheme(4, group_size=size).n_groups(k)) == size
    assert group_size(k, 1) is None
    with pytest.raises(FormatError, match="groups in a row"):
        group_size(k, 999)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_builder_is_the_reference(family: str) -> None:
    model = quantized(random_model(tiny_config(family)), "w4-g32")
    reference = Reference(model)
    tokens = np.arange(14) * 5 % 101
    builder, cache = TracedReference(model), reference.new_cache()
    for part in (tokens[:9], tokens[9:10], tokens[10:]):
        got = builder.trace(part)["logits"]
        np.testing.assert_allclose(got, reference.forward(part, cache), rtol=1e-5, atol=1e-5)
    builder.reset()
    want = reference.forward(tokens)
    np.testing.assert_allclose(builder.trace(tokens)["logits"], want, rtol=1e-5, atol=1e-5)


def test_each_step_is_computed_from_the_target_s_own_inputs() -> None:
    """A wrong step shows, and the steps after it do not."""
    model = random_model(tiny_config("qwen3"))
    right = TracedReference(model).trace([3, 5, 7])
    names = list(right)
    wrong = dict(TracedReference(model).trace([3, 5, 7]))
    at = "layers.0.k_rope"
    # what a runtime with this one fault would give: all that follows is computed from it
    wrong[at] = wrong[at] * 1.5
    wrong = dict(TracedReference(model).trace([3, 5, 7], {at: wrong[at]})) | {at: wrong[at]}
    assert not np.allclose(wrong["layers.1.out"], right["layers.1.out"], rtol=1e-3)
    ours = TracedReference(model).trace([3, 5, 7], wrong)
    differ = [name for name in names if not np.allclose(ours[name], wrong[name], rtol=1e-4)]
    assert differ == [at]


def test_a_palette_entry_is_a_level() -> None:
    weights = np.random.default_rng(3).standard_normal((16, 64)).astype(np.float32)
    tensor = rounded(weights, "w3-g32-palette")
    assert isinstance(tensor, QuantTensor)
    assert tensor.palette is not None
    codes, _, zeros = levels(tensor)
    assert zeros is None
    assert set(np.unique(codes)) <= set(tensor.palette.tolist())


def test_blocks_of_256_are_rounded_as_q8_k() -> None:
    """As ggml's quantize_row_q8_K_ref: the number of the largest magnitude becomes -127."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 512)).astype(np.float32)
    x[1, :256] = 0
    x[2, 300] = 9
    weight = quantized(
        random_model(tiny_config("llama", hidden=512, heads=4, head_dim=128)), "w4-g32"
    ).tensors["model.layers.0.mlp.up_proj.weight"]
    rounded_x = np.zeros_like(x)
    for row in range(3):
        for a in (0, 256):
            block = x[row, a : a + 256]
            largest = block[np.abs(block).argmax()]
            if largest:
                inverse = np.float32(-127) / largest
                codes = np.minimum(np.rint(inverse * block), 127)
                rounded_x[row, a : a + 256] = codes * (np.float32(1) / inverse)
    want = rounded_x @ weight.numpy().T
    for kind in ("Q4_K", "IQ4_XS"):
        np.testing.assert_allclose(ggml({"w": kind})("w", x, weight), want, rtol=1e-4, atol=1e-5)
    assert not np.allclose(ggml({"w": "Q4_0"})("w", x, weight), want, rtol=1e-4, atol=1e-5)
