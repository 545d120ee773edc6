"""CIFAR ResNet-20 from its PyTorch weights to ONNX, as a model to quantize.

    python examples/export_resnet20.py resnet20-12fca82f.th resnet20.onnx
    edgeq quantize resnet20.onnx -o resnet20-int8.onnx --preset w8a8-static --calib pictures/ \\
        --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225

The weights are those of github.com/akamaster/pytorch_resnet_cifar10 (BSD license). The model takes
one picture, float32 [1, 3, 32, 32], red first, scaled to 0 .. 1, less the mean, over the standard
deviation above; it gives ten logits in CIFAR-10's order.

Needs PyTorch and onnx: pip install torch onnx
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class Block(nn.Module):
    """Two convolutions and the way past them, which loses every second pixel where it must."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(i, o, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(o)
        self.conv2 = nn.Conv2d(o, o, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(o)
        self.stride, self.new = stride, o - i

    def forward(self, x: Tensor) -> Tensor:
        """What both give together."""
        y = functional.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.new:
            half = self.new // 2
            x = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, half))
        return functional.relu(y + x)


class ResNet20(nn.Module):
    """Three stages of three blocks; He et al. 2015 (arXiv:1512.03385), section 4.2, option A."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        widths = ((16, 16, 1), (16, 32, 2), (32, 64, 2))
        for number, (i, o, stride) in enumerate(widths, 1):
            blocks = [Block(i, o, stride), Block(o, o, 1), Block(o, o, 1)]
            setattr(self, f"layer{number}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [1, 10] of a picture."""
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def export(weights: Path, out: Path) -> None:
    """Write the model with these weights as ONNX."""
    state = torch.load(weights, map_location="cpu", weights_only=True)["state_dict"]
    model = ResNet20()
    model.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    torch.onnx.export(
        model.eval(), (torch.zeros(1, 3, 32, 32),), str(out), dynamo=False, opset_version=17,
        input_names=["image"], output_names=["logits"],
    )  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="CIFAR ResNet-20 from .th to .onnx")
    parser.add_argument("weights", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    export(given.weights, given.out)
    print(f"{given.out}: {given.out.stat().st_size:,} bytes")
