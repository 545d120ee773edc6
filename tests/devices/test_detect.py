"""What a machine is: from dumps, from copies of /proc and /sys, from the machine itself."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeq.cli import main
from edgeq.core.errors import DeviceError
from edgeq.devices.cores import CORES, PARTS, common_isa, core_name, peak_int8_gops
from edgeq.devices.cpuinfo import unsupported
from edgeq.devices.detect import Detected, detect, detect_text
from edgeq.devices.profile import Cluster, find
from edgeq.devices.socs import named
from tests.conftest import need
from tests.dump_truth import truth_of, truths

V8 = "fp asimd evtstrm aes pmull sha1 sha2 crc32"
V82 = f"{V8} atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"


def cpu(
    number: int,
    part: int,
    revision: str = "0x4 1",
    features: str = V82,
    bogomips: str = "108.00",
) -> str:
    variant, rest = revision.split()
    return (
        f"processor\t: {number}\nBogoMIPS\t: {bogomips}\nFeatures\t: {features}\n"
        f"CPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: {variant}\n"
        f"CPU part\t: {part:#05x}\nCPU revision\t: {rest}\n\n"
    )


PI5 = "".join(cpu(i, 0xD0B) for i in range(4)) + (
    "Hardware\t: BCM2835\nRevision\t: c04170\nSerial\t\t: 0\n"
    "Model\t\t: Raspberry Pi 5 Model B Rev 1.0\n"
)
OLD_KERNEL = """Processor\t: AArch64 Processor rev 2 (aarch64)
processor\t: 0
processor\t: 1
processor\t: 2
processor\t: 3
Features\t: fp asimd aes pmull sha1 sha2 crc32
CPU implementer\t: 0x41
CPU architecture: AArch64
CPU variant\t: 0x0
CPU part\t: 0xd03
CPU revision\t: 2

Hardware\t: {hardware}
"""
X86 = """processor\t: {n}
vendor_id\t: GenuineIntel
cpu family\t: 6
model name\t: Intel(R) N100
physical id\t: 0
core id\t\t: {core}
flags\t\t: fpu lm avx2 fma f16c avx_vnni

"""


def cores(found: Detected) -> dict[str, int]:
    return {cluster.core: cluster.count for cluster in found.clusters}


# texts


def test_a_pi_is_known_by_its_model_and_memory() -> None:
    found = detect_text(PI5)
    assert found.title == "Raspberry Pi 5 Model B Rev 1.0"
    assert found.soc == "Broadcom BCM2712"
    assert cores(found) == {"Cortex-A76": 4}
    assert found.isa == ("asimdhp", "dotprod", "neon")
    assert found.arch == "aarch64"
    assert found.ram_bytes == 4 << 30
    assert (found.profile, found.match) == ("rpi5-4gb", "device")


def test_every_pi_says_bcm2835_and_is_not_believed() -> None:
    found = detect_text(PI5.replace("Model\t\t: Raspberry Pi 5 Model B Rev 1.0\n", ""))
    assert found.title == "Raspberry Pi 5 Model B", "the revision code tells"
    assert found.soc == "Broadcom BCM2712"


def test_a_kernel_that_describes_one_core_for_all() -> None:
    plain = detect_text(OLD_KERNEL.format(hardware="Something Else"))
    assert cores(plain) == {"Cortex-A53": 4}
    assert plain.title == "Something Else"
    mixed = detect_text(OLD_KERNEL.format(hardware="Qualcomm Technologies, Inc MSM8994"))
    assert cores(mixed) == {"Cortex-A57": 4, "Cortex-A53": 4}
    assert mixed.soc == "Qualcomm MSM8994 (Snapdragon 810)"


def test_cores_tell_the_chip_and_the_timer_its_maker() -> None:
    def seen(bogomips: str) -> Detected:
        small = "".join(cpu(i, 0xD05, "0x2 0", bogomips=bogomips) for i in range(4))
        large = "".join(cpu(i, 0xD0B, "0x4 0", bogomips=bogomips) for i in range(4, 8))
        return detect_text(small + large)

    rockchip = seen("48.00")
    assert rockchip.soc == "Rockchip RK3588"
    assert rockchip.sources["soc"] == "the text has its cores"
    assert [c.core for c in rockchip.clusters] == ["Cortex-A76", "Cortex-A55"], "fast ones first"
    assert seen("3.84").soc == "HiSilicon Kirin 980 or 990"
    assert seen("77.00").soc is None, "no guess without a ground"


def test_what_many_chips_share_is_answered_with_all() -> None:
    found = detect_text("".join(cpu(i, 0xD03, "0x0 4", V8, "48.00") for i in range(4)))
    assert found.soc is not None
    assert len(found.soc.split(" or ")) > 2
    assert (found.profile, found.match) == ("phone-low", "tier")


def test_tiers_follow_the_instructions() -> None:
    def tier(features: str) -> tuple[str | None, str | None]:
        found = detect_text(cpu(0, 0xFFF, features=features))
        return found.profile, found.match

    assert tier(V8) == ("phone-low", "tier")
    assert tier(V82) == ("phone-mid", "tier")
    assert tier(f"{V82} i8mm") == ("phone-high", "tier")
    assert tier("half thumb neon") == (None, None), "32-bit systems are not for edgeq"


def test_an_unknown_core_is_its_numbers() -> None:
    found = detect_text(cpu(0, 0xABC))
    assert cores(found) == {"0x41/0xabc": 1}
    assert find("phone-mid").int8_gops
    assert found.as_profile().int8_gops is None


def test_x86_counts_cores_not_threads() -> None:
    found = detect_text("".join(X86.format(n=n, core=n // 2) for n in range(4)))
    assert cores(found) == {"x86-64": 2}
    assert found.threads == 4
    assert found.isa == ("avx2", "avxvnni", "f16c", "fma")
    assert (found.profile, found.match) == ("n100", "device")


@pytest.mark.parametrize(
    ("text", "arch", "soc"),
    [
        ("processor : 0\nhart : 1\nisa : rv64imafdc\nmmu : sv39\nuarch : sifive,u74-mc\n\n"
         "processor : 1\nisa : rv64imafdc\nuarch : sifive,u74-mc\n", "riscv64", "StarFive JH7100"),
        ("system type : generic-loongson-machine\nprocessor : 0\ncpu family : Loongson-64bit\n"
         "model name : Loongson-3A6000\nfeatures : fpu lsx\n", "loongarch64", "Loongson-3A6000"),
    ],
)  # fmt: skip
def test_other_architectures(text: str, arch: str, soc: str) -> None:
    found = detect_text(text)
    assert (found.arch, found.soc, found.profile) == (arch, soc, None)


@pytest.mark.parametrize(
    "text",
    ["", "\n\n:::\n", "nonsense", "processor : x\nCPU part : 0xzz\nCPU implementer : ?\n",
     "CPU part : 0xd03 & 0xd08\n", "isa : rv\n", "vendor_id : x\nflags :\n",
     "CPU part : 0xd03\nRevision : ffffffff\nHardware : BCM2835\nBogoMIPS : 1.2.3\n"],
)  # fmt: skip
def test_nonsense_is_no_crash(text: str) -> None:
    found = detect_text(text)
    json.dumps(found.to_dict())
    found.as_profile().to_toml()


@given(st.sampled_from([PI5, OLD_KERNEL, X86]), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_damaged_text_is_no_crash(text: str, random: Random) -> None:
    letters = list(text)
    for _ in range(random.randrange(30)):
        at = random.randrange(len(letters))
        letters[at : at + random.randrange(8)] = random.choice(
            ["", ":", "\n", "0x", "processor : 7\n"]
        )
        letters = letters or [":"]
    found = detect_text("".join(letters))
    json.dumps(found.to_dict())
    found.as_profile().to_toml()


def test_line_ends_of_windows_change_nothing() -> None:
    rk3399 = "".join(cpu(i, 0xD03 if i < 4 else 0xD08, features=V8, bogomips="48.00")
                     for i in range(6))  # fmt: skip
    for text in (PI5, rk3399, X86.format(n=0, core=0)):
        assert detect_text(text.replace("\n", "\r\n")) == detect_text(text)
    assert detect_text(rk3399).soc == "Rockchip RK3399"


@pytest.mark.parametrize(
    ("model", "chip"),
    [
        ("Raspberry Pi Model B Rev 2", "Broadcom BCM2835"),
        ("Raspberry Pi Zero W Rev 1.1", "Broadcom BCM2835"),
        ("Raspberry Pi Compute Module Rev 1.0", "Broadcom BCM2835"),
        ("Raspberry Pi 2 Model B Rev 1.1", "Broadcom BCM2836"),
        ("Raspberry Pi 2 Model B Rev 1.2", "Broadcom BCM2837"),
        ("Raspberry Pi 3 Model B Rev 1.2", "Broadcom BCM2837"),
        ("Raspberry Pi 3 Model A Plus Rev 1.0", "Broadcom BCM2837B0"),
        ("Raspberry Pi Compute Module 3 Rev 1.0", "Broadcom BCM2837"),
        ("Raspberry Pi Compute Module 3 Plus Rev 1.0", "Broadcom BCM2837B0"),
        ("Raspberry Pi Zero 2 W Rev 1.0", "Broadcom BCM2710A1"),
        ("Raspberry Pi Compute Module 4 Rev 1.1", "Broadcom BCM2711"),
        ("Raspberry Pi 400 Rev 1.0", "Broadcom BCM2711"),
        ("Raspberry Pi Compute Module 5 Lite Rev 1.0", "Broadcom BCM2712"),
    ],
)
def test_the_chip_of_every_raspberry_pi(model: str, chip: str) -> None:
    text = cpu(0, 0xD03, features=V8) + f"Hardware\t: BCM2835\nModel\t\t: {model}\n"
    found = detect_text(text)
    assert (found.title, found.soc) == (model, chip)


def test_a_chip_shared_with_others_is_not_named_alone() -> None:
    old = "".join(cpu(i, 0xC07, "0x0 3", "half neon vfpv4", "26.00") for i in range(4))
    mediatek = detect_text(old + "Hardware\t: Mediatek Cortex-A7 (Device Tree)\n")
    assert mediatek.soc == "MediaTek MT6580 or MT7623"
    assert detect_text(old + "Hardware\t: bigfish\n").soc == "HiSilicon Hi3796 or Hi3798"
    a53 = detect_text("".join(cpu(i, 0xD03, "0x0 4", V8, "48.00") for i in range(4)))
    for chip in ("H616", "A113X", "RK3528", "RK3328", "another"):
        assert chip in (a53.soc or ""), chip
    a35 = detect_text("".join(cpu(i, 0xD04, "0x0 2", V8, "48.00") for i in range(4)))
    assert "RK3308" in (a35.soc or "")
    assert "another" in (a35.soc or "")


def test_a_core_that_only_its_variant_tells() -> None:
    def server(variant: int) -> str:
        one = cpu(0, 0, f"{variant:#x} 2", V8, "80.00")
        return one.replace("CPU implementer\t: 0x41", "CPU implementer\t: 0x50")

    assert detect_text(server(0)).soc == "Applied Micro X-Gene"
    assert detect_text(server(3)).soc == "Ampere eMAG"


def test_a_chip_in_the_processor_s_name() -> None:
    text = cpu(0, 0x862, features=V82).replace("0x41", "0x70")
    assert detect_text(text).soc is None
    found = detect_text("model name\t: Phytium,D2000/8 E8C\n" + text)
    assert found.soc == "Phytium D2000"


@pytest.mark.parametrize(
    ("cores", "chip", "profile", "match"),
    [
        (6, "NVIDIA Orin (T234)", "jetson-orin-nano", "chip"),
        (8, "NVIDIA Orin (T234)", "jetson-orin-nx", "chip"),
        (12, "NVIDIA Orin (T234)", "jetson-agx-orin", "chip"),
        (10, "NVIDIA Orin (T234)", "phone-mid", "tier"),
    ],
)
def test_a_device_of_the_same_chip_has_as_many_cores(
    cores: int, chip: str, profile: str, match: str
) -> None:
    text = "".join(cpu(i, 0xD42, "0x0 1", V82, "62.50") for i in range(cores))
    found = detect_text(text)
    assert (found.soc, found.profile, found.match) == (chip, profile, match)


LOONGSON = """processor\t\t: {n}
package\t\t\t: 0
core\t\t\t: {core}
cpu family\t\t: Loongson-64bit
model name\t\t: Loongson-3A6000
isa\t\t\t: loongarch32 loongarch64
features\t\t: cpucfg lam ual fpu lsx lasx

"""
MIPS = """system type\t\t: {system}
machine\t\t\t: {machine}
processor\t\t: 0
cpu model\t\t: {model}
{name}BogoMIPS\t\t: 1196.85
isa\t\t\t: {isa}
package\t\t\t: 0
core\t\t\t: 0

processor\t\t: 1
cpu model\t\t: {model}
{name}BogoMIPS\t\t: 1196.85
isa\t\t\t: {isa}
package\t\t\t: 0
core\t\t\t: 1
"""


def test_loongson_counts_cores_not_threads() -> None:
    text = "".join(LOONGSON.format(n=n, core=n // 2) for n in range(8))
    found = detect_text(text)
    assert (found.arch, found.soc, found.threads, found.cores) == (
        "loongarch64", "Loongson-3A6000", 8, 4
    )  # fmt: skip


def test_mips_and_others_are_named_and_said_not_to_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ci20 = MIPS.format(system="JZ4780", machine="imgtec,ci20", name="",
                       model="Ingenic JZRISC V4.15", isa="mips1 mips32r2")  # fmt: skip
    found = detect_text(ci20)
    assert (found.arch, found.title, found.soc, found.cores, found.match) == (
        "mips", "imgtec,ci20", "JZ4780", 2, None
    )  # fmt: skip
    loongson = MIPS.format(system="generic-loongson-machine", machine="loongson,generic",
                           name="model name\t\t: Loongson-3A R3 (Loongson-3A3000) @ 1400MHz\n",
                           model="Loongson-3 V0.9", isa="mips1 mips64r2")  # fmt: skip
    found = detect_text(loongson)
    assert found.arch == "mips64"
    assert "3A3000" in (found.soc or "")
    harts = detect_text("hart\t: 0\nisa\t: rv64imafdc\n\nhart\t: 1\nisa\t: rv64imafdc\n")
    assert (harts.arch, harts.cores) == ("riscv64", 2)
    for arch in ("mips", "riscv64", "loongarch64", "armv7l"):
        assert "llama.cpp" in (unsupported(arch) or "")
    for runs in ("x86_64", "aarch64", "arm64", "AMD64", None):
        assert unsupported(runs) is None
    path = tmp_path / "cpuinfo"
    path.write_text(ci20)
    assert main(["devices", "detect", "--from", str(path)]) == 0
    assert "does not run on mips" in capsys.readouterr().out


def test_both_types_of_cores_of_a_hybrid_intel_processor(tmp_path: Path) -> None:
    # two performance cores of two threads, four efficiency cores of one
    threads = [(0, 0), (1, 0), (2, 1), (3, 1), *((n, n) for n in range(4, 8))]
    tree = {
        "proc/cpuinfo": "".join(X86.format(n=n, core=core) for n, core in threads),
        "sys/devices/cpu_core/cpus": "0-3", "sys/devices/cpu_atom/cpus": "4-7",
    }  # fmt: skip
    for n, _ in threads:
        policy = f"sys/devices/system/cpu/cpufreq/policy{n}"
        tree[f"{policy}/related_cpus"] = str(n)
        tree[f"{policy}/cpuinfo_max_freq"] = "5000000" if n < 4 else "3800000"
    found = detect(machine(tmp_path, tree))
    assert found.clusters == (
        Cluster("Intel performance", 2, 5.0), Cluster("Intel efficiency", 4, 3.8)
    )  # fmt: skip
    assert (found.cores, "cpu_atom" in found.sources["clusters"]) == (6, True)
    # lists that do not name every processor tell nothing
    tree["sys/devices/cpu_atom/cpus"] = "4-5"
    (tmp_path / "other").mkdir()
    assert [c.core for c in detect(machine(tmp_path / "other", tree)).clusters] == ["x86-64"]


def test_what_a_dump_leaves_free_is_an_estimate() -> None:
    profile = detect_text(PI5).as_profile()
    assert profile.ram_bytes == 4 << 30
    assert (profile.usable_bytes or 0) < profile.ram_bytes
    assert profile.usable_bytes == find("rpi5-4gb").usable_bytes
    assert profile.sources["usable_bytes"].startswith("estimate")


def test_what_is_no_text_is_refused() -> None:
    with pytest.raises(DeviceError, match=r"picture is not text.*sbc-bench log"):
        detect_text("\x89PNG\0\0", "picture")


LOG = """sbc-bench v0.9.61 Raspberry Pi 4 Model B Rev 1.5 (Sat, 27 Jan 2024 11:42:25 +0100)

               total        used        free      shared  buff/cache   available
Mem:           7.6Gi       189Mi       7.3Gi       4.5Mi        83Mi       7.4Gi

CPU sysfs topology (clusters, cpufreq members, clockspeeds)
                 cpufreq   min    max
 CPU    cluster  policy   speed  speed   core type
  0        0        0      600    1800   Cortex-A72 / r0p3
  1        0        0      600    1800   Cortex-A72 / r0p3

Architecture:                       aarch64
CPU(s):                             2
Flags:                              fp asimd evtstrm crc32 cpuid

SoC guess: BCM2711C0
DT compat: raspberrypi,4-model-b
           brcm,bcm2711
"""


def test_a_benchmark_s_log() -> None:
    found = detect_text(LOG)
    assert found.title == "Raspberry Pi 4 Model B Rev 1.5"
    assert found.soc == "Broadcom BCM2711"
    assert found.clusters == (Cluster("Cortex-A72", 2, 1.8),)
    assert found.isa == ("neon",)
    assert (found.profile, found.match) == ("rpi4-8gb", "device")
    without_table = re.sub(r"^CPU sysfs(.*\n)+?\n", "", LOG, flags=re.MULTILINE)
    no_flags = without_table.replace("Flags: ", "Other: ") + "Model name: Cortex-A72\n"
    again = detect_text(no_flags)
    assert again.clusters == (Cluster("Cortex-A72", 2),)
    assert again.isa == ("neon",), "from the core's type"


# copies of /proc and /sys


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


CPUFREQ = "sys/devices/system/cpu/cpufreq"
BOARD = {
    "proc/cpuinfo": "".join(cpu(i, 0xD05, "0x2 0") for i in range(4))
    + "".join(cpu(i, 0xD41, "0x1 1") for i in range(4, 8)),
    "proc/device-tree/model": "Radxa Dragon Q6A\0",
    "proc/device-tree/compatible": "radxa,dragon-q6a\0qcom,qcm6490\0",
    "proc/meminfo": "MemTotal:        8123456 kB\nMemAvailable:    7000000 kB\nSwapTotal: 0 kB\n",
    f"{CPUFREQ}/policy0/cpuinfo_max_freq": "1958400",
    f"{CPUFREQ}/policy0/related_cpus": "0 1 2 3",
    f"{CPUFREQ}/policy0/scaling_governor": "schedutil\n",
    f"{CPUFREQ}/policy4/cpuinfo_max_freq": "2400000",
    f"{CPUFREQ}/policy4/related_cpus": "4 5 6",
    f"{CPUFREQ}/policy7/cpuinfo_max_freq": "2707200",
    f"{CPUFREQ}/policy7/related_cpus": "7",
    f"{CPUFREQ}/policy7/scaling_governor": "performance\n",
    "sys/devices/system/cpu/cpu0/cache/index0/level": "1",
    "sys/devices/system/cpu/cpu0/cache/index0/type": "Data",
    "sys/devices/system/cpu/cpu0/cache/index0/size": "32K",
    "sys/devices/system/cpu/cpu0/cache/index0/shared_cpu_list": "0-3,7",
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal",
    "sys/class/thermal/thermal_zone0/temp": "51234",
    "sys/class/thermal/thermal_zone1/type": "cpu-thermal",
    "sys/class/thermal/thermal_zone1/temp": "-274000",
    "sys/class/thermal/thermal_zone2/temp": "not a number",
    "sys/class/thermal/thermal_zone3/type": "cpu-thermal",
    "sys/class/thermal/thermal_zone3/temp": "48000",
}


def test_a_board_with_clusters_of_three_clocks(tmp_path: Path) -> None:
    found = detect(machine(tmp_path, BOARD))
    assert found.title == "Radxa Dragon Q6A"
    assert found.soc == "Qualcomm QCM6490"
    assert found.sources["title"] == "/proc/device-tree/model"
    assert found.clusters == (
        Cluster("Cortex-A78", 1, 2.7072),
        Cluster("Cortex-A78", 3, 2.4),
        Cluster("Cortex-A55", 4, 1.9584),
    )
    assert found.governors == {"policy0": "schedutil", "policy7": "performance"}
    assert found.temperatures_c == {"cpu-thermal": 51.234, "cpu-thermal thermal_zone3": 48.0}
    assert found.caches[0].nbytes == 32768
    assert found.caches[0].shared_by == 5
    assert (found.ram_bytes, found.swap_bytes) == (8123456 * 1024, 0)
    assert found.throttle is None
    assert (found.profile, found.match) == ("phone-mid", "tier")


def test_where_nothing_can_be_read_everything_is_unknown(tmp_path: Path) -> None:
    found = detect(tmp_path)
    assert found == Detected()
    assert found.as_profile().name == "here"


@pytest.mark.parametrize(
    ("group", "files", "limit", "where"),
    [
        ("0::/user/app", {"user/memory.max": "2147483648", "user/app/memory.max": "max"},
         2 << 30, "user/memory.max"),
        ("0::/", {"memory.max": "1073741824"}, 1 << 30, "memory.max"),
        ("4:cpu,memory:/docker/x\n0::/", {"memory/docker/x/memory.limit_in_bytes": "536870912"},
         1 << 29, "memory/docker/x/memory.limit_in_bytes"),
        ("4:memory:/", {"memory/memory.limit_in_bytes": "9223372036854771712"}, None, None),
        ("0::/../outside", {"memory.max": "not a number"}, None, None),
    ],
)  # fmt: skip
def test_memory_limits_of_control_groups(
    group: str, files: dict[str, str], limit: int | None, where: str | None, tmp_path: Path
) -> None:
    tree = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    found = detect(machine(tmp_path, tree | {"proc/self/cgroup": group}))
    assert found.cgroup_bytes == limit
    assert found.sources.get("cgroup_bytes") == (where and f"/sys/fs/cgroup/{where}")


def test_commands_tell_more(tmp_path: Path) -> None:
    said = {
        "vcgencmd": "throttled=0xd0005",
        "getprop ro.product.model": "SM-S911B",
        "getprop ro.product.manufacturer": "samsung",
        "getprop ro.soc.model": "SM8550",
    }

    def ask(command: Sequence[str]) -> str | None:
        return said.get(" ".join(command)) or said.get(command[0])

    found = detect(machine(tmp_path, {"proc/cpuinfo": BOARD["proc/cpuinfo"]}), ask)
    assert found.throttle is not None
    assert found.throttle.now == ("under-voltage", "throttled")
    assert found.throttle.since_boot == ("under-voltage", "throttled", "soft temperature limit")
    assert found.title == "Samsung SM-S911B"
    assert found.soc == "Qualcomm SM8550 (Snapdragon 8 Gen 2)"
    assert (found.profile, found.match) == ("galaxy-s23", "device")


def test_a_phone_s_files_tell_what_getprop_would(tmp_path: Path) -> None:
    tree = {
        "proc/cpuinfo": BOARD["proc/cpuinfo"],
        "system/build.prop": "# a comment\nro.a=b\n",
        "vendor/build.prop": "ro.product.vendor.model=Pixel 9\nro.board.platform=zumapro\n",
    }
    found = detect(machine(tmp_path, tree))
    assert (found.title, found.soc) == ("Pixel 9", "Google Tensor G4")
    assert (found.profile, found.match) == ("pixel-9", "device")


def test_another_device_s_profile_is_called_so(tmp_path: Path) -> None:
    tree = {"proc/cpuinfo": PI5.partition("Hardware")[0],
            "proc/device-tree/model": "A board of our own",
            "proc/device-tree/compatible": "ours\0brcm,bcm2712"}  # fmt: skip
    found = detect(machine(tmp_path, tree))
    assert found.title == "A board of our own"
    assert found.match == "chip"
    assert (found.profile or "").startswith("rpi5")


# profiles of this very machine


def test_the_profile_of_a_machine_says_where_its_numbers_are_from(tmp_path: Path) -> None:
    profile = detect(machine(tmp_path, BOARD)).as_profile({1: 9.5}, 321.0)
    assert profile.clusters[0].ghz == 2.7072
    assert (profile.read_gb_s, profile.int8_gops) == ({1: 9.5}, 321.0)
    assert profile.sources["read_gb_s"].startswith("measured: ")
    assert profile.sources["ram_bytes"] == "detected: /proc/meminfo MemTotal"
    assert profile.usable_bytes == 7000000 * 1024
    path = tmp_path / "mine.toml"
    path.write_text(profile.to_toml())
    assert find(str(path)) == profile
    unmeasured = detect(tmp_path).as_profile()
    assert unmeasured.sources["read_gb_s"].startswith("estimate: as phone-mid: ")
    assert unmeasured.int8_gops == pytest.approx(64 * (2.7072 + 3 * 2.4) + 32 * 4 * 1.9584, abs=0.1)
    assert unmeasured.memory is None, "whatever a tier has, this machine's is not known"


def test_a_dump_without_clocks_keeps_those_of_its_device() -> None:
    profile = detect_text(PI5).as_profile()
    assert profile.clusters == find("rpi5").clusters
    assert profile.int8_gops == find("rpi5").int8_gops
    assert profile.read_gb_s == find("rpi5").read_gb_s


def test_this_machine() -> None:
    found = detect()
    assert found.threads
    assert found.ram_bytes
    assert found.arch
    json.dumps(found.to_dict())
    assert found.as_profile().usable_bytes


# tables


def test_parts_and_cores_agree() -> None:
    known = {name for parts in PARTS.values() for name in parts.values()}
    assert set(CORES) - known <= {"Apple performance", "Apple efficiency"}
    assert core_name(0x53, 1, 4) == "Exynos-M2"
    assert core_name(0x53, 1, 1) == "Exynos-M1"
    assert common_isa(["Cortex-A55", "Cortex-A710"]) == ("asimdhp", "dotprod", "neon")
    assert common_isa(["Cortex-A55", "of no table"]) is None
    assert common_isa([]) is None
    assert peak_int8_gops([("Cortex-A76", 4, 2.4)]) == (
        614.4, "estimate: 4 x 2.4 GHz x 64 operations a cycle (Cortex-A76)"
    )  # fmt: skip
    assert peak_int8_gops([("Cortex-A76", 4, None)]) is None


@pytest.mark.parametrize(
    ("text", "chip"),
    [
        ("Qualcomm Technologies, Inc SDM439Processor", "Qualcomm SDM439 (Snapdragon 439)"),
        ("qcom,sc7180-lite", "Qualcomm SC7180"),
        ("sc8830", "Spreadtrum SC8830"),
        ("rockchip,rk3566", "Rockchip RK3566"),
        ("friendlyarm,nanopi rockchip", "Rockchip"),
        ("nvidia,p3767-0003 nvidia,tegra234", "NVIDIA Orin (T234)"),
        ("amlogic,meson-g12b", "Amlogic S922X or A311D"),
        ("a board that nobody knows", None),
    ],
)
def test_names_of_chips(text: str, chip: str | None) -> None:
    assert named(text) == chip


# dumps of real machines


def expected_isa(text: str) -> set[str]:
    """By a way of its own: words that stand anywhere in the first line of features or flags."""
    line = next((x for x in text.splitlines() if x.lower().startswith(("features", "flags"))), "")
    words = {"asimd": "neon", "neon": "neon", "asimdhp": "asimdhp", "asimddp": "dotprod",
             "i8mm": "i8mm", "bf16": "bf16", "sve": "sve", "sve2": "sve2", "avx2": "avx2",
             "lsx": "lsx", "lasx": "lasx"}  # fmt: skip
    return {isa for word, isa in words.items() if f" {word} " in f" {line.split(':')[-1]} "}


def dumps() -> list[Path]:
    folder = need("data/cpuinfo_dev")
    return [p for part in ("boards", "phones") for p in sorted((folder / part).iterdir())]


def test_dumps_of_real_machines(record_property: pytest.RecordProperty) -> None:
    wrong: list[str] = []
    right = generic = 0
    for path in dumps():
        text = path.read_text("utf-8", "replace")
        truth, found = truth_of(path.name), detect_text(text)
        names = f"{found.title} {found.soc}"
        faults = []
        if not cores(found) or not set(cores(found)) <= truth.cores:
            faults.append(f"cores {cores(found)}, expected of {sorted(truth.cores)}")
        if set(found.isa) - {"rvv"} != expected_isa(text):
            faults.append(f"instructions {found.isa}")
        if truth.word is None:
            generic += 1
            if found.title or found.soc or found.match == "device":
                faults.append(f"named {names} without a ground")
        elif truth.word not in names:
            faults.append(f"named {names}, expected {truth.word}")
        wrong += [f"{path.name}: {'; '.join(faults)}"] * bool(faults)
        right += not faults
    record_property("right", right)
    record_property("generic", generic)
    assert right + len(wrong) > 200
    assert right >= 0.95 * (right + len(wrong)), "\n".join(wrong)
    named_ = right - generic
    assert named_ >= 0.95 * (right + len(wrong)), f"only {named_} are named"
    assert not wrong, "\n".join(wrong)


def test_the_table_of_dumps_has_a_line_for_each() -> None:
    used = {truth_of(path.name) for path in dumps()}
    assert used == set(truths())


@pytest.mark.parametrize(
    ("name", "title", "profile", "cluster", "isa"),
    [
        ("1MFf.txt", "Raspberry Pi 4 Model B Rev 1.1", "rpi4-4gb", ("Cortex-A72", 4, 1.5),
         ("neon",)),
        ("1ULtUe.txt", "Raspberry Pi 5 Model B Rev 1.0", "rpi5-4gb", ("Cortex-A76", 4, 2.4),
         ("asimdhp", "dotprod", "neon")),
        ("3DeL.txt", "Raspberry Pi Zero 2 Rev 1.0", "rpi-zero-2w", ("Cortex-A53", 4, 1.2),
         ("neon",)),
        ("8acvqG.txt", "Raspberry Pi 5 Model B Rev 1.0", "rpi5-4gb", ("Cortex-A76", 4, 3.0),
         ("asimdhp", "dotprod", "neon")),
        ("RPi-5B-Rev1.0.md", "Raspberry Pi 5 Model B Rev 1.0", "rpi5", ("Cortex-A76", 4, 2.4),
         ("asimdhp", "dotprod", "neon")),
    ],
)  # fmt: skip
def test_real_logs(
    name: str, title: str, profile: str, cluster: tuple[str, int, float], isa: tuple[str, ...]
) -> None:
    found = detect_text(need(f"data/sbc_logs_dev/{name}").read_text("utf-8"))
    assert (found.title, found.profile, found.match) == (title, profile, "device")
    assert found.clusters == (Cluster(*cluster),)
    assert found.isa == isa


def test_every_other_file_is_survived() -> None:
    for path in need("data/sbc_logs_dev").rglob("*"):
        if path.suffix == ".png":
            with pytest.raises(DeviceError, match="is not text"):
                detect_text(path.read_text("utf-8", "replace"), path.name)
        elif path.is_file():
            found = detect_text(path.read_text("utf-8", "replace"), path.name)
            assert found.match == "device" or found.profile is None


# the command


def said(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(args) == 0
    return capsys.readouterr().out


def test_the_command_names_where_each_fact_is_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine(tmp_path, BOARD)
    text = said(["devices", "detect", "--from", str(tmp_path)], capsys)
    assert re.search(r"^machine +Radxa Dragon Q6A +/proc/device-tree/model$", text, re.MULTILINE)
    assert "1 Cortex-A78 at 2.7072 GHz + 3 Cortex-A78" in text
    assert "profile phone-mid: a generic profile" in text
    found = json.loads(
        said(["devices", "detect", "--from", str(tmp_path), "--format", "json"], capsys)
    )
    assert found["match"] == "tier"
    assert found["read_gb_s"] is None
    assert found["clusters"][0] == {"core": "Cortex-A78", "count": 1, "ghz": 2.7072}


def test_what_is_detected_is_a_device_to_plan_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dump, own = tmp_path / "dump.txt", tmp_path / "own.toml"
    dump.write_text(PI5)
    own.write_text(said(["devices", "detect", "--from", str(dump), "--format", "toml"], capsys))
    assert "4 Cortex-A76 at 2.4 GHz" in said(["devices", "show", str(own)], capsys)


def test_measuring_is_of_this_machine_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["devices", "detect", "--measure", "--from", str(tmp_path)]) == 2
    assert "cannot be used with --from" in capsys.readouterr().err


@pytest.mark.slow
def test_measuring(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(said(["devices", "detect", "--measure", "--format", "json"], capsys))
    assert found["read_gb_s"]["1"] > 0
    assert found["int8_gops"] > 0
