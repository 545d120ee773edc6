"""Quantize a model once, run it packed in INT4, and ship the same integers everywhere.

    import edgeq

    edgeq.quantize("path/to/model", "model.edgeq")           # INT4, calibrated without data
    for chunk in edgeq.run("model.edgeq", "Once upon a time", max_tokens=100):
        print(chunk.text, end="", flush=True)

Every command of the command line has a function of its name; `docs/python.md` lists them all. To
keep a model in memory between prompts:

    model = edgeq.load("model.edgeq")                        # or a checkpoint, or a GGUF file
    tokenizer = edgeq.Tokenizer(model)
    with edgeq.Engine(model) as engine:
        # a text is continued; a list of messages is answered by the model's chat template
        for chunk in edgeq.generate(engine, tokenizer, "Once upon a time", max_tokens=100):
            print(chunk.text, end="", flush=True)

Names are loaded when they are first used: ``import edgeq`` alone imports neither NumPy nor Numba
nor any converter. Errors raised on purpose are `EdgeqError`s whose messages say how to fix them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeq._version import __version__
from edgeq.core.exports import lazy_exports

if TYPE_CHECKING:
    from edgeq.api.bench import bench, bench_graphs
    from edgeq.api.calibrate import calibrate, sensitivity
    from edgeq.api.conversation import Conversation
    from edgeq.api.demo import demo_model
    from edgeq.api.devices import detect, device, device_names, plan
    from edgeq.api.doctor import doctor
    from edgeq.api.embed import embed, rerank
    from edgeq.api.evaluate import evaluate, perplexity
    from edgeq.api.evaluate_graph import GraphAccuracy, evaluate_graph
    from edgeq.api.inspect import inspect
    from edgeq.api.profile import profile, report
    from edgeq.api.quantize import quantize, verify_reproducible
    from edgeq.api.run import chat, run
    from edgeq.api.serve import serve
    from edgeq.api.sweep import sweep
    from edgeq.converters.convert import Conversion, convert
    from edgeq.converters.options import Options
    from edgeq.converters.validate import validate
    from edgeq.converters.validate.report import ValidationReport
    from edgeq.core.errors import (
        DeviceError,
        DoesNotFitError,
        EdgeqError,
        FormatError,
        MissingDependencyError,
        SchemeError,
        UnsupportedError,
        UsageError,
    )
    from edgeq.devices.detect import Detected
    from edgeq.devices.doctor import Check
    from edgeq.devices.planner import Plan
    from edgeq.devices.profile import DeviceProfile
    from edgeq.evaluation.tasks import Outcome
    from edgeq.evaluation.text import Evaluation
    from edgeq.formats.schemes import QuantScheme, parse_scheme
    from edgeq.formats.tensor import FloatTensor, QuantTensor
    from edgeq.graph.ir import Graph
    from edgeq.importers import load, open_source
    from edgeq.model.artifact import save
    from edgeq.model.block import BlockSpec, DeltaSpec, ExpertsSpec
    from edgeq.model.config import ModelConfig
    from edgeq.model.model import Model
    from edgeq.model.reference import Reference
    from edgeq.model.rope_spec import RopeScaling, RopeSpec
    from edgeq.packaging.build import Package, package
    from edgeq.packaging.delta import Delta, apply_delta, package_delta
    from edgeq.packaging.verify import PackageReport, verify_package
    from edgeq.profiling import Measurement, Workload
    from edgeq.profiling.document import Document
    from edgeq.quant.decoder.calibrate import CalibrationStats
    from edgeq.quant.decoder.quantize import Summary
    from edgeq.quant.decoder.repack import RepackSummary, repack
    from edgeq.quant.decoder.sensitivity import Sensitivity
    from edgeq.quant.graph.summary import GraphSummary
    from edgeq.quant.presets import PRESETS
    from edgeq.quant.recipe import Recipe
    from edgeq.quant.rules import Rule
    from edgeq.quant.summary import QuantizationSummary
    from edgeq.runtime.chat_template import render_chat
    from edgeq.runtime.constraint import GrammarVocabulary
    from edgeq.runtime.draft import Draft
    from edgeq.runtime.engine import Engine
    from edgeq.runtime.generate import Chunk, generate
    from edgeq.runtime.kernels import warmup
    from edgeq.runtime.sampling import SamplingParams
    from edgeq.runtime.tokenizer import Tokenizer
    from edgeq.serving.server import Server
    from edgeq.serving.settings import ServerSettings
    from edgeq.sweeping import SweepResult

_HOMES = {
    "edgeq.api.bench": ("bench", "bench_graphs"),
    "edgeq.api.calibrate": ("calibrate", "sensitivity"),
    "edgeq.api.demo": ("demo_model",),
    "edgeq.api.devices": ("detect", "device", "device_names", "plan"),
    "edgeq.api.doctor": ("doctor",),
    "edgeq.api.embed": ("embed", "rerank"),
    "edgeq.api.evaluate": ("evaluate", "perplexity"),
    "edgeq.api.evaluate_graph": ("GraphAccuracy", "evaluate_graph"),
    "edgeq.api.inspect": ("inspect",),
    "edgeq.api.quantize": ("quantize", "verify_reproducible"),
    "edgeq.api.profile": ("profile", "report"),
    "edgeq.api.conversation": ("Conversation",),
    "edgeq.api.run": ("chat", "run"),
    "edgeq.api.serve": ("serve",),
    "edgeq.api.sweep": ("sweep",),
    "edgeq.converters.convert": ("Conversion", "convert"),
    "edgeq.converters.options": ("Options",),
    "edgeq.converters.validate": ("validate",),
    "edgeq.converters.validate.report": ("ValidationReport",),
    "edgeq.core.errors": (
        "DeviceError",
        "DoesNotFitError",
        "EdgeqError",
        "FormatError",
        "MissingDependencyError",
        "SchemeError",
        "UnsupportedError",
        "UsageError",
    ),
    "edgeq.devices.detect": ("Detected",),
    "edgeq.devices.doctor": ("Check",),
    "edgeq.devices.planner": ("Plan",),
    "edgeq.devices.profile": ("DeviceProfile",),
    "edgeq.evaluation.tasks": ("Outcome",),
    "edgeq.evaluation.text": ("Evaluation",),
    "edgeq.formats.schemes": ("QuantScheme", "parse_scheme"),
    "edgeq.formats.tensor": ("FloatTensor", "QuantTensor"),
    "edgeq.graph.ir": ("Graph",),
    "edgeq.importers": ("load", "open_source"),
    "edgeq.model.artifact": ("save",),
    "edgeq.model.block": ("BlockSpec", "DeltaSpec", "ExpertsSpec"),
    "edgeq.model.rope_spec": ("RopeScaling", "RopeSpec"),
    "edgeq.model.config": ("ModelConfig",),
    "edgeq.model.model": ("Model",),
    "edgeq.model.reference": ("Reference",),
    "edgeq.packaging.build": ("Package", "package"),
    "edgeq.packaging.delta": ("Delta", "apply_delta", "package_delta"),
    "edgeq.packaging.verify": ("PackageReport", "verify_package"),
    "edgeq.profiling": ("Measurement", "Workload"),
    "edgeq.profiling.document": ("Document",),
    "edgeq.quant.decoder.calibrate": ("CalibrationStats",),
    "edgeq.quant.decoder.quantize": ("Summary",),
    "edgeq.quant.decoder.repack": ("RepackSummary", "repack"),
    "edgeq.quant.decoder.sensitivity": ("Sensitivity",),
    "edgeq.quant.graph.summary": ("GraphSummary",),
    "edgeq.quant.presets": ("PRESETS",),
    "edgeq.quant.recipe": ("Recipe",),
    "edgeq.quant.rules": ("Rule",),
    "edgeq.quant.summary": ("QuantizationSummary",),
    "edgeq.runtime.chat_template": ("render_chat",),
    "edgeq.runtime.constraint": ("GrammarVocabulary",),
    "edgeq.runtime.draft": ("Draft",),
    "edgeq.runtime.engine": ("Engine",),
    "edgeq.runtime.generate": ("Chunk", "generate"),
    "edgeq.runtime.kernels": ("warmup",),
    "edgeq.runtime.sampling": ("SamplingParams",),
    "edgeq.runtime.tokenizer": ("Tokenizer",),
    "edgeq.serving.server": ("Server",),
    "edgeq.serving.settings": ("ServerSettings",),
    "edgeq.sweeping": ("SweepResult",),
}

__all__ = [
    "PRESETS",
    "BlockSpec",
    "CalibrationStats",
    "Check",
    "Chunk",
    "Conversation",
    "Conversion",
    "Delta",
    "DeltaSpec",
    "Detected",
    "DeviceError",
    "DeviceProfile",
    "Document",
    "DoesNotFitError",
    "Draft",
    "EdgeqError",
    "Engine",
    "Evaluation",
    "ExpertsSpec",
    "FloatTensor",
    "FormatError",
    "GrammarVocabulary",
    "Graph",
    "GraphAccuracy",
    "GraphSummary",
    "Measurement",
    "MissingDependencyError",
    "Model",
    "ModelConfig",
    "Options",
    "Outcome",
    "Package",
    "PackageReport",
    "Plan",
    "QuantScheme",
    "QuantTensor",
    "QuantizationSummary",
    "Recipe",
    "Reference",
    "RepackSummary",
    "RopeScaling",
    "RopeSpec",
    "Rule",
    "SamplingParams",
    "SchemeError",
    "Sensitivity",
    "Server",
    "ServerSettings",
    "Summary",
    "SweepResult",
    "Tokenizer",
    "UnsupportedError",
    "UsageError",
    "ValidationReport",
    "Workload",
    "__version__",
    "apply_delta",
    "bench",
    "bench_graphs",
    "calibrate",
    "chat",
    "convert",
    "demo_model",
    "detect",
    "device",
    "device_names",
    "doctor",
    "embed",
    "evaluate",
    "evaluate_graph",
    "generate",
    "inspect",
    "load",
    "open_source",
    "package",
    "package_delta",
    "parse_scheme",
    "perplexity",
    "plan",
    "profile",
    "quantize",
    "render_chat",
    "repack",
    "report",
    "rerank",
    "run",
    "save",
    "sensitivity",
    "serve",
    "sweep",
    "validate",
    "verify_package",
    "verify_reproducible",
    "warmup",
]


__getattr__ = lazy_exports(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
