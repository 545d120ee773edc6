"""docs/vision.md from what was measured."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

HEAD = """# Vision, audio and encoder models

Real models, quantized once and run in three runtimes. Written by `benchmarks/vision/run.py`, which
says in `subjects.py` what each model is calibrated on and measured on; no sample is in both.

- Figure: top-1 of the labeled test samples; for the encoder the mean cosine to the float
  embedding.
- Agreement: how often the largest score is the float model's.
- Size: of the file; "smaller" is against the float32 model as .onnx.
- Arena: bytes of the values while it runs, buffers used again.
- Time: median of one run, one thread, beside the float model in the same runtime, the two taking
  turns. Core ML programs are executed in NumPy here, on fewer samples (in brackets), and not timed.
- Rows with the name of a preset are that preset as it is. "Best of n ways" is the best of n on the
  test data, for peers and for ours alike; a peer's files that stayed float (more than three
  quarters of the bytes) are left out.
- Differences of top-1 have a standard error of 0.2 to 0.3 points where two models differ in 2 to
  5 % of 5,000 samples, and more with fewer samples.
- "LiteRT, int4=bytes" holds each 4-bit level in a byte (`edgeq convert --set int4=bytes`): twice
  the size, and with rounded activations LiteRT's fast kernel. The kernel for packed 4-bit weights
  of convolutions is slower. Both give the same results; see below.
- With dynamic activations each runtime rounds by a rule of its own; see below.
"""
_END = """
## Why runtimes agree, and where they do not

A layer of rounded weights and activations computes a sum of integers, times a factor, rounded to
a level of the output. onnxruntime and LiteRT's fast kernels (XNNPACK) multiply in float32 and
round once. LiteRT's kernel for convolutions with packed 4-bit weights rounds twice:

    floor((floor(sum * m + 1/2) + 2^(s-1)) / 2^s)        factor = m / 2^s, 1/2 <= m < 1

The formula gives the kernel's results bit for bit. It is one rounding of a sum that is 1 / 2m
larger, so between 1/2 and 1. With 8-bit weights a step of the output is some hundred steps of the
sum, and that hardly matters. With 4-bit weights it is 10 to 100: on the same integers 0.3 to 3 % of
the results of ResNet-8's and ResNet-20's layers differed from one rounding, nearly all of them one
step up, and the top class was then the same in 98.75 and 99.15 % of 2,000 pictures. Two things
together bring that to the fast kernel's agreement, bit for bit, at no cost in size or time:

- the scale of each channel is one with which a step of the output is an odd number of steps of the
  sum, so that no sum lies halfway between two levels or nearer than half a step to it (the weights
  are rounded again with that scale, and of three odd numbers the best is taken). Results then do
  not hang on how exactly a runtime multiplies either: Core ML's agreement with onnxruntime on
  ResNet-20 rose from 98.5 to 100 % of 200;
- the bias in a .tflite file is one less for these convolutions, which leaves a sum that is 0 to 1/2
  too small: less than any distance to a halfway point. Read back, it is the graph's bias again.

What is left comes from additions: in 2 to 6 of 100,000 results LiteRT's sum of two rounded values
is a step off onnxruntime's.

With dynamic activations LiteRT rounds what every layer is fed to 256 levels between the smallest
and largest value of the moment. onnxruntime does so for matrix products only: its integer
convolution (ConvInteger) is slower than the float one (resnet8 by onnxruntime.quantization's
dynamic way: see the table), so convolutions keep float activations there, as they do in Core ML,
which has no such operator. Rounding in onnxruntime as LiteRT does, by DynamicQuantizeLinear and
DequantizeLinear before each convolution, was tried: agreement with LiteRT rises from 99.00 to
99.45 % (resnet8) and from 99.45 to 99.90 % (resnet20), each run takes 6 to 7 % more time, and
agreement with float activations, as Core ML has them, is 98.75 and 99.35 %. So it is not done.
Where runtimes must agree, take a static preset.
"""
_BYTES = """
## Where the bytes are

A file holds levels, and beside them what its runtime asks for: a float scale for each output
channel, biases of 4 bytes, in onnxruntime and LiteRT also a scale for each integer bias, in
LiteRT a zero point of 8 bytes for each scale (equal lists lie in the file once; LiteRT refuses
one zero point for many scales). For ResNet-8 that alone is 3.8 to 3.9 times smaller than float at
8 bits with rounded activations, and 7.3 to 7.7 times at 4 bits: no file of any tool reaches 4
times with 8 bits. The first, last and depthwise layers keep 8 bits, which are more than a quarter
of DS-CNN's levels: 4.9 to 5.8 times at most, MNIST's 5.1 to 5.5. The rest is structure, which
does not shrink with the weights: 4 to 6 KB in onnxruntime's and LiteRT's files of ResNet-8, 10 to
17 KB in Core ML's, where each operator names its arguments and types. Names of constants are
short; inputs and outputs keep theirs, as do operators (onnxruntime, Core ML) or values (LiteRT).
What edgeq notes for itself is compressed.
"""
_BOUND = """
## What bounds onnxruntime's integers

One run of w8a8-static and of the float model, one thread, microseconds by onnxruntime's own
profiler, which adds some time to every operator. Nearly all of it is convolution, with either: the
integer one gains 1.1 to 2.1 times over the float one where layers have 16 to 64 channels, and loses
where they have 1 and 8 (mnist). Other files with these integers run the same operators; LiteRT's
kernels gain more.
"""
_SETTLED = """
## Which observer finds ranges

Settled by `benchmarks/vision/settle.py` without the test data and without labels: w8a8-static with
each observer, beside the float model on samples that are neither calibrated on nor in the tables
above. How often the largest score is the same, and the mean Kullback-Leibler divergence of the
scores in nats. Classifiers get "mse" by default: its divergence is the least of all for the three
models whose scores say anything (mnist's largest score is practically 1 always).
"""
BOUND = "w8a8-static"
"""The preset whose time in onnxruntime is looked into."""
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
    settled = _observers(path.with_name("vision-observers.json"))
    parts += [_END, _BYTES, _bound(results["models"]), settled]
    path.write_text("".join(parts), "utf-8")


def _bound(models: Mapping[str, Any]) -> str:
    """Where onnxruntime's time goes, of the models it was looked into for; empty if of none."""
    lines = []
    for name, about in models.items():
        row = about["rows"].get(BOUND, {}).get("targets", {}).get("ort", {})
        if "operators" in row:
            for what, key in ((BOUND, "operators"), ("float", "float_operators")):
                spent = list(row[key].items())
                rest = sum(us for _, us in spent[3:])
                cells = [f"{op} {us:.0f}" for op, us in spent[:3]] + [f"others {rest:.0f}"]
                total = sum(us for _, us in spent)
                whole = 1e3 * row["ms" if key == "operators" else "float_ms"]
                lines.append(
                    f"| {name} | {what} | {whole:.0f} | {total:.0f} | {', '.join(cells)} |"
                )
    if not lines:
        return ""
    head = [
        "| model | | unprofiled run | operators | of which |",
        "| --- | --- | --- | --- | --- |",
    ]
    return "\n".join([_BOUND, *head, *lines]) + "\n"


def _observers(path: Path) -> str:
    """The table of what `settle.py` measured; empty if it has not."""
    if not path.exists():
        return ""
    found = json.loads(path.read_text("utf-8"))
    names = list(next(iter(found.values())))
    lines = [_SETTLED, f"| model | {' | '.join(names)} |", "| --- |" + " --- |" * len(names)]
    for model, tried in found.items():
        cells = [
            f"{100 * r['agreement']:.2f} %, {max(r['divergence'], 0):.5f}" for r in tried.values()
        ]
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


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
    for target, ways in about.get("own", {}).get("ways", {}).items():
        lines.append(_best_line("edgeq, 8 bits, static", target, ways, about))
    for peer, held in about["peers"].items():
        target = "ort" if "onnx" in peer else "tflite"
        for static in (True, False):
            ways = {
                way: row
                for way, row in held["ways"].items()
                if way.startswith("static") is static and _smaller(row, about)
            }
            if ways:
                kind = "static" if static else "not static"
                lines.append(_best_line(f"{peer}, {kind}", target, ways, about))
    return "\n".join(lines) + "\n"


def _best_line(what: str, target: str, ways: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    way, row = _best(ways, about["encoder"])
    told = f"best of {len(ways)} ways" if len(ways) > 1 else "one way"
    return _line(f"{what}, {told}: {way.removeprefix('static ')}", target, row, about)


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
