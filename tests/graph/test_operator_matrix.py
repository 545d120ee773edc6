"""Every operator over its attributes computes what ONNX Runtime does, or is refused by name."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping

import pytest

from tests.operator_cases import GROUPS, cases
from tests.operator_matrix import STAGES, Case, outcomes

LEAST = {"read": 0.7, "record": 1.0, "ort": 1.0, "tflite": 0.75, "coreml": 0.75}
"""Stage -> the share of those that reach it that it must compute, not refuse."""
_PARTS = 6


def part(case: Case) -> int:
    """Which part of the matrix a case is in, by its name."""
    return zlib.crc32(case.name.encode()) % _PARTS


def check(found: Mapping[str, Mapping[str, str]], least: Mapping[str, float] = LEAST) -> None:
    """Fail where a case is neither right nor refused by name, or where too many are refused."""
    wrong = [
        f"{name}: {stage}: {what}"
        for name, stages in found.items()
        for stage, what in stages.items()
        if what != "right" and not what.startswith("refused")
    ]
    assert not wrong, f"{len(wrong)} of {len(found)}:\n" + "\n".join(wrong[:20])
    for stage in STAGES:
        counts = Counter(s[stage].split(":")[0] for s in found.values() if stage in s)
        assert counts["right"] >= least[stage] * counts.total(), (stage, counts)


@pytest.mark.parametrize("group", GROUPS)
def test_a_part_of_the_matrix(group: str) -> None:
    check({n: outcomes(case) for n, case in cases(group).items() if part(case) == 0})


@pytest.mark.heavy
@pytest.mark.parametrize("number", range(1, _PARTS))
@pytest.mark.parametrize("group", GROUPS)
def test_the_rest_of_the_matrix(group: str, number: int) -> None:
    # more of Resize's settings are refused than of any other operator's
    least = LEAST | {"read": 0.6} if group == "resizes" else LEAST
    check({n: outcomes(case) for n, case in cases(group).items() if part(case) == number}, least)


def test_names_of_cases_are_their_own() -> None:
    for group, made in GROUPS.items():
        assert len(cases(group)) == len(list(made())), group
