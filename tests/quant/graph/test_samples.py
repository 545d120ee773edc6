"""Samples of a graph: where they come from, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from edgeq.core.errors import EdgeqError, FormatError, UsageError
from edgeq.graph.ir import Graph, Info
from edgeq.quant.graph.images import Preprocess, parse_numbers, parse_ratio, parse_size
from edgeq.quant.graph.samples import Samples, open_samples, samples_of

RNG = np.random.default_rng(0)


def graph(**inputs: Info) -> Graph:
    return Graph("g", tuple(inputs), (), (), {}, inputs)


VISION = graph(x=Info((1, 3, 6, 4)))
IMAGES = RNG.standard_normal((10, 3, 6, 4)).astype(np.float32)


def stacked(samples: Samples, name: str = "x") -> np.ndarray:
    return np.concatenate([feeds[name] for feeds in samples])


def save(path: Path, **arrays: object) -> Path:
    np.savez(path, **arrays)
    return path


# --- arrays -----------------------------------------------------------------------------------


def test_rows_of_an_npz_are_samples_and_can_be_read_again(tmp_path: Path) -> None:
    found = open_samples(save(tmp_path / "a.npz", x=IMAGES), VISION)
    for _ in range(2):
        assert np.array_equal(stacked(found), IMAGES)
    assert found.count() == 10
    assert found.first(3).count() == 3


def test_a_limit_spreads_evenly(tmp_path: Path) -> None:
    found = open_samples(save(tmp_path / "a.npz", x=IMAGES), VISION, limit=5)
    assert np.array_equal(stacked(found), IMAGES[::2])


def test_one_array_needs_no_name(tmp_path: Path) -> None:
    assert open_samples(save(tmp_path / "a.npz", data=IMAGES), VISION).count() == 10
    np.save(tmp_path / "a.npy", IMAGES.astype(np.float64))
    assert np.array_equal(stacked(open_samples(tmp_path / "a.npy", VISION)), IMAGES)


def test_a_batch_takes_several_rows(tmp_path: Path) -> None:
    found = open_samples(save(tmp_path / "a.npz", x=IMAGES), graph(x=Info((4, 3, 6, 4))))
    assert [feeds["x"].shape for feeds in found] == [(4, 3, 6, 4)] * 2
    whole = save(tmp_path / "b.npz", x=IMAGES[:8].reshape(2, 4, 3, 6, 4))
    assert open_samples(whole, graph(x=Info((4, 3, 6, 4)))).count() == 2


def test_channels_last_is_transposed_if_requested_and_reported_if_not(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npz", x=IMAGES.transpose(0, 2, 3, 1))
    turned = open_samples(path, VISION, preprocess=Preprocess(layout="nhwc"))
    assert np.array_equal(stacked(turned), IMAGES)
    with pytest.raises(FormatError, match=r"sample 0 .*use --layout nhwc"):
        list(open_samples(path, VISION))
    right = save(tmp_path / "b.npz", x=IMAGES)
    with pytest.raises(FormatError, match="leave out --layout nhwc"):
        list(open_samples(right, VISION, preprocess=Preprocess(layout="nhwc")))


@pytest.mark.parametrize(
    ("arrays", "word"),
    [
        ({"x": IMAGES[:0]}, "contains no samples"),
        ({"y1": IMAGES, "z": IMAGES}, "no array 'x'; it holds y1, z"),
        ({"x": IMAGES[:, :, :5]}, r"sample 0 .* the shape \[1, 3, 5, 4\].* takes \[1, 3, 6, 4\]"),
        ({"x": (IMAGES * 50).astype(np.uint8)}, "uint8 for the input 'x', which takes float32"),
        ({"x": IMAGES.astype(str)}, "<U"),
        ({"x": np.float32(3)}, "is a single number"),
        ({"x": IMAGES, "labels": np.arange(3)}, r"labels .* int64 \[3\]; expected 10"),
        ({"x": IMAGES, "labels": np.zeros(10)}, "float64"),
    ],
)
def test_wrong_arrays_are_refused(tmp_path: Path, arrays: dict, word: str) -> None:
    with pytest.raises(EdgeqError, match=word):
        list(open_samples(save(tmp_path / "a.npz", **arrays), VISION))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_sample_that_is_not_finite_is_named(tmp_path: Path, bad: float) -> None:
    images = IMAGES.copy()
    images[7, 2, 5, 3] = bad
    with pytest.raises(FormatError, match=r"the sample 7 of .*NaN or infinity"):
        list(open_samples(save(tmp_path / "a.npz", x=images), VISION))


def test_integers_must_fit(tmp_path: Path) -> None:
    model = graph(ids=Info((1, 5), "int32"), mask=Info((1, 5), "int64"))
    ids = RNG.integers(0, 9, (3, 5))
    found = list(open_samples(save(tmp_path / "a.npz", ids=ids, mask=ids), model))
    assert found[0]["ids"].dtype == np.int32
    assert np.array_equal(found[2]["mask"][0], ids[2])
    with pytest.raises(FormatError, match="that int32 cannot represent"):
        list(open_samples(save(tmp_path / "b.npz", ids=ids + 2**40, mask=ids), model))
    with pytest.raises(FormatError, match="different numbers of samples: ids 3, mask 2"):
        open_samples(save(tmp_path / "c.npz", ids=ids, mask=ids[:2]), model)
    with pytest.raises(FormatError, match="float64 for the input 'mask'"):
        list(open_samples(save(tmp_path / "d.npz", ids=ids, mask=ids * 0.5), model))


def test_a_folder_of_arrays_is_a_sample_a_file(tmp_path: Path) -> None:
    for i in range(3):
        np.save(tmp_path / f"{i}.npy", IMAGES[i])
    assert np.array_equal(stacked(open_samples(tmp_path, VISION)), IMAGES[:3])
    (tmp_path / "1.npy").write_bytes(b"no array")
    with pytest.raises(FormatError, match=r"1.npy cannot be read"):
        list(open_samples(tmp_path, VISION))


def test_pickles_are_not_opened(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(FormatError, match="cannot be read as arrays"):
        open_samples(tmp_path / "a.npy", VISION)


# --- labels -----------------------------------------------------------------------------------


def test_labels_come_with_the_arrays(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npz", x=IMAGES, labels=np.arange(10) % 3)
    found = open_samples(path, VISION)
    assert [label for _, label in found.pairs()] == [i % 3 for i in range(10)]
    assert found.classes == ("0", "1", "2")
    with pytest.raises(UsageError, match=r"sample 0 .* has no label"):
        next(open_samples(save(tmp_path / "b.npz", x=IMAGES), VISION).pairs())


def test_samples_in_memory() -> None:
    found = samples_of(VISION, [{"x": IMAGES[:1]}, {"x": IMAGES[1:2]}], [1, 0])
    assert [label for _, label in found.pairs()] == [1, 0]
    with pytest.raises(UsageError, match="1 labels for 2 samples"):
        samples_of(VISION, [{}, {}], [1])
    with pytest.raises(FormatError, match=r"lacks the input 'x' \(it has y"):
        list(samples_of(VISION, [{"y": IMAGES[:1]}]))


# --- pictures ---------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    image = pytest.importorskip("PIL.Image")
    for i, name in enumerate(("cat", "dog")):
        (tmp_path / name).mkdir()
        for j in range(2):
            pixels = np.full((6, 4, 3), (10 * (i + 1), 100 + j, 255), np.uint8)
            image.fromarray(pixels).save(tmp_path / name / f"{j}.png")
    return tmp_path


def test_pictures_are_scaled_and_shifted_by_channel(pictures: Path) -> None:
    how = Preprocess(mean=(0.5, 0.25, 0.0), std=(0.5, 1.0, 2.0))
    found = open_samples(pictures, VISION, preprocess=how)
    pairs = list(found.pairs())
    assert [label for _, label in pairs] == [0, 0, 1, 1]
    assert found.classes == ("cat", "dog")
    want = (np.array([20, 101, 255]) / 255 - how.mean) / how.std
    got = pairs[3][0]["x"]
    assert got.shape == (1, 3, 6, 4)
    assert np.allclose(got[0, :, 2, 1], want, atol=1e-6)
    assert found.preprocess.size == (6, 4)
    assert found.preprocess.layout == "nchw"


def test_what_was_done_is_recorded_and_done_again(pictures: Path) -> None:
    first = open_samples(pictures, VISION, preprocess=Preprocess(mean=(0.5,), scale=0.1))
    kept = Graph("g", ("x",), (), (), {}, VISION.values, meta=first.preprocess.to_meta())
    again = Preprocess.from_meta(kept.meta)
    assert np.array_equal(stacked(first), stacked(open_samples(pictures, kept, preprocess=again)))
    assert Preprocess.from_meta({}) == Preprocess()
    with pytest.raises(FormatError, match="not readable"):
        Preprocess.from_meta({"edgeq.preprocess": '{"size": 3}'})


def test_an_input_with_channels_last_takes_pictures_so(pictures: Path) -> None:
    found = open_samples(pictures, graph(x=Info((1, 6, 4, 3))))
    first = next(iter(found))["x"]
    assert first.shape == (1, 6, 4, 3)
    assert np.allclose(first[0, 0, 0] * 255, [10, 100, 255])


@pytest.mark.parametrize("resize", ["stretch", "crop", "pad"])
def test_other_sizes_are_fitted(pictures: Path, resize: str) -> None:
    how = Preprocess(resize=resize)
    found = stacked(open_samples(pictures, graph(x=Info((1, 3, 8, 8))), preprocess=how))
    assert found.shape == (4, 3, 8, 8)
    black = (found[0] == 0).all(axis=0).any()
    assert black == (resize == "pad")


def test_gray_inputs_make_pictures_gray(pictures: Path) -> None:
    assert stacked(open_samples(pictures, graph(x=Info((1, 1, 6, 4))))).shape == (4, 1, 6, 4)


@pytest.mark.parametrize(
    ("model", "how", "word"),
    [
        (graph(x=Info((1, 10))), {}, "images do not fit"),
        (graph(x=Info((1, 7, 6, 9))), {}, "9 channels as NHWC"),
        (VISION, {"size": (8, 8)}, "--image-size is 8x8, and the input 'x' takes 6x4"),
        (VISION, {"mean": (1.0, 2.0)}, "--mean has 2 numbers.* 3 channels"),
        (graph(x=Info((2, 3, 6, 4))), {}, "batches of 2 images; give --shape x=1,3,6,4"),
        (graph(a=Info((1, 3, 6, 4)), b=Info((1, 3, 6, 4))), {}, "graph with one input"),
    ],
)
def test_pictures_that_do_not_fit(pictures: Path, model: Graph, how: dict, word: str) -> None:
    with pytest.raises(EdgeqError, match=word):
        list(open_samples(pictures, model, preprocess=Preprocess(**how)))


def test_a_broken_picture_is_named(pictures: Path) -> None:
    (pictures / "dog" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    with pytest.raises(FormatError, match=r"0.png is not an image"):
        list(open_samples(pictures, VISION))


@pytest.mark.parametrize(
    "bad", [{"std": (0.0,)}, {"scale": 0.0}, {"mean": (float("nan"),)}, {"size": (0, 4)}]
)
def test_numbers_that_cannot_be(bad: dict) -> None:
    with pytest.raises(UsageError):
        Preprocess(**bad)


def test_texts_of_options() -> None:
    assert parse_numbers("0.5,1", "--mean") == (0.5, 1.0)
    assert (parse_size("224"), parse_size("240x320")) == ((224, 224), (240, 320))
    assert parse_ratio("1/255", "--scale") == 1 / 255
    for call in (
        lambda: parse_numbers("a", "--mean"),
        lambda: parse_size("1x2x3"),
        lambda: parse_size(""),
        lambda: parse_ratio("1/0", "--scale"),
    ):
        with pytest.raises(UsageError):
            call()


# --- sentences --------------------------------------------------------------------------------

BERT = graph(
    input_ids=Info((1, 6), "int64"),
    attention_mask=Info((1, 6), "int64"),
    token_type_ids=Info((1, 6), "int32"),
)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[PAD]": 3, "[UNK]": 0, "a": 1, "b": 2}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_sentences_are_padded_and_cut(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "s.txt").write_text("a b c\n\na a a a a a a a\n")
    for given in (tokenizer, tokenizer.parent):
        first, second = open_samples(tmp_path / "s.txt", BERT, tokenizer=given)
        assert first["input_ids"].tolist() == [[1, 2, 0, 3, 3, 3]]
        assert first["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0]]
        assert first["token_type_ids"].dtype == np.int32
        assert second["input_ids"].tolist() == [[1] * 6]


def test_lines_of_json(tmp_path: Path, tokenizer: Path) -> None:
    path = tmp_path / "s.jsonl"
    path.write_text('{"sentence": "a"}\n"b"\n')
    found = [f["input_ids"][0, 0] for f in open_samples(path, BERT, tokenizer=tokenizer)]
    assert found == [1, 2]
    path.write_text('"a"\n{"words": 3}\n')
    with pytest.raises(FormatError, match="line 2 has no sentence"):
        open_samples(path, BERT, tokenizer=tokenizer)


def test_sentences_need_a_tokenizer_and_inputs_for_it(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "s.txt").write_text("a\n")
    with pytest.raises(UsageError, match="--tokenizer"):
        open_samples(tmp_path / "s.txt", BERT)
    with pytest.raises(UsageError, match=r"the input 'x' .* cannot be computed from sentences"):
        open_samples(tmp_path / "s.txt", VISION, tokenizer=tokenizer)
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps({}))
    with pytest.raises(FormatError, match="is not readable"):
        open_samples(tmp_path / "s.txt", BERT, tokenizer=broken)


# --- scripts ----------------------------------------------------------------------------------

SCRIPT = """
import numpy as np
def arrays():
    for i in range(4):
        yield np.full((3, 6, 4), i, np.float32)
def pairs():
    for x in arrays():
        yield {"x": x[None]}, int(x[0, 0, 0])
def fails():
    yield 1 / 0
def named():
    for x in arrays():
        yield x, "cat"
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "load.py"
    path.write_text(SCRIPT)
    return path


def test_a_function_yields_samples_again_and_again(script: Path) -> None:
    found = open_samples(f"{script}:arrays", VISION)
    assert (
        stacked(found)[:, 0, 0, 0].tolist() == stacked(found)[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    )
    pairs = open_samples(f"{script}:pairs", VISION, limit=3)
    assert [label for _, label in pairs.pairs()] == [0, 1, 2]


def test_scripts_that_fail_are_said_so(script: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="ZeroDivisionError"):
        list(open_samples(f"{script}:fails", VISION))
    with pytest.raises(
        UsageError, match=r"no function 'none'; use one of arrays, pairs, fails, named"
    ):
        open_samples(f"{script}:none", VISION)
    with pytest.raises(FormatError, match=r"yields the label 'cat' .* the number of the class"):
        list(open_samples(f"{script}:named", VISION))
    with pytest.raises(UsageError, match=r"absent\.py does not exist"):
        open_samples(f"{tmp_path}/absent.py:f", VISION)
    script.write_text("import nothing_of_that_name")
    with pytest.raises(UsageError, match="ModuleNotFoundError"):
        open_samples(f"{script}:f", VISION)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no samples at"):
        open_samples(tmp_path / "absent", VISION)
    with pytest.raises(UsageError, match="contains no samples"):
        open_samples(tmp_path, VISION)
    (tmp_path / "a.csv").write_text("1")
    with pytest.raises(UsageError, match="is not a source of samples"):
        open_samples(tmp_path / "a.csv", VISION)
