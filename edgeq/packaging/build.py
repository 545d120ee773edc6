"""Build a package: a folder with the forms of a model, tests, glue code and a manifest."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from edgeq._version import __version__
from edgeq.converters.atomic_output import files_below, publish, staging
from edgeq.converters.targets import require_target
from edgeq.core.errors import SchemeError, UnsupportedError, UsageError, check_type, unknown
from edgeq.core.files import no_room
from edgeq.core.progress import Progress
from edgeq.graph.feeds import Feeds
from edgeq.graph.ir import Graph
from edgeq.importers import source_kind
from edgeq.model.model import Model
from edgeq.packaging import (
    estimates,
    glue,
    golden_graph,
    manifest,
    readme,
    schema,
    signing,
    templates,
    tree,
)
from edgeq.packaging import labels as naming
from edgeq.packaging.layout import check_output, package_name, refuse_inside
from edgeq.packaging.license import License, given
from edgeq.packaging.manifest import Manifest, ModelVariant
from edgeq.packaging.platforms import Form, Kind, Platform, platform_named
from edgeq.packaging.prompts import PROMPTS, TOKENIZER, golden_prompts
from edgeq.packaging.runners import ENGINE
from edgeq.packaging.source import GraphSource, ModelSource, describe_graph, describe_model
from edgeq.packaging.variant import Work, context_of, graph_variant, model_variant
from edgeq.quant.decoder.model_card import model_card
from edgeq.quant.graph.samples import Samples
from edgeq.quant.recipe import Recipe

_ROOM = 8
"""Tokens of the context that golden prompts leave free for the answer."""


@dataclass(frozen=True)
class Package:
    """A finished package.

    Args:
        path: folder of the package.
        manifest: the content of ``manifest.json``.
        nbytes: size of all files of the package, in bytes.
        seconds: wall-clock time that building took.
        signed_by: the public key of the signature, in hexadecimal; None if it is not signed.
    """

    path: Path
    manifest: Manifest
    nbytes: int
    seconds: float
    signed_by: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The package as ``edgeq package --format json`` prints it."""
        made = self.manifest
        return {
            "path": str(self.path),
            "name": made.name,
            "platform": made.platform,
            "kind": made.kind,
            "digest": made.digest,
            "nbytes": self.nbytes,
            "seconds": round(self.seconds, 3),
            "signed_by": self.signed_by,
            "variants": [
                {
                    "id": variant.id,
                    "title": variant.title,
                    "entry": variant.entry,
                    "nbytes": sum(made.files[file].nbytes for file in variant.files),
                    "scheme": variant.scheme,
                    "why": list(variant.why),
                }
                for variant in made.variants
            ],
            "tiers": [asdict(tier) for tier in made.tiers],
        }


def package(
    source: Model | Graph | str | Path,
    platform: str,
    out: str | Path,
    *,
    name: str | None = None,
    forms: Sequence[str] | None = None,
    preset: str | None = None,
    variants: Sequence[str] = (),
    context: int | None = None,
    data: Samples | Iterable[Feeds] | str | Path | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    dequantize: bool = False,
    labels: Sequence[str] | str | Path | None = None,
    license: str | None = None,
    base_model: str | None = None,
    sign: str | Path | None = None,
    force: bool = False,
    threads: int | None = None,
    max_ram: int | None = None,
    progress: Progress | None = None,
    announce: Callable[[str], None] | None = None,
) -> Package:
    """Build a package for app developers: model files, tokenizer, golden tests and glue code.

    A table lists the forms that each platform can run. Each form is converted, validated and run
    on the golden tests. The same source and the same versions of the libraries give the same bytes
    on a machine, in whatever folder and at whatever time the package is built.

    Args:
        source: a language model or a graph, or the path of one.
        platform: "ios", "android", "rpi" or "ort-mobile".
        out: the folder to write.
        name: name of the package: a lower-case letter, then lower-case letters, digits and
            hyphens, at most 63 characters. None derives it from the name of the source.
        forms: identifiers of the platform's forms to build; all of them if None.
        preset: recipe by which the weights are quantized first. None quantizes float weights by
            the default recipe and keeps weights that are integers already.
        variants: for language models, further recipes, such as "w8-g32". Each form is also built
            with the weights quantized by each of them, if its runtime has that scheme, and the code
            of the package runs the largest one whose memory is free on the device.
        context: for language models, the number of tokens that the forms are built for. None means
            2048 (1280 for LiteRT-LM), or what the model supports if that is less.
        data: for graphs, real inputs for calibration and for the golden tests: samples, a list of
            samples, or a path, as for `edgeq.quantize`.
        shapes: for graphs, shapes of inputs whose sizes the file does not fix.
        dequantize: for graphs, convert the integer weights of a .tflite file to float first.
        labels: for graphs, the names of the classes in the order of their numbers, or a text file
            with one name per line. None means the names in the file's metadata.
        license, base_model: the license and the base model, if the files of the model do not state
            them or state them wrongly.
        sign: path of an Ed25519 private key (PEM) that signs the manifest.
        force: replace an existing package.
        threads: number of threads for quantization, conversion and validation. None means all
            cores, or 1 for graphs.
        max_ram: for language models, the most bytes of memory that each conversion may take.
        progress: called with what is done, how far, and of how much.
        announce: called before the work with a sentence about the size of an output or about
            defaults.

    Raises:
        UsageError: the platform or a form is unknown, the output exists already or its parent
            folder does not exist, the model has no tokenizer, or an argument is for the other kind
            of source.
        MissingDependencyError: a Python package is not installed; the message names the extra.
        UnsupportedError: a form cannot represent the source.
        FormatError: the source is damaged.
        EdgeqError: the output cannot be written, or does not compute what its source does.

    Example:
        >>> made = edgeq.package("model.edgeq", "rpi", "for-my-pi")
        >>> made.manifest.platform, [variant.id for variant in made.manifest.variants]
        ('rpi', ['edgeq'])
    """
    started = time.perf_counter()
    path = Path(out)
    chosen = platform_named(platform)
    check_type("context", context, int, None)
    graph = isinstance(source, Graph) or (
        not isinstance(source, Model) and source_kind(source) == "graph"
    )
    kind: Kind = "graph" if graph else "language model"
    listed = _chosen_forms(chosen, kind, forms)
    if graph and (context is not None or max_ram is not None or variants):
        raise UsageError(
            "context, max_ram and variants are for language models, and the source is a graph"
        )
    suffixes = _suffixes(variants, preset)
    if not graph and (data is not None or shapes or dequantize or labels is not None):
        raise UsageError(
            "data, shapes, dequantize and labels are for graphs, and the source is a language model"
        )
    if context is not None and context < 2 * _ROOM:
        raise UsageError(f"context is {context}; use {2 * _ROOM} tokens or more")
    check_output(path, force)
    given(License(), license, base_model)
    package_name(name, None)
    if isinstance(source, str | Path):
        refuse_inside(Path(source), path, "which overwriting would delete; give another output")
    key = signing.read_private_key(sign) if sign is not None else None
    for form in listed:
        if form.target != ENGINE:
            require_target(form.target)
    with staging(path) as folder:
        root, scratch = folder / "written" / path.name, folder / "scratch"
        root.mkdir(parents=True)
        scratch.mkdir()
        others: dict[str, ModelSource] = {}

        if graph:
            assert not isinstance(source, Model)
            opened: ModelSource | GraphSource = GraphSource(
                source, data, shapes, preset, dequantize, labels, threads, progress
            )
        else:
            assert not isinstance(source, Graph)
            opened = ModelSource(source, scratch, preset, threads, max_ram, progress)
            for recipe, suffix in suffixes.items():
                (scratch / suffix).mkdir()
                others[suffix] = ModelSource(
                    opened.opened, scratch / suffix, recipe, threads, max_ram, progress, exact=True
                )
        glue.check(platform, opened)
        called = package_name(name, opened.path)
        work = Work(root, called, context, threads, max_ram, progress, announce)
        built, versions = (
            _graphs(work, listed, opened) if isinstance(opened, GraphSource)
            else _models(work, listed, {"": opened, **others})
        )  # fmt: skip
        tiers = [
            tier for form in listed
            for tier in estimates.tiers(
                chosen.name, form, [variant for variant in built if variant.form == form.id]
            )
        ]  # fmt: skip
        known = given(opened.license, license, base_model)
        made = Manifest(
            work.name, chosen.name, kind, __version__,
            _described(opened, work.name, known),
            tuple(built), tuple(tiers), dict(sorted(versions.items())),
        )  # fmt: skip
        glue.write_glue(root, made, opened)
        schema.write(root)
        readme.write(root, made)
        made = replace(made, files=tree.entries_of(root, progress))
        (root / manifest.NAME).write_bytes(made.to_bytes())
        signed_by = signing.sign(root, key) if key is not None else None
        nbytes = sum(file.stat().st_size for file in files_below(root).values())
        try:
            publish(root.parent, path, folder, force)
        except OSError as err:
            raise no_room(str(path), err) or err from err
    return Package(path, made, nbytes, time.perf_counter() - started, signed_by)


def _chosen_forms(chosen: Platform, kind: Kind, forms: Sequence[str] | None) -> list[Form]:
    known = {form.id: form for form in chosen.forms(kind)}
    if forms is None:
        return list(known.values())
    if isinstance(forms, str) or not forms:
        raise UsageError(f"forms is {forms!r}; give a list of {', '.join(known)}")
    for one in forms:
        if one not in known:
            raise UsageError(unknown(f"form of a {kind} for {chosen.name}", str(one), known))
    return [known[one] for one in known if one in forms]


def _suffixes(variants: Sequence[str], preset: str | None) -> dict[str, str]:
    """Further recipe -> what tells its files from those of the first."""
    listed = isinstance(variants, Sequence) and not isinstance(variants, str)
    if not listed or not all(isinstance(one, str) for one in variants):
        raise UsageError(f"variants is {variants!r}; give a list of recipes, such as ['w8-g32']")
    suffixes: dict[str, str] = {}
    for recipe in variants:
        Recipe.from_options(preset=recipe, source="decoder")
        suffix = "-" + re.sub(r"[^a-z0-9.]+", "-", recipe.lower()).strip("-")
        if recipe == preset or suffix in suffixes.values():
            raise UsageError(f"the recipe {recipe} is given twice; give each recipe once")
        suffixes[recipe] = suffix
    return suffixes


def _models(
    work: Work, forms: list[Form], sources: Mapping[str, ModelSource]
) -> tuple[list[ModelVariant], dict[str, str]]:
    """Build all forms of a language model, its tokenizer, golden prompts and quality reports.

    Args:
        work: settings that all forms share.
        forms: the forms to build.
        sources: suffix of the names of files -> the model in a recipe; the first has none.
    """
    source = sources[""]
    config = source.opened.config
    files = source.opened.files
    for file, content in sorted(files.items()):
        target = work.root / TOKENIZER / file
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    least = min(context_of(form, work.context, config.context) for form in forms)
    prompts = golden_prompts(files, config.vocab, least - _ROOM)
    work.write_json(PROMPTS, {"prompts": prompts})
    variants, versions = [], dict[str, str]()
    built, refused = set[str](), dict[str, str]()
    for form in forms:
        for suffix, one in sources.items():
            try:
                variant, libraries = model_variant(replace(work, suffix=suffix), form, one, prompts)
            except (UnsupportedError, SchemeError) as err:
                if not one.exact:
                    raise
                refused[suffix] = f"{form.title} does not run the recipe {one.preset}: {err}"
                if work.announce:
                    work.announce(refused[suffix])
                continue
            built.add(suffix)
            variants.append(variant)
            versions |= libraries
    for suffix, why in refused.items():
        if suffix not in built:
            raise UnsupportedError(f"no form of the package runs a recipe: {why}")
    for suffix, one in sources.items():
        card = model_card(one.own().model, work.name + suffix)
        (work.root / f"model-card{suffix}.md").write_bytes(card.encode())
    return variants, versions


def _graphs(
    work: Work, forms: list[Form], source: GraphSource
) -> tuple[list[ModelVariant], dict[str, str]]:
    """Build all forms of a graph and the golden inputs."""
    samples = golden_graph.write_golden(source.graph, work.root, source.samples)
    if source.names:
        templates.write(work.root, naming.FILE, "\n".join(source.names) + "\n")
    variants, versions = [], dict[str, str]()
    for form in forms:
        variant, libraries = graph_variant(work, form, source, samples)
        variants.append(variant)
        versions |= libraries
    return variants, versions


def _described(source: ModelSource | GraphSource, name: str, known: License) -> dict[str, Any]:
    about = (
        describe_graph(source, name) if isinstance(source, GraphSource)
        else describe_model(source, source.own().model, name)
    )  # fmt: skip
    return about | asdict(known)
