"""What a machine does with a model: timed runs, raw samples kept; memory, heat and energy.

    scenario     one thing timed again and again, as llama-bench does
    session      prompts read and tokens generated, every token's time kept
    subjects     what a session runs: our engine, a converted model, any graph
    foreign      models in another runtime, and what its own profiler says
    operations   the time of every step of our decoder
    watch        memory, clock, temperature and power meanwhile
    document     all of it as one JSON file; summary derives numbers from it

What cannot be measured here is None, never 0.
"""

from __future__ import annotations

from edgeq.profiling.scenario import (
    Measurement,
    Scenario,
    bytes_read_per_token,
    measure,
    read_bandwidth,
)

__all__ = ["Measurement", "Scenario", "bytes_read_per_token", "measure", "read_bandwidth"]
