"""Tiers: the ways to run a package's model among which its code chooses by the memory that is free.

A tier is a model file with a context length, for a class of devices. The tiers of a form are listed
from the most memory to the least. The code of a package takes the first whose memory is free when
the model is opened.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgeq.core.errors import FormatError
from edgeq.packaging.checked import COUNT, NAME, OPTIONAL_COUNT, TEXTS, checked_fields

PLAN = "edgeq plan"
"""The source of figures for language models. Nothing was measured on a device."""
INSPECT = "edgeq inspect"
"""The source of figures for graphs: the size of the file and of the activations."""


@dataclass(frozen=True)
class Tier:
    """A model file with a context length.

    Args:
        id: identifier within the package, such as "litertlm-1280".
        variant: identifier of the variant whose file is run.
        entry: path of the model's file or folder.
        context: number of tokens of prompt and answer together; None for a graph.
        compute_units: "cpu", or what Core ML calls its compute units, such as "cpuAndGPU".
        threads: number of threads; None leaves it to the runtime.
        needed_bytes: memory that must be free.
        least_ram_bytes: the smallest memory of a device in edgeq's table of devices on which a
            process can have ``needed_bytes``. None if there is no such device in the table.
        devices: names of the devices in that table that take this tier when nothing else runs.
        by: where the figures come from, `PLAN` or `INSPECT`.
    """

    id: str
    variant: str
    entry: str
    context: int | None
    compute_units: str
    threads: int | None
    needed_bytes: int
    least_ram_bytes: int | None
    devices: tuple[str, ...]
    by: str

    @classmethod
    def from_dict(cls, data: Any) -> Tier:
        """Read a tier from its JSON object.

        Raises:
            FormatError: a field is missing, unknown or of another type.
        """
        return cls(**checked_fields(data, "a tier", _KINDS))


_KINDS = {
    "id": NAME,
    "variant": NAME,
    "entry": NAME,
    "context": OPTIONAL_COUNT,
    "compute_units": NAME,
    "threads": OPTIONAL_COUNT,
    "needed_bytes": COUNT,
    "least_ram_bytes": OPTIONAL_COUNT,
    "devices": TEXTS,
    "by": NAME,
}
"""The fields of a tier."""


def check_tiers(
    tiers: Sequence[Tier],
    forms: Mapping[str, str],
    entries: Mapping[str, str],
    planned: Mapping[str, Mapping[int | None, int]],
) -> None:
    """Check that tiers agree with the variants of a manifest.

    Args:
        tiers: the tiers in the order of the manifest.
        forms: identifier of a variant -> identifier of its form.
        entries: identifier of a variant -> path of its file or folder.
        planned: identifier of a variant -> context -> memory in bytes that its table states.

    Raises:
        FormatError: a tier names another file, or states other figures than its variant; a variant
            has no tier; two have the same identifier; or the tiers of a form are not in order. The
            message names the tier.
    """
    last: dict[str, int] = {}
    for tier in tiers:
        if tier.variant not in forms:
            raise FormatError(f"the tier {tier.id} is of the variant {tier.variant!r}, which is "
                              f"not one of {', '.join(forms)}")  # fmt: skip
        if tier.entry != entries[tier.variant]:
            raise FormatError(
                f"the tier {tier.id} names the file {tier.entry}, and its variant has "
                f"{entries[tier.variant]}"
            )
        if planned[tier.variant].get(tier.context) != tier.needed_bytes:
            raise FormatError(
                f"the tier {tier.id} needs {tier.needed_bytes} bytes with a context of "
                f"{tier.context}, which the memory of its variant does not state"
            )
        form = forms[tier.variant]
        if tier.needed_bytes > last.get(form, tier.needed_bytes):
            raise FormatError(
                f"the tier {tier.id} comes after one that needs less memory; they must go from the "
                "most memory to the least"
            )
        last[form] = tier.needed_bytes
    ids = [tier.id for tier in tiers]
    if len(set(ids)) != len(ids):
        raise FormatError("two tiers have the same identifier")
    if missing := sorted(set(forms) - {tier.variant for tier in tiers}):
        raise FormatError(f"the variant {missing[0]} has no tier")
