"""Memory and speed that packages state."""

from __future__ import annotations

import json
from pathlib import Path

from edgeq.devices.model_header import facts_of
from edgeq.devices.planner import plan
from edgeq.devices.profile import find
from edgeq.importers import load
from edgeq.packaging import estimates
from edgeq.packaging.platforms import PLATFORMS


def test_a_form_fits_where_the_memory_that_its_table_states_does(rpi_made: Path) -> None:
    """That of the whole server with its caches, not that of the engine alone."""
    facts = facts_of(load(rpi_made / "model/tale.edgeq"), "tale")
    zero = find("rpi-zero-2w")
    usable = plan(facts, zero, context=128).usable_bytes
    for needed, fits in ((usable, True), (usable + 1, False)):
        rows, _ = estimates.speeds(facts, ["rpi-zero-2w"], 128, needed)
        assert [row["fits"] for row in rows] == [fits]
    (variant,) = json.loads((rpi_made / "manifest.json").read_text("utf-8"))["variants"]
    total = variant["memory"][-1]["total_bytes"]
    devices = PLATFORMS["rpi"].models[0].plans
    for name, row in zip(devices, variant["speed"], strict=True):
        assert row["fits"] == (total <= plan(facts, find(name), context=128).usable_bytes)
