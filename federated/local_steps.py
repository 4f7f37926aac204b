"""How an owner turns gradients into steps: optimizers by name, and the terms that pull its steps towards the others'.

Under privacy all of this is post-processing: what comes in is noised already, and the pulling terms are public.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

__all__ = ["LocalOptimizer", "LocalRule", "LocalSteps"]

LocalOptimizer = Literal["sgd", "momentum", "adam", "rmsprop", "adagrad"]


@dataclass(frozen=True, kw_only=True)
class LocalRule:
    """What an owner does with a gradient.

    Attributes:
        learning_rate: of the optimizer, above 0.
        optimizer: plain SGD, or one of torch's; its state begins anew with every participation.
        momentum: of "momentum", in [0, 1).
        proximal: μ of FedProx (Li et al. 2020, eq. 2): adds μ(w - w_global) to the gradient; 0 for none.

    Raises:
        ValueError: a value out of its range.
    """

    learning_rate: float
    optimizer: LocalOptimizer = "sgd"
    momentum: float = 0.9
    proximal: float = 0.0

    def __post_init__(self) -> None:
        if self.optimizer not in get_args(LocalOptimizer):
            names = ", ".join(get_args(LocalOptimizer))
            raise ValueError(f"expected an optimizer among {names}, got optimizer={self.optimizer!r}")
        if not self.learning_rate > 0.0 or not 0.0 <= self.momentum < 1.0 or not self.proximal >= 0.0:
            raise ValueError(
                "expected learning_rate > 0, 0 <= momentum < 1 and proximal >= 0, got "
                f"learning_rate={self.learning_rate}, momentum={self.momentum}, proximal={self.proximal}"
            )


class LocalSteps:
    """The steps of one participation.

    >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
    >>> steps = LocalSteps(LocalRule(learning_rate=0.5, proximal=1.0), [weight])
    >>> steps.take([torch.tensor([1.0])])  # to 0.5
    >>> steps.take([torch.tensor([0.0])])  # pulled back by half of the way
    >>> weight.item()
    0.75
    """

    def __init__(
        self,
        rule: LocalRule,
        parameters: Sequence[torch.nn.Parameter],
        *,
        towards: Sequence[torch.Tensor] | None = None,
        correction: Sequence[torch.Tensor] | None = None,
    ) -> None:
        """Begins at the parameters as they are.

        Args:
            rule: what to do with a gradient.
            parameters: to be moved.
            towards: where the proximal term pulls; where the parameters begin when None.
            correction: added to every gradient (SCAFFOLD's c - c_i), in the parameters' order; none when None.
        """
        self._rule, self._parameters, self._correction = rule, list(parameters), correction
        self._towards = list(towards) if towards is not None else None
        if rule.proximal and self._towards is None:
            self._towards = [parameter.detach().clone() for parameter in self._parameters]
        self._optimizer = _made(rule, self._parameters)

    def take(self, gradients: Sequence[torch.Tensor]) -> None:
        """Moves the parameters by one step, in place."""
        with torch.no_grad():
            pulled = self._pulled(gradients)
            if self._optimizer is None:
                for parameter, gradient in zip(self._parameters, pulled, strict=True):
                    parameter.sub_(gradient, alpha=self._rule.learning_rate)
                return
            for parameter, gradient in zip(self._parameters, pulled, strict=True):
                parameter.grad = gradient.reshape(parameter.shape)
            self._optimizer.step()
            self._optimizer.zero_grad()

    def _pulled(self, gradients: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        if self._correction is not None:
            gradients = [g + c for g, c in zip(gradients, self._correction, strict=True)]
        if self._rule.proximal and self._towards is not None:
            places = zip(gradients, self._parameters, self._towards, strict=True)
            gradients = [g + self._rule.proximal * (p - start) for g, p, start in places]
        return gradients


def _made(rule: LocalRule, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer | None:
    """A fresh optimizer; None for plain SGD, whose step is a line of its own and costs less."""
    if rule.optimizer == "momentum":
        return torch.optim.SGD(parameters, lr=rule.learning_rate, momentum=rule.momentum)
    if rule.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=rule.learning_rate)
    if rule.optimizer == "rmsprop":
        return torch.optim.RMSprop(parameters, lr=rule.learning_rate)
    if rule.optimizer == "adagrad":
        return torch.optim.Adagrad(parameters, lr=rule.learning_rate)
    return None
