"""Verify that a package is complete and unchanged, and that it gives the results of its build.

The checks run in this order, and the report names the first fault:

    manifest      digest, format and fields
    signature     if the package is signed or a key is given
    files         none is missing, added or changed: size, SHA-256, mode, blocks
    certificates  validation passed, with exactly these files
    tokenizer     token ids of 20 prompts, and the texts that the chat template renders
    golden        each form in its own runtime: greedy tokens and logits, or outputs

A form whose runtime is not installed is not run, and the report says so.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from edgeq.converters.runners import DecoderRunner, GraphRunner
from edgeq.core.errors import EdgeqError, FormatError, MissingDependencyError, UsageError
from edgeq.core.progress import Progress
from edgeq.packaging import golden_graph, golden_text, signing, tree
from edgeq.packaging.layout import package_name
from edgeq.packaging.manifest import Manifest, ModelVariant, read_manifest
from edgeq.packaging.platforms import platform_named
from edgeq.packaging.prompts import PROMPTS, TOKENIZER, prompt_ids, rendered_chat
from edgeq.packaging.runners import open_decoder, open_graph
from edgeq.runtime.tokenizer import Tokenizer

R = TypeVar("R", DecoderRunner, GraphRunner)
_quiet = partial(np.errstate, all="ignore")
"""Damaged weights may overflow. The comparison with the golden results says what is wrong."""


@dataclass(frozen=True)
class PackageReport:
    """The result of verifying a package.

    Args:
        path: folder of the package.
        manifest: the manifest; None if it cannot be read.
        checks: (name of the check, its result), in order.
        fault: the first fault, as a sentence; None if the package passed.
        place: the file with the fault; None if the fault is not in one file.
        not_run: (form, reason why it was not run on this machine).
        signed_by: the public key of a valid signature, in hexadecimal.
    """

    path: Path
    manifest: Manifest | None
    checks: tuple[tuple[str, str], ...]
    fault: str | None = None
    place: str | None = None
    not_run: tuple[tuple[str, str], ...] = ()
    signed_by: str | None = None

    @property
    def passed(self) -> bool:
        """Whether the package has no fault."""
        return self.fault is None

    def to_dict(self) -> dict[str, Any]:
        """The report as ``edgeq package --verify DIR --format json`` prints it."""
        return {
            "path": str(self.path),
            "passed": self.passed,
            "fault": self.fault,
            "place": self.place,
            "checks": [{"check": check, "found": found} for check, found in self.checks],
            "not_run": [{"form": form, "reason": why} for form, why in self.not_run],
            "signed_by": self.signed_by,
            "digest": self.manifest.digest if self.manifest else None,
        }


class _WrongError(EdgeqError):
    """The first fault of a package, and the file that it is in."""

    def __init__(self, place: str | None, message: str) -> None:
        super().__init__(message)
        self.place = place


def verify_package(
    path: str | Path,
    *,
    verify_key: str | Path | None = None,
    run: bool = True,
    progress: Progress | None = None,
) -> PackageReport:
    """Check everything in a package and name the first fault.

    Args:
        path: folder of the package.
        verify_key: path of the Ed25519 public key (PEM) that must have signed the package.
        run: also run the golden tests. False checks only files, certificates and tokenizer.
        progress: called with what is done, how far, and of how much.

    Raises:
        FormatError: the path is not a folder, or the folder has no manifest.
        UsageError: the key cannot be read.
        MissingDependencyError: the package is signed or a key is given, and the Python package
            that checks signatures is not installed.

    Example:
        >>> made = edgeq.package("model.edgeq", "rpi", "for-a-pi")
        >>> edgeq.verify_package("for-a-pi").passed
        True
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FormatError(f"{folder} is not a folder; give a folder that edgeq package wrote")
    if not (folder / "manifest.json").exists():
        raise FormatError(f"{folder} is not an edgeq package: it has no manifest.json")
    wanted = signing.read_public_key(verify_key) if verify_key is not None else None
    state = _Checking(folder, wanted, run, progress)
    fault = place = None
    try:
        for check, found in state.steps():
            state.checks.append((check, found))
    except _WrongError as err:
        fault, place = str(err), err.place
    except OSError as err:
        fault = f"{err.filename or folder} cannot be read: {err.strerror or err}"
    return PackageReport(
        folder, state.made, tuple(state.checks), fault, place, tuple(state.not_run),
        state.signed_by,
    )  # fmt: skip


class _Checking:
    """Runs the checks of one package."""

    def __init__(
        self, folder: Path, wanted: str | None, run: bool, progress: Progress | None
    ) -> None:
        self.folder, self.wanted, self.run, self.progress = folder, wanted, run, progress
        self.made: Manifest | None = None
        self.checks: list[tuple[str, str]] = []
        self.not_run: list[tuple[str, str]] = []
        self.signed_by: str | None = None

    def steps(self) -> Iterator[tuple[str, str]]:
        """Each check with its result; raises `_WrongError` at the first that fails."""
        try:
            made = read_manifest(self.folder)
            _check_known(made)
        except FormatError as err:
            raise _WrongError("manifest.json", str(err)) from err
        self.made = made
        yield "manifest", f"{made.name} for {made.platform}, made by edgeq {made.edgeq}"
        yield "signature", self._signature()
        if different := tree.first_difference(self.folder, made, self.progress):
            raise _WrongError(*different)
        yield "files", f"{_counted(len(made.files), 'file')}, none changed, missing or added"
        for variant in made.variants:
            yield f"certificate of {variant.id}", self._certificate(made, variant)
        try:
            if made.kind == "graph":
                yield from self._graph(made)
            else:
                yield from self._model(made)
        except (
            LookupError,
            TypeError,
            AttributeError,
            ValueError,
            OverflowError,
            RecursionError,
        ) as err:
            raise _WrongError("golden", f"the golden tests cannot be read: {err!r}") from err
        except (_WrongError, MissingDependencyError):
            raise
        except EdgeqError as err:
            raise _WrongError("golden", f"the golden tests cannot be run: {err}") from err

    def _signature(self) -> str:
        try:
            self.signed_by = signing.signer(self.folder)
        except FormatError as err:
            raise _WrongError(tree.SIGNATURE, str(err)) from err
        if self.wanted is not None and self.signed_by is None:
            raise _WrongError(
                tree.SIGNATURE, "the package is not signed, and --verify-key was given"
            )
        if self.wanted is not None and self.signed_by != self.wanted:
            raise _WrongError(
                tree.SIGNATURE,
                f"the package was signed with the key {self.signed_by}, and the given key is "
                f"{self.wanted}",
            )
        if self.signed_by is None:
            return "not signed"
        said = "the key given" if self.wanted else "a key that nobody vouches for (--verify-key)"
        return f"signed with {said}: {self.signed_by}"

    def _certificate(self, made: Manifest, variant: ModelVariant) -> str:
        place = variant.certificate
        try:
            certificate = json.loads((self.folder / place).read_text("utf-8"))
            files = {name: about["sha256"] for name, about in certificate["files"].items()}
            passed, target = certificate["passed"], certificate["target"]
            runtime = str(certificate["runtime"])
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as err:
            raise _WrongError(place, f"{place} is not a certificate: {err!r}") from err
        if passed is not True or target != variant.target:
            raise _WrongError(place, f"{place} does not say that the form {variant.id} passed")
        if set(files) != set(variant.files):
            raise _WrongError(
                place, f"{place} does not list exactly the files of the form {variant.id}"
            )
        for name, sha in files.items():
            if made.files[name].sha256 != sha:
                raise _WrongError(
                    place, f"{place} certifies another version of {name}: the SHA-256 differs"
                )
        return f"of {_counted(len(files), 'file')} of this package, in {runtime}"

    def _model(self, made: Manifest) -> Iterator[tuple[str, str]]:
        files = {
            path.relative_to(self.folder / TOKENIZER).as_posix(): path.read_bytes()
            for path in sorted((self.folder / TOKENIZER).rglob("*"))
            if path.is_file()
        }
        prompts = json.loads((self.folder / PROMPTS).read_text("utf-8"))["prompts"]
        try:
            tokenizer = Tokenizer(files)
        except EdgeqError as err:
            raise _WrongError(TOKENIZER, f"{TOKENIZER}: {err}") from err
        for prompt in prompts:
            if "messages" in prompt:
                try:
                    text = rendered_chat(files, prompt["messages"])
                except EdgeqError as err:
                    raise _WrongError(TOKENIZER, f"{TOKENIZER}: {err}") from err
                if text != prompt["rendered"]:
                    raise _WrongError(
                        TOKENIZER,
                        f"the chat template renders the messages of {prompt['id']} differently: "
                        "the template or the golden prompts were changed",
                    )
            ids = prompt_ids(tokenizer, prompt)
            if ids != prompt["ids"] and not (prompt["cut"] and _within(prompt["ids"], ids)):
                raise _WrongError(
                    TOKENIZER,
                    f"the tokenizer gives other ids for {prompt['id']} than the golden prompts: "
                    "the tokenizer or the golden prompts were changed",
                )
        talks = sum("messages" in prompt for prompt in prompts)
        yield "tokenizer", f"ids of {len(prompts)} prompts, {talks} of them rendered conversations"
        for variant in made.variants:
            golden = json.loads((self.folder / variant.golden).read_text("utf-8"))
            runner = self._opened(variant, partial(open_decoder, context=variant.context or 0))
            if runner is None:
                continue
            try:
                with _quiet():
                    fault = golden_text.first_fault(runner, prompts, golden, self.progress)
            finally:
                runner.close()
            if fault:
                raise _WrongError(variant.entry, f"{variant.id}: {fault}")
            steps = sum(len(result["tokens"]) for result in golden["results"])
            yield (
                f"golden tests of {variant.id}",
                f"{steps} tokens after {len(prompts)} prompts in {runner.runtime}; the first are "
                f"{golden['results'][0]['text']!r}",
            )

    def _graph(self, made: Manifest) -> Iterator[tuple[str, str]]:
        runs = golden_graph.read_golden(self.folder)
        for variant in made.variants:
            golden = json.loads((self.folder / variant.golden).read_text("utf-8"))
            runner = self._opened(variant, open_graph)
            if runner is None:
                continue
            try:
                with _quiet():
                    fault = golden_graph.first_fault(runner, runs, golden["allowed"])
            finally:
                runner.close()
            if fault:
                raise _WrongError(variant.entry, f"{variant.id}: {fault}")
            yield (
                f"golden tests of {variant.id}",
                f"{_counted(len(runs), 'input')} in {runner.runtime}",
            )

    def _opened(self, variant: ModelVariant, opener: Callable[[str, Path], R]) -> R | None:
        """Open a form in its runtime; None if it is not run on this machine."""
        if not self.run:
            return None
        try:
            with _quiet():
                return opener(variant.target, self.folder / variant.entry)
        except MissingDependencyError as err:
            self.not_run.append((variant.id, str(err)))
            return None
        except EdgeqError as err:
            raise _WrongError(variant.entry, f"{variant.entry} cannot be opened: {err}") from err


def _check_known(made: Manifest) -> None:
    """Check that this version of edgeq has the platform and the forms that a manifest names.

    Raises:
        FormatError: the platform, the kind, the name or a form is unknown; the message says which.
    """
    try:
        package_name(made.name, None)
        platform = platform_named(made.platform)
    except UsageError as err:
        raise FormatError(f"manifest.json: {err}") from err
    if not made.edgeq.isprintable():
        raise FormatError(f"manifest.json: {made.edgeq!r} is not a version of edgeq")
    forms = {"language model": platform.models, "graph": platform.graphs}.get(made.kind, ())
    known = {form.id: form.target for form in forms}
    for variant in made.variants:
        if known.get(variant.form) != variant.target or not variant.id.isprintable():
            raise FormatError(
                f"manifest.json: the variant {variant.id!r} is the form {variant.form!r} for the "
                f"target {variant.target!r}, which packages of a {made.kind!r} for {made.platform} "
                "do not have"
            )


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _within(cut: list[int], whole: list[int]) -> bool:
    """Whether ``cut`` are some of the ids ``whole``, in the same order."""
    rest = iter(whole)
    return all(token in rest for token in cut)
