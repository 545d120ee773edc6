"""The table of platforms: the forms of a model that each platform can run, and the reasons.

The first form of a platform is the recommended one. A reason is a sentence that an app developer
can check; the README of the package shows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from edgeq.core.errors import UsageError, unknown
from edgeq.packaging.runners import ENGINE

Kind = Literal["language model", "graph"]
NEAREST = "w4-g32"
"""The scheme for weights that a runtime cannot represent as they are; every runtime here has it."""


@dataclass(frozen=True)
class Form:
    """A form of the model on a platform.

    Args:
        id: identifier within a package.
        title: name of the runtime.
        target: a target of `edgeq.convert`, or "edgeq" for the artifact itself.
        entry: path of the file or folder; the name of the package replaces NAME.
        why: the reasons for this form, in sentences.
        requires: lowest supported versions of "os" and "runtime".
        devices: the devices that the form is for, in words.
        plans: device profiles for which the speed is estimated.
        settings: options of the conversion that only this target has.
        compute_units: "cpu", or what Core ML calls its compute units.
        threads: number of threads that the code of the package sets; None leaves it to the runtime.
        cache_bits: bits of a number in the KV cache of a language model.
        fixed_cache: whether the length of the KV cache is part of the file, so that a shorter
            context does not take less memory.
    """

    id: str
    title: str
    target: str
    entry: str
    why: tuple[str, ...]
    requires: Mapping[str, str]
    devices: str
    plans: tuple[str, ...] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    compute_units: str = "cpu"
    threads: int | None = None
    cache_bits: int = 32
    fixed_cache: bool = False


@dataclass(frozen=True)
class Platform:
    """A platform.

    Args:
        name: name on the command line.
        title: name in headings.
        models, graphs: forms of language models and of graphs.
    """

    name: str
    title: str
    models: tuple[Form, ...]
    graphs: tuple[Form, ...]

    def forms(self, kind: Kind) -> tuple[Form, ...]:
        """The forms for one kind of source."""
        return self.models if kind == "language model" else self.graphs


_PI = ("rpi5-8gb", "rpi5-4gb", "rpi4-4gb", "rpi-zero-2w")
_PHONES = ("phone-mid", "phone-low")
_IPHONES = ("iphone-16-pro", "iphone-15", "iphone-13")
_LITERT = (
    "LiteRT holds integers of 4 bits in symmetric groups of 32 to 256 weights and multiplies them "
    "by inputs that it rounds to 8 bits, which its kernels for ARM (XNNPACK) do with dot products."
)
_ORT = (
    "ONNX Runtime's MatMulNBits holds integers of 4 bits in groups of 32 and multiplies them with "
    "dot products on ARM."
)
_QDQ = (
    "ONNX Runtime fuses QuantizeLinear, DequantizeLinear and the operator between them into one "
    "operator on 8-bit integers, which its kernels for ARM have."
)

PLATFORMS: dict[str, Platform] = {
    platform.name: platform
    for platform in (
        Platform(
            "rpi",
            "Raspberry Pi",
            (
                Form(
                    "edgeq", "edgeq's engine", ENGINE, "model/NAME.edgeq",
                    (
                        "The artifact is mapped into memory and its integers are multiplied as "
                        "they lie there, with the dot products of a Pi 5 (Cortex-A76) and with "
                        "the older multiplications of a Pi 4 or Zero 2 (Cortex-A72, A53).",
                        "edgeq's own kernels take every scheme, so nothing is rounded again.",
                    ),
                    {"os": "Raspberry Pi OS 12 (bookworm), 64-bit",
                     "runtime": "Python 3.11 to 3.13"},
                    "Raspberry Pi 3, 4, 5 and Zero 2 W, with a 64-bit system", _PI,
                    threads=4, cache_bits=8,
                ),
            ),
            (
                Form(
                    "onnxruntime", "ONNX Runtime", "ort", "model/NAME.onnx",
                    (_QDQ, "Its wheels exist for 64-bit ARM, and it needs nothing but NumPy."),
                    {"os": "Raspberry Pi OS 12 (bookworm), 64-bit",
                     "runtime": "Python 3.11 to 3.13 and onnxruntime 1.23"},
                    "Raspberry Pi 3, 4, 5 and Zero 2 W, with a 64-bit system", _PI,
                ),
            ),
        ),
        Platform(
            "ort-mobile",
            "ONNX Runtime on phones and boards",
            (
                Form(
                    "genai", "onnxruntime-genai", "genai", "model",
                    (
                        _ORT,
                        "It is an .onnx file with its data beside it and not an .ort file: .ort "
                        "files of these operators are bound to one version of ONNX Runtime, and "
                        "would hold the embedding twice where the model uses it as its head.",
                    ),
                    {"os": "Android 7 (API 24), iOS 15.1 or 64-bit Linux",
                     "runtime": "onnxruntime 1.27 and onnxruntime-genai 0.12.2"},
                    "phones and boards with a 64-bit ARM processor", (*_PHONES, *_IPHONES, _PI[0]),
                ),
            ),
            (
                Form(
                    "ort", "ONNX Runtime, minimal build", "ort", "model/NAME.ort",
                    (
                        _QDQ,
                        "An .ort file needs no parser of ONNX, so that a build with these "
                        "operators alone runs it: that build takes a small part of the size of "
                        "the whole library.",
                    ),
                    {"os": "Android 7 (API 24), iOS 15.1 or 64-bit Linux",
                     "runtime": "the ONNX Runtime that `build.sh` builds, or a release of that "
                     "version or later"},
                    "phones and boards with a 64-bit ARM processor",
                ),
            ),
        ),
        Platform(
            "android",
            "Android",
            (
                Form(
                    "litertlm", "LiteRT-LM", "litertlm", "model/NAME.litertlm",
                    (_LITERT, "A .litertlm file holds the tokenizer and the chat template too."),
                    {"os": "Android 12 (API 31), arm64-v8a", "runtime": "LiteRT-LM 0.18"},
                    "phones of 2021 and later", _PHONES, fixed_cache=True,
                ),
                Form(
                    "genai", "onnxruntime-genai", "genai", "ort/model",
                    (_ORT, "It runs on older systems than LiteRT-LM."),
                    {"os": "Android 7 (API 24), arm64-v8a",
                     "runtime": "onnxruntime 1.27 and onnxruntime-genai 0.12.2"},
                    "phones that LiteRT-LM does not support", _PHONES,
                ),
            ),
            (
                Form(
                    "litert", "LiteRT", "tflite", "model/NAME.tflite",
                    (
                        "LiteRT's kernels for ARM (XNNPACK) compute 8-bit weights and activations "
                        "in integers, and need no special processor.",
                    ),
                    {"os": "Android 7 (API 24)", "runtime": "LiteRT 2.1"},
                    "all phones",
                ),
                Form(
                    "ort", "ONNX Runtime", "ort", "ort/model/NAME.onnx",
                    (_QDQ,),
                    {"os": "Android 7 (API 24)", "runtime": "onnxruntime-android 1.23"},
                    "all phones",
                ),
            ),
        ),
        Platform(
            "ios",
            "iOS and macOS",
            (
                Form(
                    "coreml", "Core ML", "coreml", "model/NAME.mlpackage",
                    (
                        "Core ML of iOS 18 and macOS 15 holds integers of 4 bits in blocks, and "
                        "tables of 16 values (palettes), and computes in float16.",
                        "The KV cache is a state of the model, so it is not copied at each token.",
                    ),
                    {"os": "iOS 18 or macOS 15", "runtime": "Core ML of that system"},
                    "iPhones and iPads with iOS 18, Macs with Apple silicon", _IPHONES,
                    compute_units="cpuAndGPU", cache_bits=16, fixed_cache=True,
                ),
            ),
            (
                Form(
                    "coreml", "Core ML", "coreml", "model/NAME.mlpackage",
                    (
                        "Core ML of iOS 18 and macOS 15 computes 8-bit weights and activations on "
                        "the Neural Engine of an A17 Pro or M4 and later; older ones compute the "
                        "same values in float16.",
                    ),
                    {"os": "iOS 18 or macOS 15", "runtime": "Core ML of that system"},
                    "iPhones and iPads with iOS 18, Macs with Apple silicon",
                    compute_units="all",
                ),
            ),
        ),
    )
}  # fmt: skip
"""All platforms by name."""


def platform_named(name: str) -> Platform:
    """A platform by its name.

    Raises:
        UsageError: there is no platform of that name; the message lists the known ones.
    """
    if name not in PLATFORMS:
        raise UsageError(unknown("platform", str(name), tuple(PLATFORMS)))
    return PLATFORMS[name]
