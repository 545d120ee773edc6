"""LiteRT-LM: one .litertlm bundle of decoder, tokenizer and prompt format.

The decoder is that of `edgeq.converters.tflite.decoder`, with its options. The tokenizer is stored
as its tokenizer.json; start and stop tokens, chat template, context and sampling settings as
LiteRT-LM's metadata. LiteRT-LM takes text and gives text (`generate`): where it is installed,
`BundledRunner` has it generate a token to check that it can run the bundle, and takes the logits
from LiteRT running the decoder within.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np

from edgeq.converters.mixers import check_attention_only
from edgeq.converters.options import Options
from edgeq.converters.runners import DecoderRunner
from edgeq.converters.stored import StoredConstant
from edgeq.converters.tflite import read as reading
from edgeq.converters.tflite.decoder import LiteRTDecoderTarget, LiteRTRunner, settings
from edgeq.converters.validate.tokenizer import TargetTokenizer, model_ends
from edgeq.core.errors import FormatError, MissingDependencyError, UnsupportedError
from edgeq.core.progress import Progress
from edgeq.importers.huggingface.tokenizer import (
    HfTokenizer,
    complete_document,
    hf_tokenizer,
)
from edgeq.importers.json_object import read_object
from edgeq.importers.tokenizer.chat_templates import DEFAULT, chat_templates
from edgeq.model.model import Model

_CHUNK = 1 << 22
_UUID = re.compile(rb"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_TIME = re.compile(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}\+00:00")
"""What the builder draws anew for each file, as it lies in the header."""
_PLAIN = """\
{%- set plain = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- if message.content is string or not message.content -%}
{%- set plain.messages = plain.messages + [message] -%}
{%- else -%}
{%- set joined = namespace(text='') -%}
{%- for part in message.content -%}
{%- set joined.text = joined.text ~ (part.text or '') -%}
{%- endfor -%}
{%- set plain.messages = plain.messages + [dict(message, content=joined.text)] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = plain.messages -%}
"""
"""What goes before a chat template: LiteRT-LM 0.18 gives it each message's content as a list of
parts, and templates of language models want text."""
_SAY = """\
import json, sys
import litert_lm as lm
path, prompt, max_tokens, threads = json.loads(sys.argv[1])
lm.set_min_log_severity(lm.LogSeverity.ERROR)
greedy = lm.SamplerConfig(top_k=1, top_p=1.0, temperature=1.0, seed=0)
# with any other cache_dir it leaves a file of repacked weights beside the bundle
with (
    lm.Engine(path, backend=lm.Backend.CPU(thread_count=threads), cache_dir=":nocache") as engine,
    engine.create_session(
        apply_prompt_template=False, sampler_config=greedy, max_output_tokens=max_tokens
    ) as session,
):
    session.run_prefill([prompt])
    print(json.dumps(session.run_decode().texts[0]))
"""
"""What `generate` runs."""
_TOKENIZE = """\
import json, sys
import litert_lm as lm
lm.set_min_log_severity(lm.LogSeverity.ERROR)
with lm.Engine(sys.argv[1], backend=lm.Backend.CPU(thread_count=1), cache_dir=":nocache") as engine:
    print(json.dumps([list(engine.tokenize(text)) for text in json.load(sys.stdin)]))
"""
"""What `LiteRTLMTokenizer` runs."""


class LiteRTLMDecoderTarget(LiteRTDecoderTarget):
    """Decoders in LiteRT-LM bundles."""

    def check(self, model: Model, options: Options) -> None:
        """Refuse what the target cannot hold, before any work.

        Raises:
            FormatError: a tokenizer file is damaged, or a tensor is missing.
            MissingDependencyError: LiteRT or the bundles' builder is not installed.
            UnsupportedError: layers without attention, a scheme LiteRT cannot multiply by, or no
                tokenizer or end of text.
            UsageError: an option out of range.
        """
        check_attention_only(model.config, "LiteRT-LM")
        _builder()
        super().check(model, options)
        if "tokenizer.json" not in model.files:
            raise UnsupportedError(
                "the model has no tokenizer.json, which LiteRT-LM needs; put one next to the "
                "checkpoint and import it again, or convert to tflite"
            )
        if not model_ends(model):
            raise UnsupportedError(
                "the model has no end-of-text token, which LiteRT-LM needs; "
                "set eos_token_id in its generation_config.json"
            )
        _llm_metadata(model, options)

    def memory(self, model: Model, options: Options) -> int:
        """Bytes that `write` needs at its peak."""
        return super().memory(model, options) + 8 * len(model.files["tokenizer.json"])

    def write(
        self, model: Model, out: Path, options: Options, progress: Progress | None = None
    ) -> None:
        """Write the bundle.

        Args:
            model: a model that `check` accepted.
            out: the file, which does not exist; parts are written beside it, under names that
                begin with its name.
            options: those of `edgeq.converters.tflite.decoder`.
            progress: called with what is written, bytes done, and of how many.
        """
        builder = _builder()
        decoder, tokenizer, metadata_file = (
            out.with_name(f"{out.name}.{part}") for part in ("tflite", "tokenizer.json", "metadata")
        )
        try:
            super().write(model, decoder, options, progress)
            tokenizer.write_bytes(complete_document(model.files))
            metadata_file.write_bytes(_llm_metadata(model, options))
            bundle = builder.LitertLmFileBuilder()
            bundle.add_llm_metadata(str(metadata_file))
            bundle.add_hf_tokenizer(str(tokenizer))
            bundle.add_tflite_model(str(decoder), builder.TfLiteModelType.PREFILL_DECODE)
            with out.open("xb") as file:
                bundle.build(file, validate_metadata=True)
            _make_reproducible(out)
        finally:
            for part in (decoder, tokenizer, metadata_file):
                part.unlink(missing_ok=True)

    def versions(self) -> dict[str, str]:
        """The libraries that take part."""
        _builder()
        versions = super().versions()
        for name in ("litert-lm-builder", "litert-lm-api"):
            if is_installed(name):
                versions[name] = metadata.version(name)
        return versions

    def header(self, path: Path) -> reading.Header:
        """The header of the .tflite file within the bundle.

        Raises:
            FormatError: edgeq did not write it.
            MissingDependencyError: the builder of bundles is not installed.
        """
        return _decoder(path)

    def open_runner(self, path: Path, *, threads: int | None = None) -> DecoderRunner:
        """Open the decoder within the bundle in LiteRT.

        Raises:
            FormatError: edgeq did not write the bundle, or LiteRT cannot load it.
            MissingDependencyError: LiteRT or the builder of bundles is not installed.
        """
        return BundledRunner(path, threads=threads)

    def open_frugal(self, path: Path, *, threads: int | None = None) -> DecoderRunner:
        """The same with one signature in memory at a time."""
        return BundledRunner(path, threads=threads, frugal=True)

    def read_constants(self, path: Path) -> Iterator[StoredConstant]:
        """Every constant of the decoder, and the other parts of the bundle as bytes."""
        yield from super().read_constants(path)
        data = np.memmap(path, np.uint8, "r")
        for kind, start, stop in _sections(path):
            if kind != "TFLiteModel":
                yield StoredConstant(kind, data[start:stop])

    def tokenizer(self, path: Path, source: HfTokenizer) -> TargetTokenizer | None:
        """The bundle's tokenizer in LiteRT-LM; None where LiteRT-LM is not installed."""
        return LiteRTLMTokenizer(path) if is_installed("litert-lm-api") else None


class BundledRunner(LiteRTRunner):
    """The decoder of a bundle in LiteRT's interpreter, which reads a copy of it.

    Where LiteRT-LM is installed it must be able to run the bundle too.

    Args:
        path: the bundle.
        threads: it may use; all cores if None.
        frugal: keep one signature at a time.
    """

    def __init__(
        self, path: str | Path, *, threads: int | None = None, frugal: bool = False
    ) -> None:
        header = _decoder(path)
        self._folder = tempfile.TemporaryDirectory(prefix="edgeq-")
        copy = Path(self._folder.name) / "decoder.tflite"
        with Path(path).open("rb") as source, copy.open("wb") as file:
            source.seek(header.start)
            shutil.copyfileobj(source, file, _CHUNK)
        try:
            super().__init__(copy, threads=threads, frugal=frugal)
            if is_installed("litert-lm-api"):
                generate(path, "a", 1)
                self.runtime = f"LiteRT-LM {metadata.version('litert-lm-api')}, {self.runtime}"
        except BaseException:
            self._folder.cleanup()
            raise

    def close(self) -> None:
        """Release everything, and delete the copy."""
        super().close()
        self._folder.cleanup()


def generate(path: str | Path, prompt: str, max_tokens: int = 64, *, threads: int = 1) -> str:
    """Generate text with LiteRT-LM, greedily.

    It runs in a process of its own, because a bundle it cannot read may make it abort.

    Args:
        path: the bundle.
        prompt: text as it is, without a chat template.
        max_tokens: most tokens of the answer.
        threads: it may use.

    Raises:
        FormatError: LiteRT-LM cannot run it.
        MissingDependencyError: LiteRT-LM is not installed.
    """
    if not is_installed("litert-lm-api"):
        raise MissingDependencyError("litert_lm", "litertlm", "to run .litertlm bundles")
    asked = json.dumps([str(path), prompt, max_tokens, threads])
    return str(json.loads(_run(path, _SAY, asked)))


class LiteRTLMTokenizer:
    """A bundle's tokenizer in LiteRT-LM, in a process of its own.

    Args:
        path: the bundle.
    """

    adds_special = False

    def __init__(self, path: str | Path) -> None:
        self._path = path
        self.by = f"LiteRT-LM {metadata.version('litert-lm-api')}"

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text.

        Raises:
            FormatError: LiteRT-LM cannot read the bundle.
        """
        printed = _run(self._path, _TOKENIZE, str(self._path), given=json.dumps(list(texts)))
        return [[int(i) for i in ids] for ids in json.loads(printed)]

    def excuse(self, text: str) -> str | None:
        """Nothing is excused: it runs the tokenizer.json."""
        return None


def _run(path: str | Path, code: str, argument: str, given: str | None = None) -> str:
    """The last line that a process of its own prints, because LiteRT-LM may abort."""
    ran = subprocess.run(
        [sys.executable, "-c", code, argument],
        input=given, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if ran.returncode:
        reasons = [
            line for line in ran.stderr.splitlines() if line and not line.startswith((" ", "Tr"))
        ]
        raise FormatError(f"LiteRT-LM cannot run {path}: {'; '.join(reasons[-3:])}")
    return ran.stdout.splitlines()[-1]


def is_installed(distribution: str) -> bool:
    """Whether a package is installed, by its name in the registry."""
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def _builder() -> Any:
    try:
        import litert_lm_builder
    except ImportError as err:
        raise MissingDependencyError(
            "litert_lm_builder", "litertlm", "to read and write .litertlm bundles"
        ) from err
    return litert_lm_builder


def _make_reproducible(path: Path) -> None:
    """Replace what the builder draws anew for each file by what depends on the content alone.

    The builder writes a random UUID and the time into the header, as text, and offers no way to
    set them. The UUID becomes one of version 8 (RFC 9562), made of the content's SHA-256, and the
    time the start of 1970. A header without one of each, of another version of the builder, stays
    as it is.
    """
    start = min(first for _, first, _ in _sections(path))
    with path.open("r+b") as file:
        header = file.read(start)
        times, ids = _TIME.findall(header), _UUID.findall(header)
        if len(times) != 1 or len(ids) != 1:
            return
        header = header.replace(times[0], b"1970-01-01T00:00:00.000000+00:00")
        digest = hashlib.sha256(header.replace(ids[0], b""))
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
        number = bytearray(digest.digest()[:16])
        number[6], number[8] = number[6] & 0x0F | 0x80, number[8] & 0x3F | 0x80
        file.seek(0)
        file.write(header.replace(ids[0], str(UUID(bytes=bytes(number))).encode()))


def _decoder(path: str | Path) -> reading.Header:
    """The .tflite file within a bundle."""
    models = [(start, stop) for kind, start, stop in _sections(path) if kind == "TFLiteModel"]
    if not models:
        raise FormatError(f"{path} is no .litertlm bundle with a decoder")
    return reading.read(path, *models[0])


def _sections(path: str | Path) -> list[tuple[str, int, int]]:
    """(kind, first byte, byte after the last) of each part of a bundle."""
    _builder()
    from litert_lm_builder import litertlm_peek
    from litert_lm_builder.litertlm_header_schema_py_generated import AnySectionDataType

    kinds = {n: name for name, n in vars(AnySectionDataType).items() if not name.startswith("_")}
    try:
        sections = litertlm_peek.read_litertlm_header(str(path), io.StringIO()).SectionMetadata()
        objects = [sections.Objects(i) for i in range(sections.ObjectsLength())]
        size = Path(path).stat().st_size
        places = [(kinds[s.DataType()], s.BeginOffset(), s.EndOffset()) for s in objects]
    except OSError as err:
        raise FormatError(f"{path} cannot be read: {err.strerror or err}") from err
    except Exception as err:  # the builder raises what flatbuffers and struct happen to raise
        raise FormatError(f"{path} is not a .litertlm bundle with a decoder: {err}") from err
    if any(not 0 <= start <= stop <= size for _, start, stop in places):
        raise FormatError(f"{path} is cut short: a part of it ends after byte {size}")
    return places


def _start_token(model: Model, tokenizer: HfTokenizer) -> int | None:
    """The token that LiteRT-LM must put before a prompt; None if it must put none.

    LiteRT-LM 0.18 puts its start token before every text, rendered conversations included, and
    writes nothing for ``bos_token`` in a template. So a model with a chat template has one only if
    the template uses that variable. A template that writes the token as text, or none, would get
    one token too many.
    """
    bos = tokenizer.prefix[0] if tokenizer.prefix else model.config.bos
    template = chat_templates(model.files).get(DEFAULT)
    wanted = bool(tokenizer.prefix) if template is None else "bos_token" in template
    return bos if wanted else None


def _llm_metadata(model: Model, options: Options) -> bytes:
    """LiteRT-LM's metadata, a protocol buffer."""
    from litert_lm_builder.runtime.proto import llm_metadata_pb2, sampler_params_pb2

    message = llm_metadata_pb2.LlmMetadata()
    config = model.config
    template = chat_templates(model.files).get(DEFAULT)
    tokenizer = hf_tokenizer(model.files)
    start = _start_token(model, tokenizer)
    if start is not None:
        message.start_token.token_ids.ids.append(start)
    for token in model_ends(model):
        message.stop_tokens.add().token_ids.ids.append(token)
    message.max_num_tokens = settings(config, options).context
    message.llm_model_type.generic_model.SetInParent()
    if template is not None:
        message.jinja_prompt_template = _PLAIN + template
    else:
        message.prompt_templates.user.prefix = message.prompt_templates.model.prefix = ""
    message.supports_thinking = False
    message.supports_function_calling = template is not None and "tools" in template
    sampling = read_object(model.files, "generation_config.json")
    if sampling.get("do_sample"):
        message.sampler_params.type = sampler_params_pb2.SamplerParameters.TOP_P
        message.sampler_params.k = int(sampling.get("top_k") or 40)
        message.sampler_params.p = float(sampling.get("top_p") or 1.0)
        message.sampler_params.temperature = float(sampling.get("temperature") or 1.0)
    return bytes(message.SerializeToString())
