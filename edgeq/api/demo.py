"""The small model that edgeq includes."""

from __future__ import annotations

from pathlib import Path


def demo_model() -> Path:
    """The folder of a small language model that tells stories, a checkpoint in floating point.

    `edgeq demo` quantizes it and lets it tell a story.

    Example:
        >>> edgeq.load(edgeq.demo_model()).config.family
        'llama'
    """
    return Path(__file__).resolve().parent.parent / "demo_model"
