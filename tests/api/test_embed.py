"""Embeddings and reranking on small published-like folders, against Transformers' hidden states."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import edgeq
from edgeq.core.errors import EdgeqError, FormatError, UnsupportedError, UsageError
from edgeq.importers.gguf.file import open_gguf
from edgeq.runtime.engine import Engine
from tests.real_models import MINILM, real_model
from tests.sentence_models import TEXTS, theirs, write_modules, write_tokenizer

torch = pytest.importorskip("torch", reason="needs torch")
transformers = pytest.importorskip("transformers", reason="needs transformers")

IDENTITY = "torch.nn.modules.linear.Identity"
TANH = "torch.nn.modules.activation.Tanh"
LAST = {"word_embedding_dimension": 32, "pooling_mode_lasttoken": True}
MEAN = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 320, "max_position_embeddings": 512,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
PROMPTS = {
    "prompts": {"query": "Instruct: find\nQuery:", "document": ""}, "default_prompt_name": None,
    "similarity_fn_name": "cosine",
}  # fmt: skip


def qwen3(folder: Path, template: str = "$A <eos>", spread: float = 0.02) -> Path:
    torch.manual_seed(0)
    config = transformers.Qwen3Config(**SIZES, initializer_range=spread)
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder)
    write_tokenizer(folder, template)
    return folder


def gemma(folder: Path, *, both_ways: bool = True, **over: Any) -> Path:
    torch.manual_seed(1)
    config = transformers.Gemma3TextConfig(
        **{**SIZES, "sliding_window": 12, "query_pre_attn_scalar": 8,
           "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
           "use_bidirectional_attention": both_ways, **over}
    )  # fmt: skip
    transformers.Gemma3TextModel(config).save_pretrained(folder)
    write_tokenizer(folder, "<bos> $A <eos>")
    return folder


def unit(vector: NDArray[Any]) -> NDArray[Any]:
    return vector / np.linalg.norm(vector)


def ids_of(folder: Path, text: str) -> list[int]:
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    return list(tokenizer(text)["input_ids"])


def close(got: NDArray[Any], want: NDArray[Any]) -> None:
    """Alike up to the rounding of a float16 cache."""
    assert got.shape == want.shape
    assert np.abs(got - want).max() < 4e-3 * np.abs(want).max()


def test_qwen3_embedding(tmp_path: Path) -> None:
    folder = qwen3(tmp_path)
    write_modules(folder, LAST, prompts=PROMPTS)
    assert ids_of(folder, TEXTS[0])[-1] == 2  # the tokenizer ends a text, and that is pooled
    for prompt, name in (("", None), (PROMPTS["prompts"]["query"], "query")):
        want = np.stack([unit(theirs(folder, ids_of(folder, prompt + text))[-1]) for text in TEXTS])
        close(edgeq.embed(folder, TEXTS, prompt_name=name, kv_bits=16, threads=1), want)
        for backend in ("numba", "numpy"):
            got = edgeq.embed(folder, TEXTS, prompt=prompt, kv_bits=16, backend=backend, threads=1)
            close(got, want)
    want = np.stack([unit(theirs(folder, ids_of(folder, text))[-1][:8]) for text in TEXTS])
    short = edgeq.embed(folder, TEXTS, dimensions=8, kv_bits=16, threads=1)
    close(short, want)
    assert np.allclose(np.linalg.norm(short, axis=1), 1, atol=1e-6)
    whole = edgeq.embed(folder, TEXTS[0], dimensions=8, normalize=False, kv_bits=16, threads=1)
    close(whole, unit(theirs(folder, ids_of(folder, TEXTS[0]))[-1])[:8])


@pytest.mark.parametrize("window", [4, 12, 1000])
@pytest.mark.parametrize("kv_bits", [8, 16])
@pytest.mark.parametrize("backend", ["numba", "numpy"])
def test_both_ways_in_windows(tmp_path: Path, window: int, kv_bits: Any, backend: str) -> None:
    """More tokens than a batch, than a chunk of the cache and than windows, in one pass."""
    folder = gemma(tmp_path, sliding_window=window)
    ids = np.random.default_rng(2).integers(5, 320, 300).tolist()
    want = theirs(folder, ids)
    limit = {8: 0.02, 16: 5e-3}[kv_bits]
    model = edgeq.load(folder)
    assert not model.config.causal
    states = []
    for threads in (1, 3):
        with Engine(
            model, context=400, threads=threads, kv_bits=kv_bits, backend=backend
        ) as engine:
            states.append(engine.hidden(ids))
            engine.reset()
            assert np.array_equal(engine.hidden(ids), states[-1])
    assert np.array_equal(*states)
    assert np.abs(states[0] - want).max() < limit * np.abs(want).max()
    causal = theirs(gemma(tmp_path / "causal", both_ways=False, sliding_window=window), ids)
    assert np.abs(causal - want).max() > 0.1 * np.abs(want).max()


def test_a_text_is_run_as_a_whole(tmp_path: Path) -> None:
    model = edgeq.load(gemma(tmp_path))
    with Engine(model, context=64, threads=1) as engine:
        engine.hidden([5, 6, 7])
        with pytest.raises(UsageError, match="a text is run as a whole, in one pass"):
            engine.hidden([8])
        engine.reset()
        with pytest.raises(UnsupportedError, match="cannot generate text or score it"):
            engine.forward([5])
        with pytest.raises(UnsupportedError, match="cannot generate text or score it"):
            engine.greedy(5, 3)
    with pytest.raises(UnsupportedError, match="cannot generate text or score it"):
        list(edgeq.run(model, "a", raw=True, threads=1))
    reference = edgeq.Reference(model)
    cache = reference.new_cache()
    reference.forward([5, 6], cache)
    with pytest.raises(UsageError, match="a text is run as a whole, in one pass"):
        reference.forward([7], cache)
    with pytest.raises(UsageError, match="the context has 0 tokens and 302 more were given"):
        edgeq.embed(model, "a" * 300, context=64, pooling="mean")
    targets = {"gguf": "gguf", "ort": "onnx", "tflite": "tflite", "coreml": "mlpackage"}
    for target, suffix in targets.items():
        with pytest.raises(EdgeqError, match="attention sees what comes after a token"):
            edgeq.convert(model, target, tmp_path / f"no.{suffix}")


def test_embedding_gemma(tmp_path: Path) -> None:
    folder = gemma(tmp_path)
    prompts = {"prompts": {"query": "task: search result | query: ", "STS": "task: similar: "},
               "default_prompt_name": "STS"}  # fmt: skip
    with pytest.raises(UsageError, match="files do not say how its hidden states become a vector"):
        edgeq.embed(folder, "a")
    dense = write_modules(
        folder, MEAN, [(32, 96, False, IDENTITY), (96, 24, True, TANH)], prompts=prompts,
        transformer={"max_seq_length": 40, "do_lower_case": False},
    )  # fmt: skip

    def want(text: str, n: int = 24) -> NDArray[Any]:
        pooled = theirs(folder, ids_of(folder, text)).astype(np.float64).mean(axis=0)
        (first, _, _), (second, bias, _) = dense
        return unit(np.tanh(second @ (first @ pooled) + bias)[:n])

    short = TEXTS[0]
    close(edgeq.embed(folder, short, kv_bits=16, threads=1), want("task: similar: " + short))
    got = edgeq.embed(folder, [short], prompt_name="query", dimensions=10, kv_bits=16, threads=1)
    close(got[0], want("task: search result | query: " + short, 10))
    close(edgeq.embed(folder, short, prompt="", kv_bits=16, threads=1), want(short))
    with pytest.raises(UsageError, match="embeds at most 40"):
        edgeq.embed(folder, TEXTS[1] * 3)
    with pytest.raises(UsageError, match="dimensions is 25; vectors of this model have 1 to 24"):
        edgeq.embed(folder, short, dimensions=25)
    with pytest.raises(UsageError, match="prompt 'sts'"):
        edgeq.embed(folder, short, prompt_name="sts")
    # an artifact holds the modules
    edgeq.quantize(folder, tmp_path / "q.edgeq", "w8-g32", threads=1)
    quantized = edgeq.embed(tmp_path / "q.edgeq", short, prompt="", kv_bits=16, threads=1)
    assert float(quantized @ want(short)) > 0.99
    assert not np.array_equal(quantized, edgeq.embed(folder, short, prompt="", kv_bits=16))


@pytest.mark.parametrize(("config", "kind"), [(LAST, 3), (MEAN, 1)])
def test_gguf_says_how_it_is_pooled(tmp_path: Path, config: dict[str, Any], kind: int) -> None:
    pytest.importorskip("gguf", reason="needs the extra gguf")
    folder = qwen3(tmp_path)
    write_modules(folder, config)
    edgeq.convert(folder, "gguf", tmp_path / "m.gguf", validate=False)
    keys = open_gguf(tmp_path / "m.gguf").metadata
    assert keys["qwen3.pooling_type"] == kind
    assert keys["tokenizer.ggml.add_eos_token"] is True
    want = edgeq.embed(folder, TEXTS, threads=1)
    np.testing.assert_allclose(edgeq.embed(tmp_path / "m.gguf", TEXTS, threads=1), want, atol=1e-3)


def test_a_prompt_that_is_not_pooled(tmp_path: Path) -> None:
    folder = gemma(tmp_path)
    write_modules(folder, {**MEAN, "include_prompt": False}, prompts=PROMPTS, normalize=False)
    prompt = PROMPTS["prompts"]["query"]
    states = theirs(folder, ids_of(folder, prompt + TEXTS[0]))
    skipped = len(ids_of(folder, prompt)) - 1  # without the token that ends a text
    want = states[skipped:].mean(axis=0)
    got = edgeq.embed(folder, TEXTS[0], prompt_name="query", kv_bits=16, normalize=False, threads=1)
    close(got, want)
    assert np.abs(states.mean(axis=0) - want).max() > 0.02 * np.abs(want).max()


def test_calibration_reads_texts_as_a_whole(tmp_path: Path) -> None:
    """No text is sampled from a model that cannot generate, and what is measured sees both ways."""
    folder = gemma(tmp_path)
    write_modules(folder, MEAN)
    edgeq.quantize(folder, tmp_path / "q.edgeq", "w4-g32-gptq", threads=1)
    float_vector = edgeq.embed(folder, TEXTS[1], threads=1)
    calibrated = edgeq.embed(tmp_path / "q.edgeq", TEXTS[1], threads=1)
    assert float(calibrated @ float_vector) > 0.97


def test_qwen3_reranker(tmp_path: Path) -> None:
    folder = qwen3(tmp_path, spread=0.1)
    query, documents = "what is warm?", [*TEXTS, "yes no yes"]
    library = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def published(document: str, instruction: str) -> float:
        """As the model card computes a score."""
        prefix = (
            "<|im_start|>system\nJudge whether the Document meets the requirements based on the "
            'Query and the Instruct provided. Note that the answer can only be "yes" or "no".'
            "<|im_end|>\n<|im_start|>user\n"
        )
        suffix = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
        pair = f"<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}"
        ids = [
            i for text in (prefix, pair, suffix)
            for i in library(text, add_special_tokens=False)["input_ids"]
        ]  # fmt: skip
        with torch.no_grad():
            last = model(torch.tensor([ids])).logits[0, -1]
        answers = [library.convert_tokens_to_ids(word) for word in ("no", "yes")]
        return float(torch.log_softmax(last[answers], dim=0).exp()[1])

    web = "Given a web search query, retrieve relevant passages that answer the query"
    for instruction in (web, "Judge the color"):
        got = edgeq.rerank(
            folder, query, documents, instruction=None if instruction is web else instruction,
            kv_bits=16, threads=1,
        )  # fmt: skip
        want = np.array([published(document, instruction) for document in documents])
        assert got.dtype == np.float32
        assert np.abs(got - want).max() < 0.05 * np.ptp(want)
        assert np.ptp(want) > 0.02
    with pytest.raises(UsageError, match="the context holds 64; split the document"):
        edgeq.rerank(folder, query, ["a"], context=64)
    with pytest.raises(UsageError, match="no documents"):
        edgeq.rerank(folder, query, [])
    with pytest.raises(UnsupportedError, match="family gemma3; edgeq reranks with models of qwen3"):
        edgeq.rerank(gemma(tmp_path / "g"), query, ["a"])


class _States(torch.nn.Module):  # type: ignore[misc, name-defined]
    """An encoder whose graph has hidden states, with the mask as the example's exporter has it."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Any, attention_mask: Any) -> Any:
        added = (1.0 - attention_mask.float()[:, None, None, :]) * -10000.0
        types = torch.zeros_like(input_ids)
        return self.encoder(
            input_ids=input_ids, attention_mask=added, token_type_ids=types
        ).last_hidden_state


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_encoder_as_onnx(tmp_path: Path) -> None:
    """MiniLM's shape by the example's exporter, and hidden states with axes that are left open."""
    pytest.importorskip("onnxruntime", reason="needs the extra ort")
    config = transformers.BertConfig(
        vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=64, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    model.save_pretrained(tmp_path)
    write_tokenizer(tmp_path, "<bos> $A <eos>")
    write_modules(tmp_path, MEAN, transformer={"max_seq_length": 60, "do_lower_case": True})
    (tmp_path / "onnx").mkdir()
    for name, length, free in (("free", 9, True), ("fixed", 40, False)):
        axes = {0: "batch", 1: "sequence"}
        tokens = torch.ones(1, length, dtype=torch.long)
        torch.onnx.export(
            _States(model), (tokens, tokens), str(tmp_path / "onnx" / f"{name}.onnx"), dynamo=False,
            opset_version=17, input_names=["input_ids", "attention_mask"],
            output_names=["last_hidden_state"],
            dynamic_axes=dict.fromkeys(("input_ids", "attention_mask", "last_hidden_state"), axes)
            if free else None,
        )  # fmt: skip
    texts = [TEXTS[0], "Déjà vu"]
    states = [theirs(tmp_path, ids_of(tmp_path, text.lower())) for text in texts]
    want = np.stack([unit(one.mean(axis=0)) for one in states])
    for name in ("free", "fixed"):
        file = tmp_path / "onnx" / f"{name}.onnx"
        np.testing.assert_allclose(edgeq.embed(file, texts), want, atol=2e-5)
        first = np.stack([unit(one[0][:6]) for one in states])
        got = edgeq.embed(file, texts, pooling="cls", dimensions=6)
        np.testing.assert_allclose(got, first, atol=2e-5)
    with pytest.raises(UsageError, match="onnx takes 40; split the text"):
        edgeq.embed(tmp_path / "onnx" / "fixed.onnx", "a" * 50)
    with pytest.raises(UsageError, match="embeds at most 60"):
        edgeq.embed(tmp_path / "onnx" / "free.onnx", "a" * 70)
    (tmp_path / "1_Pooling" / "config.json").unlink()
    (tmp_path / "modules.json").unlink()
    with pytest.raises(UsageError, match="files do not say how"):
        edgeq.embed(file, "a")
    with pytest.raises(UsageError, match=r"there is no tokenizer\.json in"):
        edgeq.embed(file, "a", tokenizer=tmp_path / "onnx")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_minilm(tmp_path: Path) -> None:
    """The published model, exported by the example, with its own tokenizer and files."""
    pytest.importorskip("onnxruntime", reason="needs the extra ort")
    folder = real_model(f"{MINILM}/model")
    from tests.converters.test_example_exporters import example

    example("export_minilm").export(folder, tmp_path / "minilm.onnx", 64)
    texts = ["A man is eating food.", "A man eats a piece of bread.", "The cat sleeps."]
    got = edgeq.embed(tmp_path / "minilm.onnx", texts, tokenizer=folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    want = np.stack([
        unit(theirs(folder, tokenizer(text)["input_ids"]).mean(axis=0)) for text in texts
    ])  # fmt: skip
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert got[0] @ got[1] > 0.5 > got[0] @ got[2]
    with pytest.raises(UsageError, match="a vector that is pooled already"):
        edgeq.embed(tmp_path / "minilm.onnx", texts, tokenizer=folder, pooling="mean")


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, "are pooled by max"),
        ("1_Pooling/config.json", {"pooling_mode": ["cls", "mean"]}, "are pooled by cls, mean"),
        ("1_Pooling/config.json", {"pooling_mode": "mean", "temperature": 2}, "temperature is 2"),
        ("2_Dense/config.json", {"in_features": 32, "out_features": 16, "bias": False,
                                 "activation_function": "torch.nn.modules.activation.GELU"},
         "activation_function is 'torch.nn.modules.activation.GELU'"),
        ("2_Dense/config.json", {"in_features": 32, "out_features": 8, "bias": False,
                                 "activation_function": IDENTITY}, "asks for"),
        ("2_Dense/config.json", {"in_features": 32, "out_features": 16, "bias": False,
                                 "activation_function": IDENTITY, "use_residual": True},
         "use_residual is true"),
        ("2_Dense/config.json", {"in_features": 32, "out_features": 16, "bias": False,
                                 "activation_function": IDENTITY,
                                 "module_input_name": "token_embeddings"}, "module_input_name is"),
        ("modules.json", [{"type": "a.Transformer", "path": ""}, {"type": "a.LSTM", "path": "b"}],
         "a module LSTM"),
        ("modules.json", [{"type": "a.Pooling", "path": "1_Pooling"},
                          {"type": "a.Transformer", "path": ""}], "in this order"),
        ("modules.json", [{"type": "a.Transformer", "path": "../x"}], "is '../x'; give a folder"),
        ("sentence_bert_config.json", {"query_length": 7}, "query_length is 7"),
        ("sentence_bert_config.json", {"transformer_task": "fill-mask"}, "'fill-mask'"),
        ("config_sentence_transformers.json", {"prompts": [1]}, "must map names to texts"),
        ("config_sentence_transformers.json", {"default_prompt_name": "q"}, "is none of the"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused(
    tmp_path: Path, file: str, content: Any, words: str
) -> None:
    folder = tmp_path / "m"
    shutil.copytree(qwen3(tmp_path / "q"), folder)
    write_modules(folder, LAST, [(32, 16, False, IDENTITY)])
    edgeq.embed(folder, "a", threads=1)
    (folder / file).write_text(json.dumps(content))
    with pytest.raises((UnsupportedError, FormatError), match=words):
        edgeq.embed(folder, "a", threads=1)
