"""The state that all endpoints of a server share: models, threads, metrics and sensors."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import EdgeqError
from edgeq.core.memory import rss_bytes
from edgeq.quant.decoder.model_card import model_card
from edgeq.serving.embeddings import EmbeddingCall
from edgeq.serving.metrics import Metrics, ModelMetrics, family, sample
from edgeq.serving.requests import Call
from edgeq.serving.reranking import RerankCall
from edgeq.serving.sensors import Sensors
from edgeq.serving.served import ServedModel
from edgeq.serving.settings import ServerSettings
from edgeq.serving.worker import Ended, Event, Piece, Started

LOG = logging.getLogger("edgeq.serving")


class Service:
    """The models of a server, with its metrics and sensors.

    Args:
        settings: settings of the server.
        models: the models by name; the service closes them.
        threads: executor whose threads generate answers.
    """

    def __init__(
        self,
        settings: ServerSettings,
        models: Mapping[str, ServedModel],
        threads: ThreadPoolExecutor,
    ) -> None:
        self.settings, self.models = settings, models
        self.metrics = Metrics(models)
        self.sensors = Sensors()
        self._threads = threads

    async def generate(self, call: Call, number: int) -> AsyncGenerator[Event, None]:
        """Generate one answer and count its tokens and times.

        Args:
            call: the request.
            number: which of its jobs.

        Raises:
            ApiError: see `Worker.events`.
        """
        counted = self.metrics.models[call.served.name]
        arrived, first = time.perf_counter(), True
        said: list[str] = []
        events = call.served.worker.events(call.jobs[number])
        try:
            async for event in events:
                if isinstance(event, Started):
                    counted.prompt += event.n_prompt
                    counted.cached += event.n_cached
                    counted.prompts += 1
                    counted.hits += event.n_cached > 1
                elif isinstance(event, Piece):
                    counted.generated += 1
                    if first:
                        counted.ttft.add(time.perf_counter() - arrived)
                        first = False
                elif isinstance(event, Ended):
                    counted.drafted += event.n_drafted
                    counted.accepted += event.n_accepted
                    if event.tpot_s is not None:
                        counted.tpot.add(event.tpot_s)
                if self.settings.log_prompts and isinstance(event, Piece | Ended):
                    said.append(event.text)
                yield event
        finally:
            await events.aclose()
            if self.settings.log_prompts:
                LOG.info("answer: %r", "".join(said))

    async def embed(self, call: EmbeddingCall) -> NDArray[np.float32]:
        """Compute the embeddings [n, hidden] of a request and count its tokens.

        Raises:
            ApiError: see `Worker.embed`.
        """
        if self.settings.log_prompts:
            for text in call.texts:
                LOG.info("text: %r", call.served.tokenizer.decode(text))
        vectors = await call.served.worker.embed(call.texts, call.skipped, call.how)
        self.metrics.models[call.served.name].prompt += sum(map(len, call.texts))
        return vectors

    async def rerank(self, call: RerankCall) -> list[float]:
        """The relevance of a request's documents; counts the tokens of its prompts.

        Raises:
            ApiError: see `Worker.rank`.
        """
        if self.settings.log_prompts:
            for prompt in call.prompts:
                LOG.info("prompt: %r", call.served.tokenizer.decode(prompt))
        scores = await call.served.worker.rank(call.prompts, call.by)
        self.metrics.models[call.served.name].prompt += sum(map(len, call.prompts))
        return scores

    def log_prompt(self, call: Call) -> None:
        """Write the prompts to the log, if the settings ask for it."""
        if self.settings.log_prompts:
            for job in call.jobs:
                LOG.info("prompt: %r", call.served.tokenizer.decode(job.prompt))

    def defaults(self) -> dict[str, Any]:
        """The default parameters of sampling, for requests that do not set them."""
        return {k: v for k, v in asdict(self.settings.params).items() if k != "logit_bias"}

    def live(self) -> dict[str, Any]:
        """Current memory, temperature and power; None for what this machine cannot measure."""
        state = self.sensors.latest()
        return {
            "resident_bytes": rss_bytes(),
            "temperature_c": state.temperature_c,
            "watts": state.watts,
            "watts_cover": state.covers,
        }

    def card(self, served: ServedModel) -> dict[str, Any]:
        """The quality report of a model as Markdown; None if the model is not an artifact."""
        if "recipe" not in served.model.provenance:
            return {"id": served.name, "markdown": None}
        try:
            return {"id": served.name, "markdown": model_card(served.model, served.name)}
        except EdgeqError as err:
            LOG.warning("the quality report of %s cannot be shown: %s", served.name, err)
            return {"id": served.name, "markdown": None}

    def prometheus(self) -> str:
        """All metrics in the text format of Prometheus."""
        lines: list[str] = []

        def of_models(name: str, kind: str, about: str, value: Any) -> None:
            found = [sample(name, {"model": one.name}, value(one)) for one in self.models.values()]
            lines.extend(family(name, kind, about, found))

        def counted(one: ServedModel) -> ModelMetrics:
            return self.metrics.models[one.name]

        def histogram(name: str, about: str, which: str) -> None:
            found: Iterable[str] = [
                line
                for model, held in self.metrics.models.items()
                for line in getattr(held, which).lines(name, {"model": model})
            ]
            lines.extend(family(name, "histogram", about, found))

        requests = [
            sample("edgeq_requests_total", {"path": path, "status": str(status)}, count)
            for (path, status), count in sorted(self.metrics.requests.items())
        ]
        lines += family("edgeq_requests_total", "counter",
                        "Requests by path and status; 499: the client disconnected.",
                        requests)  # fmt: skip
        of_models("edgeq_prompt_tokens_total", "counter", "Tokens of prompts.",
                  lambda one: counted(one).prompt)  # fmt: skip
        of_models("edgeq_cached_tokens_total", "counter",
                  "Prompt tokens that were in a KV cache and not run again.",
                  lambda one: counted(one).cached)  # fmt: skip
        of_models("edgeq_generated_tokens_total", "counter", "Tokens generated.",
                  lambda one: counted(one).generated)  # fmt: skip
        of_models("edgeq_drafted_tokens_total", "counter",
                  "Tokens that were drafted.", lambda one: counted(one).drafted)  # fmt: skip
        of_models("edgeq_accepted_tokens_total", "counter", "Drafted tokens that were accepted.",
                  lambda one: counted(one).accepted)  # fmt: skip
        histogram("edgeq_time_to_first_token_seconds",
                  "Time from a request to its first token, including the wait for a slot.",
                  "ttft")  # fmt: skip
        histogram("edgeq_time_per_output_token_seconds",
                  "Mean time per token after the first, one value per answer.", "tpot")  # fmt: skip
        of_models("edgeq_slots", "gauge", "Answers that can be generated at the same time.",
                  lambda one: len(one.slots.slots))  # fmt: skip
        of_models("edgeq_requests_running", "gauge", "Answers that are being generated.",
                  lambda one: one.slots.running)  # fmt: skip
        of_models("edgeq_requests_waiting", "gauge", "Requests that wait for a slot.",
                  lambda one: one.slots.waiting)  # fmt: skip
        of_models("edgeq_prefix_cache_bytes", "gauge",
                  "Memory of the KV caches of earlier sequences.",
                  lambda one: one.cache.nbytes)  # fmt: skip
        of_models("edgeq_prompts_total", "counter", "Prompts of answers.",
                  lambda one: counted(one).prompts)  # fmt: skip
        of_models("edgeq_prefix_cache_hits_total", "counter",
                  "Prompts of which more than the first token was in a KV cache.",
                  lambda one: counted(one).hits)  # fmt: skip
        live = self.live()
        for name, key, about in (
            ("edgeq_resident_memory_bytes", "resident_bytes", "Resident memory of the server."),
            ("edgeq_temperature_celsius", "temperature_c", "The processor's temperature."),
            (
                "edgeq_power_watts",
                "watts",
                "Power, from the meter that covers most of this machine.",
            ),
        ):
            found = [] if live[key] is None else [sample(name, {}, live[key])]
            lines += family(name, "gauge", about, found)
        return "\n".join(lines) + "\n"

    def end_by(self, end: float) -> None:
        """Let all answers end at this time of the monotonic clock; see `Worker.end_by`."""
        for served in self.models.values():
            served.worker.end_by(end)

    def close(self) -> None:
        """Stop the threads and release the engines."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        self.sensors.close()
        for served in self.models.values():
            served.close()
