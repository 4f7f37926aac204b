"""Models of images, ready for differential privacy: no layer mixes the records of a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from tacit.federated.models_attention import Encoder
from tacit.federated.models_parts import Norm, activation_layer, check_shape, norm_layers

__all__ = ["InvertedResidual", "ResidualStack", "cnn", "ds_cnn", "mobilenet", "resnet8", "vit_tiny"]

Shape = tuple[int, int, int]
_AXES = ("channels", "height", "width")
# Where a network may choose, it does not halve an image whose shorter side would become less than this.
_SMALLEST_SIDE = 4
# How much wider a block of MobileNetV2 is inside, from the second stage on.
_EXPANSION = 6
# Patches on the longer side of an image, at most, unless a recipe says otherwise: attention costs their fourth power.
_PATCHES_ASIDE = 8


def cnn(
    *,
    shape: Shape,
    classes: int,
    channels: Sequence[int] = (16, 32),
    groups: int = 4,
    norm: Norm = "group",
    activation: str = "relu",
) -> nn.Sequential:
    """Convolution, normalisation and activation for each width, one 2x2 max pooling, one linear layer.

    Args:
        shape: one example, (channels, height, width).
        classes: width of the output.
        channels: width of each convolution.
        groups: groups of each GroupNorm; must divide every width.
        norm: "group", "none", or "batch", which differential privacy refuses.
        activation: by name.

    Raises:
        ValueError: a width that the groups do not divide, or a shape that is not an image.

    >>> sum(p.numel() for p in cnn(shape=(1, 8, 8), classes=10).parameters())
    10026
    """
    check_shape("cnn", shape, _AXES, smallest=2)
    layers: list[nn.Module] = []
    previous, height, width = shape
    for out in channels:
        normalised = norm_layers(norm, groups, out)
        layers += [nn.Conv2d(previous, out, 3, padding=1), *normalised, activation_layer(activation)]
        previous = out
    layers += [nn.MaxPool2d(2), nn.Flatten(), nn.Linear(previous * (height // 2) * (width // 2), classes)]
    return nn.Sequential(*layers)


def ds_cnn(
    *,
    shape: Shape,
    outputs: int,
    channels: Sequence[int] = (64, 64, 64, 64, 64),
    groups: int = 4,
    norm: Norm = "group",
    activation: str = "relu",
) -> nn.Sequential:
    """A convolution, then depthwise separable ones: each channel by itself in space, then all channels at each point.

    As in MLPerf Tiny's keyword spotting (Zhang et al. 2017, arXiv 1711.07128), but for a first kernel of 3x3.

    Args:
        shape: one example, (channels, height, width).
        outputs: width of the output.
        channels: width of the first convolution and of each separable one.
        groups: of each GroupNorm; must divide every width.
        norm: "group", "none", or "batch", which differential privacy refuses.
        activation: by name.

    Raises:
        ValueError: a width that the groups do not divide, or a shape that is not an image.

    >>> ds_cnn(shape=(1, 49, 10), outputs=12)(torch.zeros(2, 1, 49, 10)).shape
    torch.Size([2, 12])
    """
    check_shape("ds-cnn", shape, _AXES)

    def followed(convolution: nn.Conv2d) -> list[nn.Module]:
        normalised = norm_layers(norm, groups, convolution.out_channels)
        return [convolution, *normalised, activation_layer(activation)]

    previous, *widths = channels
    layers = followed(nn.Conv2d(shape[0], previous, 3, stride=_stride(shape[1:]), padding=1))
    for out in widths:
        layers += followed(nn.Conv2d(previous, previous, 3, padding=1, groups=previous))
        layers += followed(nn.Conv2d(previous, out, 1))
        previous = out
    return nn.Sequential(*layers, *_head(previous, outputs))


def _stride(sides: Sequence[int]) -> int:
    return 2 if min(sides) >= 2 * _SMALLEST_SIDE else 1


def _halved(sides: Sequence[int], stride: int) -> list[int]:
    return [math.ceil(side / stride) for side in sides]


def _head(channels: int, outputs: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, outputs)]


class ResidualStack(nn.Module):
    """Two convolutions of 3x3, added to what came in, which a 1x1 convolution fits where the shapes differ."""

    def __init__(self, channels: int, out: int, *, stride: int, groups: int, norm: Norm, activation: str) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride=stride, padding=1),
            *norm_layers(norm, groups, out),
            activation_layer(activation),
            nn.Conv2d(out, out, 3, padding=1),
            *norm_layers(norm, groups, out),
        )
        fits = channels == out and stride == 1
        self.shortcut = nn.Identity() if fits else nn.Conv2d(channels, out, 1, stride=stride)
        self.activation = activation_layer(activation)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """From (records, channels, height, width) to (records, out, height / stride, width / stride)."""
        added: torch.Tensor = self.activation(self.body(inputs) + self.shortcut(inputs))
        return added


def resnet8(
    *,
    shape: Shape,
    outputs: int,
    channels: Sequence[int] = (16, 32, 64),
    groups: int = 4,
    norm: Norm = "group",
    activation: str = "relu",
) -> nn.Sequential:
    """MLPerf Tiny's ResNet-8 (Banbury et al. 2021, arXiv 2106.07597), with GroupNorm where it has BatchNorm.

    Args:
        shape: one example, (channels, height, width).
        outputs: width of the output.
        channels: width of each of the three stacks; the second and third halve the image.
        groups: of each GroupNorm; must divide every width.
        norm: "group", "none", or "batch", which differential privacy refuses.
        activation: by name.

    Raises:
        ValueError: not three widths, one that the groups do not divide, or a shape that is not an image.

    >>> sum(p.numel() for p in resnet8(shape=(3, 32, 32), outputs=10).parameters())
    78186
    """
    check_shape("resnet-8", shape, _AXES)
    if len(channels) != 3:
        raise ValueError(f"expected three widths for family='resnet-8', got channels={list(channels)}; give three")
    first = channels[0]
    layers: list[nn.Module] = [nn.Conv2d(shape[0], first, 3, padding=1), *norm_layers(norm, groups, first)]
    layers.append(activation_layer(activation))
    for previous, out, stride in zip((first, *channels[:-1]), channels, (1, 2, 2), strict=True):
        layers.append(ResidualStack(previous, out, stride=stride, groups=groups, norm=norm, activation=activation))
    return nn.Sequential(*layers, *_head(channels[-1], outputs))


class InvertedResidual(nn.Module):
    """A block of MobileNetV2: wider by a 1x1 convolution, 3x3 within each channel, back by 1x1 without activation."""

    def __init__(
        self, channels: int, out: int, *, expansion: int, stride: int, groups: int, norm: Norm, activation: str
    ) -> None:
        super().__init__()
        wide = expansion * channels
        widened = [nn.Conv2d(channels, wide, 1), *norm_layers(norm, groups, wide), activation_layer(activation)]
        self.body = nn.Sequential(
            *(widened if expansion > 1 else []),
            nn.Conv2d(wide, wide, 3, stride=stride, padding=1, groups=wide),
            *norm_layers(norm, groups, wide),
            activation_layer(activation),
            nn.Conv2d(wide, out, 1),
            *norm_layers(norm, groups, out),
        )
        self.adds = stride == 1 and channels == out

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """From (records, channels, height, width) to (records, out, height / stride, width / stride)."""
        changed: torch.Tensor = self.body(inputs)
        return inputs + changed if self.adds else changed


def mobilenet(
    *,
    shape: Shape,
    outputs: int,
    channels: Sequence[int] = (16, 24, 32, 64),
    depth: int = 2,
    groups: int = 4,
    norm: Norm = "group",
    activation: str = "relu6",
) -> nn.Sequential:
    """A small MobileNetV2 (Sandler et al. 2018, arXiv 1801.04381), without its last, widest convolution.

    The first convolution and the first block of each stage but the first halve the image where enough is left of it.

    Args:
        shape: one example, (channels, height, width).
        outputs: width of the output.
        channels: width of each stage; the first convolution's is that of the first.
        depth: blocks in each stage.
        groups: of each GroupNorm; must divide every width.
        norm: "group", "none", or "batch", which differential privacy refuses.
        activation: by name.

    Raises:
        ValueError: a width that the groups do not divide, or a shape that is not an image.

    >>> mobilenet(shape=(3, 96, 96), outputs=2)(torch.zeros(1, 3, 96, 96)).shape
    torch.Size([1, 2])
    """
    check_shape("mobilenet", shape, _AXES)
    previous, stride = channels[0], _stride(shape[1:])
    layers: list[nn.Module] = [nn.Conv2d(shape[0], previous, 3, stride=stride, padding=1)]
    layers += [*norm_layers(norm, groups, previous), activation_layer(activation)]
    sides = _halved(shape[1:], stride)
    kind = partial(InvertedResidual, groups=groups, norm=norm, activation=activation)
    for stage, out in enumerate(channels):
        for block in range(depth):
            stride = _stride(sides) if stage > 0 and block == 0 else 1
            layers.append(kind(previous, out, stride=stride, expansion=_EXPANSION if stage else 1))
            previous, sides = out, _halved(sides, stride)
    return nn.Sequential(*layers, *_head(previous, outputs))


class _Patches(nn.Module):
    """From (records, channels, height, width) to (records, patches, width of a position); zeros fill the border."""

    def __init__(self, shape: Shape, patch: int, width: int) -> None:
        super().__init__()
        channels, tall, wide = shape
        self.fill = nn.ZeroPad2d((0, -wide % patch, 0, -tall % patch)) if wide % patch or tall % patch else None
        self.embed = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        filled = images if self.fill is None else self.fill(images)
        rows: torch.Tensor = self.embed(filled).flatten(2).transpose(1, 2)
        return rows


def vit_tiny(
    *,
    shape: Shape,
    outputs: int,
    width: int = 64,
    depth: int = 4,
    heads: int = 4,
    patch: int | None = None,
    activation: str = "gelu",
) -> nn.Sequential:
    """A small vision transformer (Dosovitskiy et al. 2020, arXiv 2010.11929): a transformer's encoder over patches.

    Its positions' mean is what the last, linear layer sees, in place of a class token.

    Args:
        shape: one example, (channels, height, width).
        outputs: width of the output.
        width: of each position; a multiple of the heads.
        depth: encoder layers.
        heads: of attention.
        patch: pixels on a patch's side; None for as many as make at most 8 patches of the longer side, but at least 2.
        activation: of the feed-forward layers, by name.

    Raises:
        ValueError: a shape that is not an image, or a width that the heads do not divide.

    >>> vit_tiny(shape=(1, 28, 20), outputs=10)(torch.zeros(2, 1, 28, 20)).shape
    torch.Size([2, 10])
    """
    check_shape("vit-tiny", shape, _AXES)
    side = patch or max(2, math.ceil(max(shape[1:]) / _PATCHES_ASIDE))
    positions = math.ceil(shape[1] / side) * math.ceil(shape[2] / side)
    encoder = Encoder(positions, width=width, depth=depth, heads=heads, activation=activation)
    return nn.Sequential(_Patches(shape, side, width), encoder, nn.Linear(width, outputs))
