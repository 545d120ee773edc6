"""The steps of a package's README that an app developer follows, for each platform."""

from __future__ import annotations

from pathlib import PurePosixPath

from edgeq.packaging import ios, templates
from edgeq.packaging.manifest import Manifest

_CHAT = (
    "chat/completions",
    '"messages": [{"role": "user", "content": "Hello"}]',
    "A page to chat with it is at http://127.0.0.1:8080/ in a browser on the Pi.",
)
_TEXT = (
    "completions",
    '"prompt": "Once upon a time"',
    "The model has no chat template: it continues texts, and does not hold conversations.",
)
_LENGTH = 200
"""Most tokens that the example in a README generates."""
_PICTURE = "`GraphModel.input(of:)` does this with a `CGImage`."


def _preprocess(made: Manifest) -> str:
    """How images become inputs, if that is recorded in the graph."""
    known = made.model.get("preprocess")
    if not known:
        return (
            "How pictures, sounds or texts become these values is not recorded: do it as when the "
            "model was trained."
        )
    numbers = {name: ", ".join(f"{value:.6g}" for value in known[name]) for name in ("mean", "std")}
    return (
        f"Pictures were resized by the way `{known['resize']}`, their pixels of 0 to 255 "
        f"multiplied by {known['scale']:.6g}, the mean {numbers['mean']} subtracted, and the "
        f"result divided by {numbers['std']}: the app must do the same."
    )


def steps(made: Manifest) -> str:
    """The steps for a package, as Markdown."""
    kind = "graph" if made.kind == "graph" else "model"
    variant = made.variants[0]
    path, asked, page = _CHAT if made.model.get("chat") else _TEXT
    feeds = [
        f'       {python(end["name"])}: numpy.zeros({end["shape"]}, "{end["dtype"]}"),'
        for end in made.model.get("inputs", ())
    ]
    return templates.filled(
        f"{made.platform.replace('-', '_')}/{kind}.md",
        name=made.name,
        entry=variant.entry,
        file=PurePosixPath(variant.entry).name,
        variant=variant.id,
        path=path,
        asked=asked,
        page=page,
        feeds="\n".join(feeds),
        length=min(_LENGTH, variant.context or _LENGTH),
        preprocess=_preprocess(made),
        module=ios.module_name(made.name),
        picture=_PICTURE if kind == "graph" and ios.picture_holes(made) else "",
    ).rstrip()


def python(text: str) -> str:
    """A text as a Python string literal."""
    return templates.quoted(text, {}, lambda char: f"\\U{ord(char):08x}", str.isprintable)
