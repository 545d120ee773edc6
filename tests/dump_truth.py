"""What the dumps of the shared folder are of, from their file names and the chips' data sheets.

A line is: how the file's name begins: types of cores that the chip has: a word that its answer
must hold, or "?" where the text tells nothing of board or chip and the answer must say so by
naming none. Cores of a type may be asleep and missing; a type that the chip lacks is an error.
"""

from __future__ import annotations

from typing import NamedTuple

_LINES = """
ARM-V2P-CA15-CA7: A15 A7: Versatile
AWS-Graviton.: A72: Graviton
AWS-c7g: V1: Graviton3
AWS-m6g: N1: Graviton2
Allwinner-A10: A8: A10
Allwinner-A527: A55: A527
Allwinner-A83T: A7: A83T
Allwinner-D1: thead,c906: D1
Allwinner-H2Plus: A7: sun8i
Allwinner-H6: A53: H6
Allwinner-R16: A7: sun8i
Allwinner-R329: A53: R329
Allwinner-R40: A7: sun8i
Allwinner-V3s: A7: sun8i
Amlogic-S805: A5: S805
Amlogic-S812: A9: S812
Amlogic-S905-: A53: S905
Amlogic-S905D: A53: S905
Amlogic-S905L2: A53: S905
Amlogic-S905W: A53: S905
Amlogic-S905X-: A53: S905
Amlogic-S905X3: A55: S905X3
Amlogic-S905X4: A55: S905X4
Amlogic-S905Y2: A53: S905
Amlogic-S922X: A73 A53: S922X
Ampere-Altra: N1: Altra
Ampere-Mustang: X-Gene: X-Gene
Apple-M1: Firestorm Icestorm: M1
BCM2387B0: A53: Raspberry Pi 3 Model B Plus
BCM2710A1: A53: Raspberry Pi Zero 2
BCM2711B0: A72: Raspberry Pi 4
BCM2712: A76: Raspberry Pi 5
Baikal-M: A57: Baikal-M
BroadCom-BCM4708: A9: BCM4708
Cavium-ThunderX2: ThunderX2: ThunderX2
Comcerto-2000: A9: Comcerto 2000
Eswin-EIC7700X: eswin,eic770x: EIC7700X
Eswin-EIC7702X: eswin,eic770x: EIC7702X
Exynos-3110: A8: 3110
Exynos-4210: A9: 4210
Exynos-4412: A9: 4412
Exynos-5422: A15 A7: Exynos 5
Exynos-7420: A57 A53: 7420
Exynos-7570: A53: ?
Exynos-8890: Exynos-M1 A53: 8890
Exynos-9820: Exynos-M4 A75 A55: 9820
Exynos-Auto-V9: A76: Auto V9
GeneralPlus-GPL32902: ARM1176: GPL32900
Google-Tensor-G1: X1 A76 A55: Google Tensor
Google-Tensor-G3: X3 A715 A510: Tensor G3
HiSilicon-6210: A53: Kirin 620
HiSilicon-Ascend-310: A55: ?
HiSilicon-Hi1910: TaiShan-v200M: Hi1910
HiSilicon-Hi3520D: A9: Hi3520
HiSilicon-Hi3751: A53: Hi3751
HiSilicon-Hi3798CV200: A53: Hi3798
HiSilicon-Hi3798MV100: A7: ?
HiSilicon-Hi6620: A9: Hi6620
HiSilicon-Kirin-620: A53: Kirin 620
HiSilicon-Kirin-630: A53: ?
HiSilicon-Kirin-650: A53: Kirin 650
HiSilicon-Kirin-810: A76 A55: Kirin 810
HiSilicon-Kirin-920: A15 A7: Kirin 920
HiSilicon-Kirin-960: A73 A53: Kirin 960
HiSilicon-Kirin-980: A76 A55: Kirin 980
HiSilicon-Kunpeng: TaiShan-v110: Kunpeng 920
IMX.6-Quad: A9: i.MX 6
IMX.8M: A53: i.MX 8M
Loongson-3A5000: Loongson-64bit: 3A5000
Loongson-3C6000: Loongson-64bit: 3C6000
MStar-Infinity2: A9: Infinity2
Marvell-Armada-3710: A53: Armada 3700
Marvell-Armada-8040: A72: 8040
Marvell-PXA1908: A53: PXA1908
Marvell-PXA988: A9: PXA988
Mediatek-MT5890: A17: MT5890
Mediatek-MT6582: A7: MT6582
Mediatek-MT6592: A7: MT6592
Mediatek-MT6752: A53: MT6752
Mediatek-MT6762M: A53: MT6762
Mediatek-MT7623N: A7: MT7623
Mediatek-MT8127: A7: MT8127
Mediatek-MT8135: A15 A7: MT8135
Mediatek-MT8167B: A35: MT8167
Mediatek-MT8183: A73 A53: MT8183
NXP-LS1028A: A72: LS1028A
NXP-LX2160A: A72: LX2160A
Nvidia-Jetson-Nano: A57: Tegra X1
Nvidia-Jetson-Orin: A78AE: Orin
Nvidia_Jetson_Orin: A78AE: Orin
Nvidia-Jetson-TX2: Denver-2 A57: Tegra X2
Nvidia-Tegra-K1-Tegra124: A15: Tegra K1
Nvidia-Tegra-K1-Tegra132: Denver: Tegra K1
Nvidia-Tegra-X1: A57: Tegra X1
Nvidia-Xavier: Carmel: Xavier
Phytium-D2000: FTC663: D2000
Phytium-E2000Q: FTC310 FTC664: E2000Q
Qualcomm-APQ8016: A53: APQ8016
Qualcomm-APQ8064: Krait: APQ8064
Qualcomm-APQ8084: Krait: APQ8084
Qualcomm-IPQ806x: Krait: AP148
Qualcomm-MSM8610: A7: MSM8210
Qualcomm-MSM8627: Krait: MSM8627
Qualcomm-MSM8909: A7: MSM8909
Qualcomm-MSM8926: A7: MSM8926
Qualcomm-MSM8937: A53: MSM8937
Qualcomm-MSM8939: A53: MSM8939
Qualcomm-MSM8953: A53: MSM8953
Qualcomm-MSM8974-: Krait: MSM8974
Qualcomm-MSM8974PRO: Krait: MSM8974PRO
Qualcomm-MSM8992: A57 A53: MSM8992
Qualcomm-MSM8994: A57 A53: MSM8994
Qualcomm-MSM8996pro: Kryo: MSM8996PRO
Qualcomm-QCS6490: A78 A55: QCS6490
Qualcomm-SDM662: Kryo-2XX-Gold Kryo-2XX-Silver: Snapdragon 662
Qualcomm-SM8150: Kryo-4XX-Gold Kryo-4XX-Silver: SM8150
Qualcomm-SM8750: Oryon: SM8750
Qualcomm-Snapdragon-439: A53: Snapdragon 439
Qualcomm-Snapdragon-7c: Kryo-4XX-Gold Kryo-4XX-Silver: Snapdragon 7c
Qualcomm-Snapdragon-8-Gen-1: X2 A710 A510: Snapdragon 8 Gen 1
Qualcomm-Snapdragon-8-Gen-2: X3 A715 A710 A510: Snapdragon 8 Gen 2
Qualcomm-Snapdragon-865: A77 Kryo-4XX-Silver: Snapdragon 865
Qualcomm-Snapdragon-8cx-Gen3: X1C A78C: Snapdragon 8cx Gen 3
RK3229: A7: ?
RK3288: A17: RK3288
RK3328: A53: RK3328
RK3399: A72 A53: RK3399
RK3568: A55: RK3568
RK3576: A72 A53: RK3576
RK3588: A76 A55: RK3588
Renesas-R9A07G043U11: A55: ?
ST-STiH415: A9: STi
SiFive-Freedom-U540: sifive,u54-mc: FU540
Sophgo-SG2000: rv64imafdvcsu: SG2000
SpacemiT-K1_M1: Spacemit_X60: SpacemiT K1
Spreadtrum-SC7731: A7: SC7731
StarFive-JH7100: sifive,u74-mc: JH7100
StarFive-JH7110: sifive,u74-mc: JH7110
T-Head-C910: T-Head: ?
T-Head-TH1520: T-Head: TH1520
TI-AM3358: A8: AM335x
TI-AM5728: A15: AM57xx
TI-AM6254: A53: AM62x
TI-DM3730: A8: DM37xx
TI-OMAP3530: A8: OMAP3530
TI-OMAP4470: A9: OMAP4470
Xilinx-Zynq: A9: Zynq-7000
alcatel-revvl: A53: MT6738
alldocube-iwork8: x86-64: x5-Z8350
astro-55r: A75 A55: UMS312
beagleboard-xm: A8: DM37xx
galaxy-a3-2016: A53: 7580
galaxy-a8-2018: A73 A53: 7885
galaxy-c9-pro: A72 A53: MSM8976
galaxy-grand-prime: A7: SC8830
galaxy-j5: A53: MSM8916
galaxy-j7: A53: 7580
galaxy-nexus: A9: OMAP4460
galaxy-s4: Krait: APQ8064
galaxy-s5: Krait: MSM8974PRO
galaxy-s6: A57 A53: 7420
galaxy-s7-global: Exynos-M1 A53: 8890
galaxy-s7-us: Kryo: MSM8996
galaxy-s8-global: Exynos-M2 A53: 8895
galaxy-s8-us: Kryo-2XX-Gold Kryo-2XX-Silver: MSM8998
galaxy-s9-global: Exynos-M3 A55: 9810
galaxy-s9-us: Kryo-3XX-Gold Kryo-3XX-Silver: SDM845
galaxy-tab-3-lite: A7: SC8830
huawei-ascend-p7: A9: Kirin 910
huawei-mate-10: A73 A53: Kirin 970
huawei-mate-20: A76 A55: Kirin 980
huawei-mate-8: A72 A53: Kirin 950
huawei-mate-9: A73 A53: Kirin 960
huawei-p20-pro: A73 A53: Kirin 970
huawei-p8-lite: A53: Kirin 620
huawei-p9-lite: A53: Kirin 650
iconia-one-10: A35: MT8167
jetson-tx1: A57: Tegra X1
lenovo-a6600: A53: MT6735
lg-k10: A53: MSM8916
meizu-pro-6: A72 A53: MT6797
meizu-pro-7-plus: A73 A53 A35: MT6799
moto-e-gen1: A7: MSM8210
moto-g-gen2: A7: MSM8226
moto-g-gen4: A53: MSM8952
msm8996: Kryo: MSM8996
nexus10: A15: Exynos 5250
nexus5x: A57 A53: MSM8992
nexus6.: Krait: APQ8084
nexus6p: A57 A53: MSM8994
odroid-u2: A9: 4412
oneplus-3t: Kryo: MSM8996PRO
oneplus-5: Kryo-2XX-Gold Kryo-2XX-Silver: MSM8998
oppo-a37: A53: MSM8916
oppo-r15: A73 A53: MT6771
oppo-r9: A53: MT6755
pandaboard-es: A9: OMAP4460
pixel-c: A57: Tegra X1
pixel.: Kryo: MSM8996PRO
raspberrypi.: ARM1176: BCM2835
raspberrypi3: A53: Raspberry Pi 3 Model B
xiaomi-mi-5c: A53: ?
xiaomi-redmi-2a: A7: L186x
xiaomi-redmi-note-3: A72 A53: MSM8956
xiaomi-redmi-note-4: A53: MSM8953
xperia-c4: A53: MT6752
zenfone-2: x86-64: Z3580
zenfone-c: x86-64: Z2520
"""
_LONG = {"N1": "Neoverse-N1", "V1": "Neoverse-V1", "Spacemit_X60": "Spacemit X60"}


class Truth(NamedTuple):
    """What a dump is of."""

    begins: str
    cores: frozenset[str]
    word: str | None


def _full(core: str) -> str:
    if core in _LONG:
        return _LONG[core]
    return f"Cortex-{core}" if core[0] in "AX" and core[1].isdigit() else core


def truths() -> list[Truth]:
    """Every line of the table."""
    found = []
    for line in _LINES.strip().splitlines():
        begins, cores, word = (part.strip() for part in line.split(": "))
        kinds = frozenset(_full(core) for core in cores.split())
        found.append(Truth(begins, kinds, None if word == "?" else word))
    return found


def truth_of(name: str) -> Truth:
    """The line of a file: the longest beginning that its name has."""
    return max((t for t in truths() if name.startswith(t.begins)), key=lambda t: len(t.begins))
