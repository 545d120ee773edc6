"""A Raspberry Pi's flags of throttling: where they are found, and what their bits mean.

Source: vcgencmd of the Raspberry Pi documentation.
"""

from __future__ import annotations

import re

from edgeq.core.errors import DeviceError

GET_THROTTLED = ("vcgencmd", "get_throttled")
FIRMWARE_FLAGS = "sys/devices/platform/soc/soc:firmware/get_throttled"

BITS = {
    0: "under-voltage",
    1: "frequency capped",
    2: "throttled",
    3: "soft temperature limit",
}
"""Bit of the Raspberry Pi's flags -> what is so now; 16 bits further up: since it started."""


def parse_throttled(text: str) -> dict[str, bool]:
    """The flags of `throttled=0x50005` or of the bare number, which is hexadecimal either way.

    Raises:
        DeviceError: there is no such number.
    """
    match = re.fullmatch(r"(?:throttled=)?(?:0x)?([0-9a-fA-F]+)", text.strip())
    if not match:
        raise DeviceError(f"get_throttled: expected throttled=0x..., got {text.strip()[:40]!r}")
    bits = int(match[1], 16)
    now = {what: bool(bits >> bit & 1) for bit, what in BITS.items()}
    since = {f"{what} since start": bool(bits >> bit + 16 & 1) for bit, what in BITS.items()}
    return now | since
