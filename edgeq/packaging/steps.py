"""The steps of a package's README that an app developer follows, for each platform."""

from __future__ import annotations

from pathlib import PurePosixPath

from edgeq.packaging import android, ios, labels, templates
from edgeq.packaging.manifest import Manifest
from edgeq.packaging.pictures import picture_holes

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
_FED_CHAT = """\
   messages = '[{"role": "user", "content": "Hello"}]'
   prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
   generator.append_tokens(tokenizer.encode(prompt))"""
_FED_TEXT = """\
   generator.append_tokens([{start}*tokenizer.encode("Once upon a time")])"""
"""How onnxruntime-genai is fed in Python: by the chat template, or with the ids before a text."""
_RENDERED = ", among them conversations as the chat template renders them (`rendered`)"
_LENGTH = 200
"""Most tokens that the example in a README generates."""
_PICTURE = {
    "ios": "`GraphModel.input(of:)` does this with a `CGImage`.",
    "android": "`GraphModel.input(picture)` does this with a `Bitmap`.",
}
_RESIZED = {
    "stretch": "stretched to the size of the input",
    "crop": "scaled to fill the input, and cropped",
    "pad": "scaled to fit into the input, with black borders",
}
_NAMES = {
    "ios": "`GraphModel.labels()` gives the names of the model's classes, in the order of "
    "their numbers.",
    "android": "`GraphModel.labels(context)` gives the names of the model's classes, in the "
    "order of their numbers.",
}
_NAMES_FILE = (
    f"`{labels.FILE}` has the names of the model's classes, one on each line, in the order "
    "of their numbers."
)
_OUTPUTS = (
    "The outputs are those of the published model. What its authors do with them afterwards, such "
    "as removing overlapping boxes, the app must do too."
)


def _preprocess(made: Manifest) -> str:
    """How images become inputs, if that is recorded, the names of classes, and the outputs."""
    known = made.model.get("preprocess")
    said = _NAMES.get(made.platform, _NAMES_FILE) if made.model.get("labels") else ""
    if not known:
        return (
            "How images, sounds or texts become these values is not recorded: do it as when the "
            f"model was trained. {said} {_OUTPUTS}"
        ).replace("  ", " ")
    numbers = {name: ", ".join(f"{value:.6g}" for value in known[name]) for name in ("mean", "std")}
    code = _PICTURE.get(made.platform, "") if picture_holes(made) else ""
    told = (
        f"Images were {_RESIZED[known['resize']]}, their pixels of 0 to 255 multiplied by "
        f"{known['scale']:.6g}, the mean {numbers['mean']} subtracted, and the result divided by "
        f"{numbers['std']}: the app must do the same."
    )
    return " ".join(part for part in (told, code, said, _OUTPUTS) if part)


def steps(made: Manifest) -> str:
    """The steps for a package, as Markdown."""
    kind = "graph" if made.kind == "graph" else "model"
    variant = made.variants[0]
    path, asked, page = _CHAT if made.model.get("chat") else _TEXT
    start = "".join(f"{token}, " for token in made.model.get("start_tokens", ()))
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
        fed=_FED_CHAT if made.model.get("chat") else _FED_TEXT.format(start=start),
        rendered=_RENDERED if made.model.get("chat") else "",
        length=min(_LENGTH, variant.context or _LENGTH),
        preprocess=_preprocess(made),
        module=ios.module_name(made.name),
        **(android.readme_holes(made) if made.platform == "android" else {}),
    ).rstrip()


def python(text: str) -> str:
    """A text as a Python string literal."""
    return templates.quoted(text, {}, lambda char: f"\\U{ord(char):08x}", str.isprintable)
