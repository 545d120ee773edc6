"""The power management chip of a Raspberry Pi 5 (also 500, Compute Module 5).

`vcgencmd pmic_read_adc` gives a current and a voltage for each of 12 rails. Their products add up
to less than the board takes: what is drawn straight from the 5 V input (USB devices, HATs, NVMe)
and what the converters lose is not among them. A straight line through measurements with a meter
in the USB-C cable mends that on the average:

    input = 1.1451 * sum(V * I) + 0.5879 W

Source: J. Fikar, https://github.com/jfikar/RPi5-power, one board, a USB-C meter at different loads.
It is power at the USB-C plug: the loss of the supply in the wall comes on top, and USB devices
that draw from the 5 V input are not seen.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path

from edgeq.core.errors import DeviceError
from edgeq.devices.meters.base import Absent, Meter, Reading, Run, number, optional_text
from edgeq.devices.meters.kind import MeterKind

NAME = "pmic"
COMMAND = ("vcgencmd", "pmic_read_adc")
BOARDS = ("Raspberry Pi 5", "Raspberry Pi 500", "Raspberry Pi Compute Module 5")

INPUT_SLOPE = 1.1451
INPUT_OFFSET_W = 0.5879

RAILS, INPUT = "rails", "input"
"""Channels besides the rails: their sum, and the input power computed from it."""

_LINE = re.compile(r"(\w+)_([AV])\b[^=\n]*=\s*(\S+?)[AV]?\s*$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Pmic(Meter):
    """Runs the command and adds the rails up.

    Args:
        run: runs it on the board.
    """

    run: Run

    def read(self) -> Reading:
        """Watts of each rail, of their sum, and of the input."""
        start = time.monotonic_ns()
        text = self.run(COMMAND)
        middle = (start + time.monotonic_ns()) // 2
        rails = rail_watts(text)
        total = sum(rails.values())
        return Reading(middle, {**rails, RAILS: total, INPUT: input_watts(total)})


def rail_watts(text: str) -> dict[str, float]:
    """Watts of each rail that has both a current and a voltage.

    EXT5V and BATT have only a voltage and are left out.

    Raises:
        DeviceError: no rail has both, a value is no number, or a current has no voltage.
    """
    values = {"A": {}, "V": {}}  # type: dict[str, dict[str, float]]
    for rail, kind, value in _LINE.findall(text):
        values[kind][rail] = number(value, f"{' '.join(COMMAND)}, {rail}_{kind}")
    lonely = set(values["A"]) - set(values["V"])
    if lonely or not values["A"]:
        what = f"no voltage for {', '.join(sorted(lonely))}" if lonely else "no rails"
        raise DeviceError(f"{' '.join(COMMAND)}: {what} in {text.strip()[:80]!r}")
    return {rail: amps * values["V"][rail] for rail, amps in values["A"].items()}


def input_watts(rails: float) -> float:
    """Watts at the USB-C plug from the sum over the rails (see the module's source)."""
    return INPUT_SLOPE * rails + INPUT_OFFSET_W


def find(root: Path, run: Run | None) -> list[Meter | Absent]:
    """The meter, where this is a board that has the chip and the command answers."""
    board = board_name(root)
    if board is None or not board.startswith(BOARDS):
        this = f"this is a {board}" if board else "this is none"
        return [Absent(NAME, f"only a Raspberry Pi 5, 500 or Compute Module 5 has it; {this}")]
    if run is None:
        return [Absent(NAME, f"{' '.join(COMMAND)} was not run: {root} is not a running system")]
    try:
        rails = rail_watts(run(COMMAND))
    except DeviceError as err:
        return [
            Absent(
                NAME,
                f"{err}; apt install raspi-utils brings vcgencmd, and the user must be in the "
                "group video: sudo usermod -aG video $USER, then log in again",
            )
        ]
    return [
        Pmic(
            name=NAME,
            quantity="power",
            provenance=f"{' '.join(COMMAND)}, {len(rails)} rails; input = {INPUT_SLOPE} * "
            f"sum(V*I) + {INPUT_OFFSET_W} W (github.com/jfikar/RPi5-power)",
            rate_hz=5,
            covers="board at its USB-C plug, by the rails and a correction",
            scope="board",
            total=(INPUT,),
            waits=True,
            run=run,
        )
    ]


def board_name(root: Path) -> str | None:
    """What the device tree calls the board, as in "Raspberry Pi 5 Model B Rev 1.0"."""
    for path in ("proc/device-tree/model", "sys/firmware/devicetree/base/model"):
        name = optional_text(root / path)
        if name:
            return name.rstrip("\0 ")
    return None


KIND = MeterKind(name="pmic", find=find)
