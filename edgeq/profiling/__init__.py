"""What a machine does with a model: timed runs with raw samples, memory, heat and energy.

    session      the measuring harness: candidates take turns, every time is kept
    candidates   what a session times: the engine, a converted model, any graph
    measure      tokens per second of one workload, as llama-bench measures them
    foreign      models in another runtime, and what its own profiler reports
    operations   the time of every step of the engine's decoder
    profile      a session while meters record memory, clock, temperature and power
    document     all of it as one JSON file; summary derives numbers from it
    limits       figures that exceed what the machine was measured to do
    remote       profiling on another machine; remote_job is the part that runs there

What cannot be measured here is None, never 0.
"""

from __future__ import annotations

from edgeq.profiling.candidates import bytes_read_per_token
from edgeq.profiling.measure import Measurement, measure, read_bandwidth
from edgeq.profiling.session import Workload

__all__ = ["Measurement", "Workload", "bytes_read_per_token", "measure", "read_bandwidth"]
