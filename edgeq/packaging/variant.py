"""Build one form of a package: convert it, certify it, and record its golden results."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeq.converters.atomic_output import files_below
from edgeq.converters.certificate import certificate_path
from edgeq.converters.convert import Conversion, convert
from edgeq.converters.options import Options
from edgeq.core.progress import Progress
from edgeq.devices.model_header import facts_of
from edgeq.graph.feeds import Feeds
from edgeq.graph.ir import QuantWeight
from edgeq.packaging import certificates, estimates, golden_graph, golden_text
from edgeq.packaging.manifest import ModelVariant
from edgeq.packaging.platforms import Form
from edgeq.packaging.runners import ENGINE, open_decoder, open_graph
from edgeq.packaging.source import GraphSource, Held, ModelSource
from edgeq.quant.graph.summary import arena_bytes
from edgeq.runtime.tokenizer import Tokenizer

CONTEXT = 2048
"""Default context of a form, in tokens, if the model supports that many."""
_LITERT_CONTEXT = 1280
"""Default context of LiteRT and LiteRT-LM, which decode more slowly with a longer KV cache."""
_STEPS = 8


@dataclass(frozen=True)
class Work:
    """Settings that all forms of a package share while they are built.

    Args:
        root: folder of the package.
        name: name of the package.
        context: context in tokens; None takes the default of each form.
        threads, max_ram, progress, announce: as for `edgeq.convert`.
        suffix: what tells the files of a further recipe from those of the first, such as
            "-w8-g32"; empty for the first.
    """

    root: Path
    name: str
    context: int | None
    threads: int | None
    max_ram: int | None
    progress: Progress | None
    announce: Callable[[str], None] | None
    suffix: str = ""

    def entry(self, form: Form) -> Path:
        """Path of the form's file or folder."""
        if "NAME" not in form.entry:
            return self.root / (form.entry + self.suffix)
        return self.root / form.entry.replace("NAME", self.name + self.suffix)

    def called(self, form: Form) -> str:
        """Identifier of the variant."""
        return form.id + self.suffix

    def write_json(self, name: str, data: Any) -> None:
        """Write a JSON file of the package."""
        path = self.root / name
        path.parent.mkdir(exist_ok=True)
        text = json.dumps(data, indent=1, ensure_ascii=False) + "\n"
        path.write_bytes(text.encode())


def context_of(form: Form, asked: int | None, longest: int) -> int:
    """The context, in tokens, that a form is built for.

    Args:
        form: the form.
        asked: the context that the user gave; None takes the default of the form.
        longest: the longest context that the model supports.
    """
    own = _LITERT_CONTEXT if form.target in ("tflite", "litertlm") else CONTEXT
    return min(asked or own, longest)


def model_variant(
    work: Work, form: Form, source: ModelSource, prompts: list[dict[str, Any]]
) -> tuple[ModelVariant, Mapping[str, str]]:
    """Build a form of a language model.

    Args:
        work: settings that all forms share.
        form: the form to build.
        source: the model.
        prompts: the golden prompts.

    Returns:
        the variant for the manifest, and the versions of the libraries that were used.

    Raises:
        EdgeqError: see `edgeq.convert`.
    """
    context = context_of(form, work.context, source.opened.config.context)
    entry = work.entry(form)
    entry.parent.mkdir(parents=True, exist_ok=True)
    options = Options(context=context, extra=dict(form.settings))
    before = set(files_below(work.root))
    versions: Mapping[str, str] = {}
    if form.target == ENGINE:
        held = source.own()
        shutil.copyfile(held.path, entry)
        name = entry.relative_to(work.root).as_posix()
        certificate = certificates.certify_engine(held.model, entry, name, context)
    else:
        held = source.held_for(form.target, options)
        made = convert(
            held.model, form.target, entry, options,
            steps=_STEPS, max_ram=work.max_ram, threads=work.threads, progress=work.progress,
            announce=work.announce,
        )  # fmt: skip
        certificate, versions = _settled(work, made)
    added = sorted(set(files_below(work.root)) - before)
    place, golden = f"certificates/{work.called(form)}.json", f"golden/{work.called(form)}.json"
    certificates.write(certificate, work.root / place)
    runner = open_decoder(form.target, entry, context)
    try:
        allowed = golden_text.allowed_rms(certificate["precision"], certificate["logits"])
        tokenizer = Tokenizer(held.model.files)
        found = golden_text.record(runner, prompts, tokenizer, allowed, work.progress)
    finally:
        runner.close()
    work.write_json(golden, found)
    facts = facts_of(held.model, work.name)
    nbytes = sum((work.root / file).stat().st_size for file in added)
    memory = estimates.memory(form, facts, nbytes, context)
    needed = memory[-1]["total_bytes"]
    speed, assumptions = estimates.speeds(facts, form.plans, context, needed)
    return _variant(
        work, form, added, facts.scheme, held, place, golden,
        context=context, memory=tuple(memory), speed=tuple(speed), assumptions=tuple(assumptions),
    ), versions  # fmt: skip


def graph_variant(
    work: Work, form: Form, source: GraphSource, samples: list[Feeds]
) -> tuple[ModelVariant, Mapping[str, str]]:
    """Build a form of a graph; see `model_variant`.

    Args:
        work: settings that all forms share.
        form: the form to build.
        source: the graph.
        samples: the golden inputs.
    """
    entry = work.entry(form)
    entry.parent.mkdir(parents=True, exist_ok=True)
    before = set(files_below(work.root))
    made = convert(
        source.graph, form.target, entry, dict(form.settings),
        samples=samples, threads=work.threads, progress=work.progress, announce=work.announce,
    )  # fmt: skip
    certificate, versions = _settled(work, made)
    added = sorted(set(files_below(work.root)) - before)
    place, golden = f"certificates/{work.called(form)}.json", f"golden/{work.called(form)}.json"
    certificates.write(certificate, work.root / place)
    allowed = golden_graph.allowed_errors(certificate["error_allowed"])
    runner = open_graph(form.target, entry)
    try:
        work.write_json(golden, {"runtime": runner.runtime, "allowed": allowed})
    finally:
        runner.close()
    nbytes = sum((work.root / file).stat().st_size for file in added)
    memory = estimates.graph_memory(nbytes, arena_bytes(source.graph))
    return _variant(
        work, form, added, _scheme(source), source, place, golden, memory=(memory,)
    ), versions


def _settled(work: Work, made: Conversion) -> tuple[dict[str, Any], Mapping[str, str]]:
    """The certificate for the package and the versions; deletes the conversion's certificate."""
    assert made.certificate is not None
    certificate_path(made.path, folder=made.path.is_dir()).unlink()
    place = made.path.parent.relative_to(work.root).as_posix()
    certificate = certificates.settled(made.certificate, "" if place == "." else place)
    return certificate, made.certificate["libraries"]


def _scheme(source: GraphSource) -> str:
    bits: dict[str, int] = {}
    for constant in source.graph.constants.values():
        if not isinstance(constant, QuantWeight):
            bits["float"] = bits.get("float", 0) + constant.size
        elif constant.bits != 32:
            kind = f"int{constant.bits}"
            bits[kind] = bits.get(kind, 0) + constant.levels.size
    return max(bits, key=lambda kind: bits[kind], default="float")


def _variant(
    work: Work,
    form: Form,
    files: list[str],
    scheme: str,
    source: Held | GraphSource,
    certificate: str,
    golden: str,
    **more: Any,
) -> ModelVariant:
    return ModelVariant(
        id=work.called(form),
        form=form.id,
        title=form.title,
        target=form.target,
        entry=work.entry(form).relative_to(work.root).as_posix(),
        files=tuple(files),
        scheme=scheme,
        why=(*form.why, source.why),
        requires=dict(form.requires),
        devices=form.devices,
        certificate=certificate,
        golden=golden,
        **more,
    )
