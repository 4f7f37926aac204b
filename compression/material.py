"""What a compression pass may look at, declared before it looks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import nn

from tacit.devices.interface import Interface

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Score = Callable[[nn.Module], float]
# What a model answers with: logits, of which the largest counts, or numbers that count as they are.
Answers = Literal["classes", "values"]


class PrivateData(Protocol):
    """The only way in which a pass may touch an owner's records: clipped, noised and charged by who implements it."""

    def noisy_sum(
        self, statistic: Callable[[torch.Tensor], torch.Tensor], norm_bound: float, shape: tuple[int, ...]
    ) -> torch.Tensor:
        """Sum `statistic(record)`, a vector of L2 norm at most `norm_bound`, over all owners' records, with noise."""
        ...

    def train(self, model: nn.Module, rounds: int, loss: Loss) -> nn.Module:
        """Train `model` for `rounds` more private rounds, charged to the same ledger."""
        ...


@dataclass(frozen=True, kw_only=True)
class Material:
    """The data and functions handed to the passes.

    Attributes:
        example_inputs: Shape (1, *shape), float32; only its shape and type are used, so zeros will do.
        public: Shape (n, *shape), float32, declared public and preprocessed as the model expects; None where
            there is none. Labels are never asked for.
        loss: `loss(logits, labels)` of the task, for passes that train.
        score: `score(model)`, higher is better, on data that cost nothing; for passes that search.
        answers: "classes" for logits; "values" for a regression or a reconstruction.
        private: The charged door to the owners' records; None keeps it shut.
        interface: What is done to inputs before the model and to its outputs after; for variants that hold it inside.
    """

    example_inputs: torch.Tensor
    public: torch.Tensor | None = None
    loss: Loss | None = None
    score: Score | None = None
    private: PrivateData | None = None
    answers: Answers = "classes"
    interface: Interface | None = None

    def __post_init__(self) -> None:
        """Check shapes, types and values at the door.

        Raises:
            ValueError: If the example is not one input, or the public inputs differ from it in shape, or either is
                not finite float32.
        """
        if self.example_inputs.dim() < 2 or self.example_inputs.shape[0] != 1:
            raise ValueError(
                f"expected example_inputs of shape (1, *shape), got shape={tuple(self.example_inputs.shape)}; "
                "add the batch axis"
            )
        _check_values("example_inputs", self.example_inputs)
        if self.public is None:
            return
        if self.public.shape[1:] != self.example_inputs.shape[1:] or self.public.shape[0] == 0:
            raise ValueError(
                f"expected public of shape (n, {', '.join(map(str, self.example_inputs.shape[1:]))}) with n >= 1, "
                f"got shape={tuple(self.public.shape)}; preprocess it as the model's inputs, or pass None"
            )
        _check_values("public", self.public)


def _check_values(name: str, values: torch.Tensor) -> None:
    if values.dtype != torch.float32:
        raise ValueError(f"expected {name} of dtype float32, got dtype={values.dtype}; convert it first")
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"expected {name} to be finite, got NaN or infinity; clean it first")
