"""Profiles of devices: every number has a source, and nothing slips past the loader."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from edgeq.cli import main
from edgeq.core.errors import DeviceError, FormatError
from edgeq.devices import profile as profiles
from edgeq.devices.cores import CORES
from edgeq.devices.profile import (
    NUMBERS,
    Cluster,
    DeviceProfile,
    find,
    memory_peak_gb_s,
    names,
    read_profiles,
)
from tests.paths import TESTS

PROMISED = (
    "rpi-zero-2w", "rpi3", "rpi4", "rpi4-2gb", "rpi4-4gb", "rpi4-8gb", "rpi5", "rpi5-2gb",
    "rpi5-4gb", "rpi5-8gb", "rpi5-16gb", "rpi500-plus", "jetson-nano", "jetson-orin-nano",
    "iphone-13", "iphone-13-pro", "iphone-14", "iphone-14-pro", "iphone-15", "iphone-15-pro",
    "iphone-16", "iphone-16-pro", "iphone-17", "iphone-17-pro", "pixel-7", "pixel-8", "pixel-9",
    "pixel-10", "galaxy-s22", "galaxy-s23", "galaxy-s24", "galaxy-s25", "galaxy-s26", "phone-low",
    "phone-mid", "phone-high", "n100", "m1", "m2", "m3", "m4", "graviton2", "graviton3",
    "graviton4",
)  # fmt: skip


def test_the_devices_that_were_promised_are_there() -> None:
    assert set(PROMISED) <= set(names())


@pytest.mark.parametrize("name", names())
def test_every_number_has_a_source(name: str) -> None:
    profile = find(name)
    assert profile.name == name
    for field in NUMBERS:
        if getattr(profile, field) not in (None, ()):
            source = profile.sources[field]
            assert source.startswith("estimate: ") or "." in source or "#" in source, source
    assert set(profile.sources) <= {*NUMBERS, "isa", "soc", "accelerators"}
    assert json.loads(json.dumps(profile.to_dict()))["name"] == name


@pytest.mark.parametrize("name", names())
def test_numbers_are_possible(name: str) -> None:
    profile = find(name)
    assert profile.ram_bytes
    assert profile.usable_bytes
    assert 0.25 * profile.ram_bytes <= profile.usable_bytes <= profile.ram_bytes
    assert profile.memory
    assert profile.read_gb_s
    peak = memory_peak_gb_s(profile.memory)
    assert all(rate <= peak for rate in profile.read_gb_s.values())
    assert all(threads <= profile.cores for threads in profile.read_gb_s)
    if profile.idle_watts and profile.load_watts:
        assert profile.idle_watts < profile.load_watts
    for cluster in profile.clusters:
        assert cluster.core in CORES or profile.isa, cluster


def test_variants_are_like_their_base_but_for_what_they_say() -> None:
    base, small = find("rpi5"), find("rpi5-2gb")
    assert small.ram_bytes == 2 << 30
    assert small.read_gb_s == base.read_gb_s
    assert small.sources["read_gb_s"] == base.sources["read_gb_s"]
    assert small.sources["idle_watts"] != base.sources["idle_watts"]
    assert small.int8_gops == base.int8_gops == 4 * 2.4 * 64


def test_known_numbers() -> None:
    assert find("rpi4").isa == ("neon",), "a Cortex-A72 has no dot products"
    assert "dotprod" in find("rpi5").isa
    assert "i8mm" in find("pixel-8").isa
    assert find("iphone-13").usable_bytes == int(2.1 * 2**30)
    assert find("RPI5") is find("rpi5")
    assert find("n100").int8_gops == 870


def test_an_unknown_device_has_a_nearest() -> None:
    with pytest.raises(DeviceError, match=r"'rpi-5'; did you mean 'rpi5'\?.*devices list"):
        find("rpi-5")


GOOD = """
[mine]
title = "A board"
kind = "sbc"
clusters = [{ core = "Cortex-A76", count = 4, ghz = 2.0 }]
ram_bytes = "4 GiB"
memory = "LPDDR4-3200 x 32"
[mine.sources]
clusters = "estimate: counted"
ram_bytes = "board.example.com"
memory = "board.example.com"
"""


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return str(path)


def test_a_profile_of_one_s_own(tmp_path: Path) -> None:
    mine = find(written(tmp_path, GOOD))
    assert mine.ram_bytes == 4 << 30
    assert mine.usable_bytes is None
    assert mine.idle_watts is None
    assert mine.read_gb_s == {4: 9.0}  # 0.7 of 12.8, rounded
    assert mine.sources["read_gb_s"].startswith("estimate: 0.7 of the 12.8 GB/s")
    assert mine.int8_gops == 512
    assert mine.isa == ("asimdhp", "dotprod", "neon")


def test_a_profile_may_be_like_a_known_one(tmp_path: Path) -> None:
    text = (
        '[mine]\nlike = "rpi5"\nclusters = [{ core = "Cortex-A76", count = 4, ghz = 3.0 }]\n'
        'sources.clusters = "estimate: overclocked"\n'
    )
    mine = find(written(tmp_path, text))
    assert mine.int8_gops == 768, "reckoned anew"
    assert mine.read_gb_s == find("rpi5").read_gb_s, "measured, not reckoned: kept"
    assert mine.sources["clusters"] == "estimate: overclocked"
    slower = text.replace("[mine]", "[mine]\nmemory = 'LPDDR4-3200 x 32'").replace(
        "rpi5", "pixel-7"
    )
    slower += "sources.memory = 'estimate: slower'\n"
    assert find(written(tmp_path, slower)).read_gb_s == {4: 9.0}


def test_a_profile_survives_being_written(tmp_path: Path) -> None:
    for name in ("rpi5", "n100", "phone-mid"):
        original = find(name)
        text = original.to_toml().replace(f"[{name}", "[copy")
        copy = find(written(tmp_path, text)).to_dict()
        assert copy | {"name": name} == original.to_dict()


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('ram_bytes = "board.example.com"\n', "", "ram_bytes has the source ''"),
        ('clusters = "estimate: counted"', 'clusters = "I think"', "source 'I think'"),
        ('ram_bytes = "4 GiB"', "ram_bytes = 4", "sizes are written '8 GiB'"),
        ('ram_bytes = "4 GiB"', 'ram_bytes = "4 GB"', "sizes are written '8 GiB'"),
        ('ram_bytes = "4 GiB"', 'ram_bites = "4 GiB"', "did you mean 'ram_bytes'"),
        ('kind = "sbc"', 'kind = "sbd"', "did you mean 'sbc'"),
        ('kind = "sbc"', "", "kind is missing"),
        ('title = "A board"', "title = 3", "must be a string"),
        ("ghz = 2.0", "ghz = 2000", "clocks are in GHz"),
        ("count = 4", "count = 0", "impossible count"),
        ("count = 4", "number = 4", "has the wrong form"),
        ("LPDDR4-3200 x 32", "fast", "LPDDR5-6400 x 64"),
        ("[mine.sources]", "load_watts = 0\n[mine.sources]", "leave out what is 0"),
        ("[mine.sources]", "read_gb_s = { 0 = 3 }\n[mine.sources]", "threads = GB/s"),
        ("[mine.sources]", "read_gb_s = {}\n[mine.sources]", "threads = GB/s"),
        ("[mine.sources]", 'match = "rpi*"\n[mine.sources]', "expected a list"),
        ("[mine.sources]", 'usable_bytes = "5 GiB"\n[mine.sources]', "more than its memory"),
        ("[mine.sources]", '[mine.sources]\nidle_wats = "x.com"', "which are not numbers"),
        ("[mine]", "like = 3\n[mine]", "is outside of a profile"),
        ("[mine]", '[mine]\nlike = "rpi55"', "did you mean 'rpi5'"),
        ("[mine]", "[[mine]]", "is not TOML|is outside"),
        ("[mine]\n", "[rpi5]\n", "the profile 'rpi5' occurs twice"),
        ("[mine]", '[other]\nlike = "rpi5"\n[mine]', "holds 2 profiles"),
        ("[mine]", "mine]", "is not TOML"),
    ],
)
def test_what_is_wrong_is_refused_with_its_mend(
    old: str, new: str, complaint: str, tmp_path: Path
) -> None:
    assert old in GOOD
    with pytest.raises(FormatError, match=complaint):
        find(written(tmp_path, GOOD.replace(old, new, 1)))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="cannot be read"):
        find(str(tmp_path / "none.toml"))


def test_an_inherited_number_needs_a_source_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "two.toml"
    path.write_text(GOOD + '\n[big]\nlike = "mine"\nram_bytes = "8 GiB"\n')
    with pytest.raises(FormatError, match="profile big: ram_bytes has the source ''"):
        read_profiles(path, {})


def test_a_profile_cannot_be_changed() -> None:
    profile = find("rpi5")
    with pytest.raises(TypeError):
        profile.read_gb_s[2] = 1.0  # type: ignore[index]
    with pytest.raises(TypeError):
        profile.sources["x"] = "y"  # type: ignore[index]
    assert DeviceProfile("x", "X", "sbc", clusters=(Cluster("a", 2),),
                         sources={"clusters": "estimate: two"}).cores == 2  # fmt: skip


def test_files_are_packaged() -> None:
    folder = Path(profiles.__file__).parent / "profiles"
    assert len(list(folder.glob("*.toml"))) >= 4


# the command


@pytest.mark.parametrize("verb", ["list", "show", "detect"])
def test_help_is_what_was_agreed(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    text = said(["devices", verb, "--help"], capsys)
    snapshot = TESTS / "snapshots" / "devices" / f"{verb}.txt"
    if os.environ.get("EDGEQ_UPDATE_SNAPSHOTS"):
        snapshot.write_text(text, "utf-8")
    assert text == snapshot.read_text("utf-8"), "EDGEQ_UPDATE_SNAPSHOTS=1 accepts the new help"


def said(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(args) == 0
    return capsys.readouterr().out


def test_the_list_has_every_device(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(["devices", "list"], capsys)
    assert [line.split()[0] for line in text.splitlines()[2:]] == names()
    found = json.loads(said(["devices", "list", "--format", "json"], capsys))
    assert [device["name"] for device in found] == names()
    assert all("sources" in device for device in found)


def test_a_device_is_shown_with_its_sources(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(["devices", "show", "rpi-zero-2w"], capsys)
    assert "per app       340.00 MiB" in text
    assert "3DeL.txt" in text
    assert "load power    unknown" in text
    assert (
        json.loads(said(["devices", "show", "m1", "--format", "json"], capsys))
        == find("m1").to_dict()
    )
    assert said(["devices", "show", "m1", "--format", "toml"], capsys) == find("m1").to_toml()


def test_an_unknown_device_is_exit_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["devices", "show", "pixel-99"]) == 1
    assert "did you mean 'pixel-9" in capsys.readouterr().err
