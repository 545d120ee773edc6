"""The chat templates a model's files hold, by name.

``chat_template.jinja`` is the one named "default" and ``additional_chat_templates/NAME.jinja`` are
the others. Where there is any such file, ``chat_template`` in tokenizer_config.json is not read;
otherwise that is one template, or several with names.

Source: Transformers 5.24, tokenization_utils_base.py (_from_pretrained).
"""

from __future__ import annotations

from collections.abc import Mapping

from edgeq.core.errors import FormatError
from edgeq.importers.huggingface.tokenizer import CONFIG
from edgeq.importers.json_object import read_object

DEFAULT = "default"
FILE = "chat_template.jinja"
FOLDER = "additional_chat_templates/"
"""Other templates' files lie there; their stem is the template's name."""


def chat_templates(files: Mapping[str, bytes]) -> dict[str, str]:
    """Name -> Jinja source of every template; empty where the model has none.

    Args:
        files: the model's files.

    Raises:
        FormatError: a template is not text, or not named.
    """
    try:
        templates = {
            name.removeprefix(FOLDER).removesuffix(".jinja"): content.decode()
            for name, content in files.items()
            if name.startswith(FOLDER)
        }
        if FILE in files:
            templates[DEFAULT] = files[FILE].decode()
    except UnicodeDecodeError as err:
        raise FormatError(f"the model's chat template is not UTF-8 text: {err}") from err
    if templates:
        return templates
    listed = read_object(files, CONFIG).get("chat_template")
    if listed is None:
        return {}
    if isinstance(listed, str):
        return {DEFAULT: listed}
    if isinstance(listed, list) and all(isinstance(entry, dict) for entry in listed):
        listed = {entry.get("name"): entry.get("template") for entry in listed}
    if not isinstance(listed, dict) or not all(
        isinstance(part, str) for pair in listed.items() for part in pair
    ):
        raise FormatError(f"{CONFIG}: chat_template must be text or a list of named templates")
    return listed
