"""Inputs made from the model alone: they show a quantiser what ranges to expect, and tell of nobody's records."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F

from tacit.compression.forms import Calibration

__all__ = ["synthetic_inputs"]

_STEPS, _LEARNING_RATE, _PULL = 60, 0.05, 1e-3


def synthetic_inputs(
    model: nn.Module, examples: tuple[torch.Tensor, ...], *, count: int = 64, seed: int = 0
) -> Calibration:
    """Make inputs on which a model answers as it does on real ones: each of its answers, more and less surely.

    They begin as noise of several sizes and smoothnesses and move up the gradient of one answer each, held back by
    their square: the ranges of a trained model's activations are wider on what it knows than on noise.

    Args:
        model: Any; evaluated, left as it is. Its inputs are taken to be about standardised.
        examples: One example of each input, (1, *shape).
        count: How many to make.
        seed: Of the noise.

    Returns:
        For each input an array (count, *shape).

    Raises:
        ValueError: Whole-number inputs to a model without an embedding: nothing says how large they may be.

    Example:
        >>> (made,) = synthetic_inputs(nn.Linear(3, 2), (torch.zeros(1, 3),), count=4)
        >>> made.shape, made.dtype.name
        ((4, 3), 'float32')
    """
    frozen = copy.deepcopy(model).eval()
    for parameter in frozen.parameters():
        parameter.requires_grad = False
    generator = torch.Generator().manual_seed(seed)
    inputs = [_noise(frozen, example, count, generator) for example in examples]
    moving = [values for values in inputs if values.is_floating_point()]
    for values in moving:
        values.requires_grad = True
    if moving:
        _sharpen(frozen, inputs, moving)
    return tuple(values.detach().numpy() for values in inputs)


def _noise(model: nn.Module, example: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    shape = (count, *example.shape[1:])
    if not example.is_floating_point():
        sizes = [module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)]
        if not sizes:
            raise ValueError(
                f"expected an embedding that says how large inputs of {example.dtype} may be, got none; calibrate with "
                "public inputs"
            )
        return torch.randint(0, min(sizes), shape, generator=generator, dtype=example.dtype)
    noise = torch.randn(shape, generator=generator)
    scales = torch.tensor([0.5, 1.0, 1.5, 2.0]).repeat(-(-count // 4))[:count]
    if example.dim() == 4 and min(example.shape[2:]) >= 4:
        smooth = F.avg_pool2d(F.pad(noise, (1, 1, 1, 1), mode="reflect"), 3, 1)
        noise[1::2] = (smooth / smooth.std())[1::2]
    return (noise * scales.view(-1, *[1] * (noise.dim() - 1))).contiguous()


def _sharpen(model: nn.Module, inputs: list[torch.Tensor], moving: list[torch.Tensor]) -> None:
    optimizer = torch.optim.Adam(moving, lr=_LEARNING_RATE)
    wanted: torch.Tensor | None = None
    # Every other one is left at fewer steps: an answer that is not sure has ranges of its own.
    early = torch.arange(len(inputs[0])) % 4 == 0
    for step in range(_STEPS):
        answer = model(*inputs)
        first = answer[0] if isinstance(answer, tuple | list) else answer
        logits = first.reshape(len(first), -1)
        if wanted is None:
            wanted = torch.arange(len(logits)) % logits.shape[1]
        loss = F.cross_entropy(logits, wanted, reduction="sum")
        loss = loss + _PULL * sum(values.square().sum() for values in moving)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own
        if step >= _STEPS // 4:
            for values in moving:
                if values.grad is not None:
                    values.grad[early] = 0.0
        optimizer.step()
