"""Chips: by what boards and kernels call them, and by the cores in them.

`named` reads a name out of a text such as the Hardware line of /proc/cpuinfo or a device tree's
compatible. `by_cores` knows chips that no other chip shares its cores with; the kernel's timer,
which BogoMIPS gives away, tells makers apart. What several chips share is answered with all of
their names, joined by "or": a guess is never passed off as a fact.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

_SNAPDRAGON = {
    "msm8226": "400", "msm8916": "410", "msm8939": "615", "msm8952": "617", "msm8953": "625",
    "msm8937": "430", "msm8956": "650", "msm8976": "652", "msm8992": "808", "msm8994": "810",
    "msm8974": "800", "msm8974pro": "801", "apq8064": "600", "apq8084": "805", "msm8996": "820",
    "msm8996pro": "821", "msm8998": "835", "sdm439": "439", "sdm660": "660", "sdm845": "845",
    "sm6115": "662", "sm6125": "665", "sm8150": "855", "sm8250": "865", "sm8350": "888",
    "sm8450": "8 Gen 1", "sm8550": "8 Gen 2", "sm8650": "8 Gen 3", "sm8750": "8 Elite",
    "sm8850": "8 Elite Gen 5",
}  # fmt: skip
_KIRIN = {"hi6210": "620", "hi6220": "620", "hi6250": "650", "hi3635": "930", "hi3650": "950",
          "hi3660": "960", "hi3670": "970", "hi6620": "910", "hi3680": "980"}  # fmt: skip
_CODE_NAMES = {
    # what kernels say instead of the chip's name
    "bengal": "Qualcomm SM6115 (Snapdragon 662)", "trinket": "Qualcomm SM6125 (Snapdragon 665)",
    "kona": "Qualcomm SM8250 (Snapdragon 865)", "lahaina": "Qualcomm SM8350 (Snapdragon 888)",
    "taro": "Qualcomm SM8450 (Snapdragon 8 Gen 1)",
    "kalama": "Qualcomm SM8550 (Snapdragon 8 Gen 2)",
    "pineapple": "Qualcomm SM8650 (Snapdragon 8 Gen 3)",
    "bigfish": "HiSilicon Hi3796 or Hi3798", "tuna": "TI OMAP4460", "manta": "Samsung Exynos 5250",
    "gt-p1000": "Samsung S5PC110 (Exynos 3110)", "samsung jf": "Qualcomm APQ8064 (Snapdragon 600)",
    "odroid-u2": "Samsung Exynos 4412", "odroidu2": "Samsung Exynos 4412",
    "smdk4210": "Samsung Exynos 4210", "gs101": "Google Tensor", "gs201": "Google Tensor G2",
    "zuma": "Google Tensor G3", "zumapro": "Google Tensor G4", "laguna": "Google Tensor G5",
    "omap4 bowser": "TI OMAP4470", "omap4 panda": "TI OMAP4460", "omap3 beagle": "TI OMAP3530",
    "omap36xx": "TI OMAP36xx (DM37xx)", "am33xx": "TI AM335x", "northstar": "Broadcom BCM4708",
    "jetson_tx1": "NVIDIA Tegra X1", "jetson-tk1": "NVIDIA Tegra K1", "tegra210": "NVIDIA Tegra X1",
    "tegra186": "NVIDIA Tegra X2", "tegra194": "NVIDIA Xavier (T194)",
    "tegra234": "NVIDIA Orin (T234)", "stih4": "ST STiH4xx", "sti soc": "ST STi",
    "comcerto 2000": "Mindspeed Comcerto 2000", "leadcore innopower": "Leadcore L186x",
    "zynq platform": "Xilinx Zynq-7000", "i.mx6": "NXP i.MX 6", "imx8mp": "NXP i.MX 8M Plus",
    "imx8mq": "NXP i.MX 8M", "infinity2": "MStar Infinity2",
    "bcm2712": "Broadcom BCM2712", "bcm2711": "Broadcom BCM2711", "bcm2837": "Broadcom BCM2837",
    "bcm2709": "Broadcom BCM2836 or BCM2837", "bcm2708": "Broadcom BCM2835",
    "raspberry pi zero 2": "Broadcom BCM2710A1", "raspberry pi 5": "Broadcom BCM2712",
    "raspberry pi 500": "Broadcom BCM2712", "raspberry pi compute module 5": "Broadcom BCM2712",
    "raspberry pi 4": "Broadcom BCM2711", "raspberry pi compute module 4": "Broadcom BCM2711",
    "raspberry pi 3 model b plus": "Broadcom BCM2837B0", "raspberry pi 3": "Broadcom BCM2837",
    "raspberry pi 3 model a plus": "Broadcom BCM2837B0",
    "raspberry pi compute module 3": "Broadcom BCM2837",
    "raspberry pi compute module 3 plus": "Broadcom BCM2837B0",
    "raspberry pi 2": "Broadcom BCM2836", "raspberry pi 2 model b rev 1.2": "Broadcom BCM2837",
    "raspberry pi zero": "Broadcom BCM2835", "raspberry pi model": "Broadcom BCM2835",
    "raspberry pi compute module rev": "Broadcom BCM2835", "raspberry pi 1": "Broadcom BCM2835",
    "sun4i": "Allwinner A10 family (sun4i, sun5i)", "sun8i": "Allwinner A-series family (sun8i)",
    "sun55iw3": "Allwinner A523 or A527 or T527", "sun50i-h6": "Allwinner H6",
    "meson-g12b": "Amlogic S922X or A311D", "meson-sm1": "Amlogic S905X3 family",
    "amlogic": "Amlogic", "rockchip": "Rockchip",
    "mediatek cortex-a7": "MediaTek MT6580 or MT7623",
    "sun50iw9": "Allwinner H616 family", "sun50i-h616": "Allwinner H616 family",
    "jh7110": "StarFive JH7110", "jh7100": "StarFive JH7100", "th1520": "T-Head TH1520",
    "ap148": "Qualcomm IPQ8064", "samsung exynos": "Samsung Exynos 5 family",
    "milk-v duos": "Sophgo SG2000", "rubik pi c6490p": "Qualcomm QCS6490",
}  # fmt: skip
_NUMBERED: tuple[tuple[str, str], ...] = (
    # pattern, name with the groups' text; earlier ones stand before later ones
    (r"\bsc(77\d\d|88\d\d)", "Spreadtrum SC{}"),
    (r"\b(?:msm|apq|sdm|qcs|qcm|ipq|sm|sc)[ -]?\d{3,4}(?:pro(?!c)|-ac|-ab|t)?", "Qualcomm"),
    (r"\bmt\d{4}", "MediaTek"),
    (r"\b(?:universal|exynos) ?(\d{3,4})", "Samsung Exynos {}"),
    (r"\bkirin ?(\d{3,4})", "HiSilicon Kirin {}"),
    (r"\bhi\d{4}", "HiSilicon"),
    (r"\brk(\d{4})", "Rockchip RK{}"),
    (r"\bums(\d{3,4})", "Unisoc UMS{}"),
    (r"\bpxa(\d{3,4})", "Marvell PXA{}"),
    (r"\bgpl(\d{5})", "GeneralPlus GPL{}"),
    (r"\ballwinner (a\d+t?)", "Allwinner {}"),
    (r"\bgraviton ?(\d)", "AWS Graviton{}"),
    (r"\b(eic\d{4}x?)", "Eswin {}"),
    (r"\bphytium,? ?((?:ft-?|d|s|e)\d{4}\w*)", "Phytium {}"),
    (r"\bkunpeng[- ]?(\d{3}\w*)", "HiSilicon Kunpeng {}"),
)


MAKERS = ("Amlogic", "Rockchip")
"""Answers of `named` that name a maker only."""


def named(text: str) -> str | None:
    """The chip that a text names, or None.

    Args:
        text: a Hardware line, a board's name, a device tree's compatible, a marketing name.
    """
    low = text.lower()
    for pattern, name in _NUMBERED:
        match = re.search(pattern, low)
        if match and "{}" in name:
            return name.format(match[1].upper())
        if match:
            return _numbered(name, re.sub("[ -]", "", match[0]))
    # of two code names in a text the longer one says more
    for code in sorted(_CODE_NAMES, key=len, reverse=True):
        if re.search(rf"(?<![a-z0-9]){re.escape(code)}(?![a-z])", low):
            return _CODE_NAMES[code]
    return None


def is_chip(text: str) -> bool:
    """Whether a text says a chip's number, rather than a board's name."""
    return any(re.search(pattern, text.lower()) for pattern, _ in _NUMBERED)


def _numbered(maker: str, number: str) -> str:
    if maker == "Qualcomm":
        number = re.sub(r"(pro)?a[bc]$", r"\1", number)
        snapdragon = _SNAPDRAGON.get(number) or _SNAPDRAGON.get(number.removesuffix("t"))
        return f"Qualcomm {number.upper()}" + (f" (Snapdragon {snapdragon})" if snapdragon else "")
    if maker == "HiSilicon" and number in _KIRIN:
        return f"HiSilicon Kirin {_KIRIN[number]} ({number.capitalize()})"
    return f"{maker} {number.upper() if maker == 'MediaTek' else number.capitalize()}"


ALL_CORES: dict[str, dict[str, int]] = {
    # chips of old kernels, which describe one core for all
    "MSM8992": {"Cortex-A57": 2, "Cortex-A53": 4},
    "MSM8994": {"Cortex-A57": 4, "Cortex-A53": 4},
    "MSM8956": {"Cortex-A72": 2, "Cortex-A53": 4},
    "MSM8976": {"Cortex-A72": 4, "Cortex-A53": 4},
    "Exynos 7420": {"Cortex-A57": 4, "Cortex-A53": 4},
    "MT6799": {"Cortex-A73": 2, "Cortex-A53": 4, "Cortex-A35": 4},
    "Kirin 920": {"Cortex-A15": 4, "Cortex-A7": 4},
}
"""Chip -> all of its cores, for those whose kernels report only one."""

_OF_PART = {
    # chips that a core is made for
    (0x53, "Exynos-M1"): "Samsung Exynos 8890", (0x53, "Exynos-M2"): "Samsung Exynos 8895",
    (0x53, "Exynos-M3"): "Samsung Exynos 9810", (0x53, "Exynos-M4"): "Samsung Exynos 9820 or 9825",
    (0x53, "Exynos-M5"): "Samsung Exynos 990", (0x4E, "Denver"): "NVIDIA Tegra K1 (T132)",
    (0x4E, "Denver-2"): "NVIDIA Tegra X2", (0x4E, "Carmel"): "NVIDIA Xavier (T194)",
    (0x42, "ThunderX2"): "Cavium ThunderX2", (0x43, "ThunderX2"): "Cavium ThunderX2",
    (0x50, "X-Gene"): "Applied Micro X-Gene", (0x50, "eMAG"): "Ampere eMAG",
    (0x48, "TaiShan-v110"): "HiSilicon Kunpeng 920",
    (0x00, "TaiShan-v200M"): "HiSilicon Ascend 310P (Hi1910)",
    (0xC0, "Ampere-1"): "AmpereOne", (0xC0, "Ampere-1A"): "AmpereOne",
    (0x46, "A64FX"): "Fujitsu A64FX", (0x6D, "Neoverse-N2"): "Microsoft Azure Cobalt 100",
}  # fmt: skip
_APPLE = {0x020: "A14", 0x022: "M1", 0x024: "M1 Pro", 0x028: "M1 Max", 0x030: "A15", 0x032: "M2",
          0x034: "M2 Pro", 0x036: "A16", 0x038: "M2 Max"}  # fmt: skip
"""The part of its smaller core -> Apple's chip."""

_BY_CORES: tuple[tuple[dict[str, int], float | None, str | None, str], ...] = (
    # cores, timer in MHz (None: any), revision of the first of them (None: any), chip
    ({"Cortex-X1": 2, "Cortex-A76": 2, "Cortex-A55": 4}, None, None, "Google Tensor"),
    ({"Cortex-X1": 2, "Cortex-A78": 2, "Cortex-A55": 4}, None, None, "Google Tensor G2"),
    ({"Cortex-X3": 1, "Cortex-A715": 4, "Cortex-A510": 4}, None, None, "Google Tensor G3"),
    ({"Cortex-X4": 1, "Cortex-A720": 3, "Cortex-A520": 4}, None, None, "Google Tensor G4"),
    ({"Cortex-X4": 1, "Cortex-A725": 5, "Cortex-A520": 2}, None, None, "Google Tensor G5"),
    (
        {"Cortex-X2": 1, "Cortex-A710": 3, "Cortex-A510": 4},
        19.2,
        None,
        "Qualcomm Snapdragon 8 Gen 1",
    ),
    (
        {"Cortex-X2": 1, "Cortex-A710": 3, "Cortex-A510": 4},
        None,
        None,
        "Qualcomm Snapdragon 8 Gen 1 or Samsung Exynos 2200 or MediaTek Dimensity 9000",
    ),
    (
        {"Cortex-X3": 1, "Cortex-A715": 2, "Cortex-A710": 2, "Cortex-A510": 3},
        None,
        None,
        "Qualcomm Snapdragon 8 Gen 2",
    ),
    (
        {"Cortex-X4": 1, "Cortex-A720": 5, "Cortex-A520": 2},
        None,
        None,
        "Qualcomm Snapdragon 8 Gen 3",
    ),
    ({"Cortex-X1": 1, "Cortex-A78": 3, "Cortex-A55": 4}, 19.2, None, "Qualcomm Snapdragon 888"),
    ({"Oryon": 8}, 19.2, None, "Qualcomm SM8750 (Snapdragon 8 Elite)"),
    ({"Oryon": 12}, 19.2, None, "Qualcomm Snapdragon X Elite"),
    ({"Cortex-A77": 4, "Kryo-4XX-Silver": 4}, None, None, "Qualcomm SM8250 (Snapdragon 865)"),
    ({"Kryo-4XX-Gold": 4, "Kryo-4XX-Silver": 4}, None, None, "Qualcomm SM8150 (Snapdragon 855)"),
    (
        {"Kryo-4XX-Gold": 2, "Kryo-4XX-Silver": 6},
        None,
        None,
        "Qualcomm Snapdragon 7c or 675 or 720G or 730",
    ),
    ({"Kryo-3XX-Gold": 4, "Kryo-3XX-Silver": 4}, None, None, "Qualcomm SDM845 (Snapdragon 845)"),
    ({"Cortex-A78": 4, "Cortex-A55": 4}, 19.2, None, "Qualcomm QCS6490 or Snapdragon 778G"),
    ({"Cortex-X1C": 4, "Cortex-A78C": 4}, None, None, "Qualcomm Snapdragon 8cx Gen 3"),
    ({"Cortex-A53": 4}, 19.2, "r0p0", "Qualcomm MSM8916 or APQ8016 (Snapdragon 410)"),
    ({"Cortex-A72": 4, "Cortex-A53": 4}, 1.92, None, "HiSilicon Kirin 950 or 955"),
    ({"Cortex-A73": 4, "Cortex-A53": 4}, 1.92, "r0p1", "HiSilicon Kirin 960"),
    ({"Cortex-A73": 4, "Cortex-A53": 4}, 1.92, "r0p2", "HiSilicon Kirin 970 or 710"),
    ({"Cortex-A76": 4, "Cortex-A55": 4}, 1.92, None, "HiSilicon Kirin 980 or 990"),
    ({"Cortex-A76": 2, "Cortex-A55": 6}, 1.92, None, "HiSilicon Kirin 810 or 820"),
    ({"Cortex-A53": 8}, 1.2, None, "HiSilicon Kirin 620"),
    ({"Cortex-A73": 2, "Cortex-A53": 6}, 26.0, None, "Samsung Exynos 7885"),
    ({"Cortex-A76": 8}, 26.0, None, "Samsung Exynos Auto V9"),
    ({"Cortex-A57": 4}, None, "r1p1", "NVIDIA Tegra X1"),
    ({"Cortex-A57": 8}, None, "r1p3", "Baikal-M"),
    ({"FTC663": 8}, None, None, "Phytium D2000"),
    ({"FTC310": 2, "FTC664": 2}, None, None, "Phytium E2000Q"),
    ({"Cortex-A73": 4, "Cortex-A53": 2}, 24.0, None, "Amlogic S922X or A311D"),
    ({"Cortex-A73": 4, "Cortex-A53": 4}, 24.0, None, "Amlogic A311D2"),
    ({"Cortex-A72": 2, "Cortex-A53": 4}, 24.0, None, "Rockchip RK3399"),
    ({"Cortex-A72": 4, "Cortex-A53": 4}, 24.0, None, "Rockchip RK3576"),
    ({"Cortex-A76": 4, "Cortex-A55": 4}, 24.0, None, "Rockchip RK3588"),
    ({"Cortex-A55": 8}, 24.0, "r2p0", "Allwinner A523 or A527 or T527"),
    ({"Cortex-A55": 4}, 24.0, "r1p0", "Amlogic S905X3 or S905D3"),
    (
        {"Cortex-A55": 4},
        24.0,
        "r2p0",
        "Rockchip RK3566 or RK3568 or Amlogic S905X4 or another of four Cortex-A55",
    ),
    (
        {"Cortex-A53": 4},
        24.0,
        "r0p4",
        "Allwinner A64 or Allwinner H5 or Allwinner H6 or Allwinner H616 family or "
        "Amlogic A113X or Amlogic S905 family or Rockchip RK3328 or Rockchip RK3528 or "
        "another of four Cortex-A53",
    ),
    (
        {"Cortex-A53": 8},
        24.0,
        None,
        "Amlogic S912 or Rockchip RK3368 or another of eight Cortex-A53",
    ),
    (
        {"Cortex-A35": 4},
        24.0,
        None,
        "Rockchip RK3308 or RK3326 or PX30 or Amlogic S905Y4 family or another of four Cortex-A35",
    ),
    (
        {"Cortex-A78": 4, "Cortex-A55": 4},
        13.0,
        None,
        "MediaTek of four Cortex-A78 and four Cortex-A55 (MT8195, Dimensity 8100)",
    ),
    ({"Cortex-A720": 8, "Cortex-A520": 4}, None, None, "Cix P1"),
    ({"FTC862": 8}, None, None, "Phytium D3000"),
    ({"Cortex-A53": 2}, 24.0, "r0p4", "Allwinner R329 or another of two Cortex-A53"),
    ({"Cortex-A53": 4}, 8.33, None, "NXP i.MX 8M"),
    ({"Cortex-A53": 4}, 200.0, None, "TI AM62x or AM65x"),
    ({"Cortex-A53": 4}, 13.0, None, "MediaTek of four Cortex-A53 (MT6762 family)"),
    ({"Cortex-A53": 1}, 12.5, None, "Marvell Armada 3700 family"),
    ({"Cortex-A53": 2}, 12.5, None, "Marvell Armada 3700 family"),
    ({"Cortex-A72": 4}, 25.0, "r0p1", "Marvell Armada 7040 or 8040"),
    ({"Cortex-A72": 2}, 25.0, "r0p3", "NXP LS1028A"),
    ({"Cortex-A72": 16}, 25.0, "r0p3", "NXP LX2160A"),
    ({"Cortex-A15": 2}, 6.14, None, "TI AM57xx"),
    ({"Cortex-A76": 4}, 27.0, "r4p1", "Broadcom BCM2712"),
)
_BY_TIMER = {
    # cloud and server chips of any number of cores
    ("Neoverse-N1", 121.88): "AWS Graviton2", ("Neoverse-N1", 25.0): "Ampere Altra",
    ("Neoverse-V1", 1050.0): "AWS Graviton3", ("Cortex-A72", 83.33): "AWS Graviton",
    ("Cortex-A78AE", 31.25): "NVIDIA Orin (T234)",
}  # fmt: skip


_OF_MAKER = {
    ("Amlogic", "Cortex-A5", 4): "Amlogic S805",
    ("Amlogic", "Cortex-A9", 4): "Amlogic S802 or S812",
    ("Amlogic", "Cortex-A53", 4): "Amlogic S905 family",
    ("Rockchip", "Cortex-A17", 4): "Rockchip RK3288",
}
"""Chips of which the text names the maker only, by their one type of cores."""


def narrowed(maker: str, cores: Mapping[str, int], guess: str | None) -> str:
    """The chip of a maker that a text names, as far as its cores tell.

    Args:
        maker: such as "Amlogic".
        cores: type -> how many.
        guess: what `by_cores` says.
    """
    one = next(iter(cores.items()), ("", 0))
    if len(cores) == 1 and (maker, *one) in _OF_MAKER and not guess:
        return _OF_MAKER[maker, *one]
    return " or ".join(chip for chip in (guess or "").split(" or ") if maker in chip) or maker


def by_cores(
    cores: Mapping[str, int], parts: set[tuple[int, int]], timer_mhz: float | None, revision: str
) -> str | None:
    """The chip, or all the chips, with exactly these cores; None where too many would fit.

    Args:
        cores: type -> how many are seen.
        parts: (implementer, part) of all.
        timer_mhz: frequency of the generic timer, None if unknown.
        revision: of the largest core, such as "r4p1".
    """
    apple = [_APPLE[part] for maker, part in parts if maker == 0x61 and part in _APPLE]
    if len(apple) == 1:
        return f"Apple {apple[0]}"
    makers = {maker for maker, _ in parts}
    for (maker, core), chip in _OF_PART.items():
        if maker in makers and core in cores:
            return chip
    for wanted, timer, rev, chip in _BY_CORES:
        if (
            Counter(wanted) == Counter(cores)
            and (timer is None or (timer_mhz is not None and abs(timer - timer_mhz) < 0.03))
            and rev in (None, revision)
        ):
            return chip
    if len(cores) == 1 and timer_mhz is not None:
        return _BY_TIMER.get((next(iter(cores)), round(timer_mhz, 2)))
    return None


def of_riscv(uarch: str, count: int) -> str | None:
    """The chip with so many RISC-V harts of this type."""
    return {
        ("thead,c906", 1): "Allwinner D1 or Sophgo CV18xx or SG2000",
        ("eswin,eic770x", 4): "Eswin EIC7700X",
        ("eswin,eic770x", 8): "Eswin EIC7702X",
        ("sifive,u54-mc", 4): "SiFive FU540 or Microchip PolarFire SoC",
        ("sifive,u74-mc", 2): "StarFive JH7100",
        ("sifive,u74-mc", 4): "StarFive JH7110 or SiFive FU740",
        ("Spacemit X60", 8): "SpacemiT K1 or M1",
        ("T-Head", 4): "T-Head TH1520",
    }.get((uarch, count))
