"""docs/vision.md from what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

HEAD = """# Vision, audio and encoder models

Real models, quantized once and run in three runtimes. Written by `benchmarks/vision/run.py`, which
says in `subjects.py` what each model is calibrated on and measured on; no sample is in both.

- Figure: top-1 of the labelled test samples; for the encoder the mean cosine to the float
  embedding.
- Agreement: how often the largest score is the float model's.
- Size: of the file; "smaller" is against the float32 model as .onnx.
- Arena: bytes of the values while it runs, buffers used again.
- Time: median of one run, one thread, beside the float model in the same runtime, the two taking
  turns. Core ML programs are executed in NumPy here, on fewer samples (in brackets), and not timed.
- A peer's figure is the best of all its ways, static and other, chosen on the test data; files
  that stayed float (more than three quarters of the bytes) are left out. Ours is that of the preset
  as it is; but how presets choose ranges by default was settled by looking at these models and
  this test data too.
- Differences of top-1 have a standard error of 0.3 to 0.5 points where two models differ in 2 to
  5 % of 2,000 samples, and more with fewer samples.
- "LiteRT, int4=bytes" holds each 4-bit level in a byte (`edgeq convert --set int4=bytes`): twice
  the size. With rounded activations that is LiteRT's fast kernel, which rounds as onnxruntime does;
  its kernel for packed 4-bit weights of convolutions rounds twice, so that some results differ by a
  step, and is slower.
- With dynamic activations each runtime rounds by a rule of its own.
"""
_STAYED = 0.75
"""Part of the float file's bytes from which a peer's file counts as float."""
_NAMES = {
    "ort": "onnxruntime",
    "tflite": "LiteRT",
    "tflite-bytes": "LiteRT, int4=bytes",
    "coreml": "Core ML (NumPy)",
}


def write(results: Mapping[str, Any], path: Path) -> None:
    """Write the page."""
    parts = [HEAD]
    for name, about in results["models"].items():
        if "ort" not in about["float"]:  # which all others are beside
            continue
        parts.append(f"\n## {name}\n\n{_about(about)}\n\n{_table(about)}")
        if between := [line for row in about["rows"].items() for line in _agreement(row)]:
            what = "Mean cosine" if about["encoder"] else "Same top class"
            parts.append(f"\n{what} between runtimes:\n\n" + "\n".join(between) + "\n")
    path.write_text("".join(parts), "utf-8")


def _about(about: Mapping[str, Any]) -> str:
    return (
        f"{about['about']}. Calibrated on {about['calibration']} samples, measured on "
        f"{about['tested']:,}."
    )


def _table(about: Mapping[str, Any]) -> str:
    figure = "cosine" if about["encoder"] else "top-1"
    lines = [
        f"| what | runtime | {figure} | agreement | bytes | smaller | arena | ms | float ms "
        "| faster |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for target, row in about["float"].items():
        lines.append(_line("float", target, row, about))
    for preset, held in about["rows"].items():
        if "refused" in held:
            lines.append(f"| {preset} | all | refused: {_first(held)} |" + " |" * 7)
            continue
        for target, row in held["targets"].items():
            lines.append(_line(preset, target, row, about))
    for peer, held in about["peers"].items():
        target = "ort" if "onnx" in peer else "tflite"
        for static in (True, False):
            ways = {
                way: row
                for way, row in held["ways"].items()
                if way.startswith("static") is static and _smaller(row, about)
            }
            if ways:
                way, row = _best(ways, about["encoder"])
                lines.append(_line(f"{peer}: {way}", target, row, about))
    return "\n".join(lines) + "\n"


def _smaller(row: Mapping[str, Any], about: Mapping[str, Any]) -> bool:
    """Whether anything was quantized: some of the peers' ways give the float file back."""
    return "bytes" not in row or row["bytes"] < _STAYED * _float_bytes(about)


def _float_bytes(about: Mapping[str, Any]) -> int:
    return int(about["float"]["ort"]["bytes"])


def _best(ways: Mapping[str, Any], encoder: bool) -> tuple[str, Mapping[str, Any]]:
    key = "cosine" if encoder else "top1"
    ran = {way: row for way, row in ways.items() if key in row}
    if not ran:
        return next(iter(ways.items()), ("nothing ran", {"refused": "no recipe ran"}))
    return max(ran.items(), key=lambda item: (item[1][key], item[1]["cosine"]))


def _line(what: str, target: str, row: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    runtime, some = _NAMES[target], target == "coreml"
    if "refused" in row:
        return f"| {what} | {runtime} | refused: {_first(row)} |" + " |" * 7
    if about["encoder"]:
        figure, agreement = f"{row['cosine']:.4f}", ""
    else:
        figure, agreement = f"{100 * row['top1']:.2f} %", f"{100 * row['agreement']:.2f} %"
        if row["base_top1"] is not None and some:
            figure += f" (float {100 * row['base_top1']:.2f} % of {row['n']})"
    if about["encoder"] and some:
        figure += f" ({row['n']} samples)"
    smaller = f"{_float_bytes(about) / row['bytes']:.2f}x"
    ms, before = row.get("ms"), row.get("float_ms")
    faster = f"{before / ms:.2f}x" if ms and before else ""
    arena = f"{row['arena']:,}" if row.get("arena") else ""
    cells = [what, runtime, figure, agreement, f"{row['bytes']:,}", smaller, arena,
             _ms(ms), _ms(before), faster]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _first(row: Mapping[str, Any]) -> str:
    text = " ".join(str(row["refused"]).split())
    return (text[:160] + " ...") if len(text) > 160 else text


def _agreement(row: tuple[str, Mapping[str, Any]]) -> Iterator[str]:
    preset, held = row
    if pairs := held.get("between"):
        told = "; ".join(f"{_pair(pair)} {value:.4f}" for pair, value in pairs.items())
        yield f"- {preset}: {told}"


def _pair(names: str) -> str:
    return " and ".join(_NAMES[name] for name in names.split(", "))
