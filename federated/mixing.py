"""Refuses models and losses in which a record's gradient depends on other records: clipping it would bound nothing."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tacit.federated.mechanism import PrivacyRefused

__all__ = ["near", "refuse_mixing_layers", "refuse_mixing_loss", "refuse_mixing_records", "trial_records"]

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def refuse_mixing_layers(model: torch.nn.Module) -> None:
    """Refuses layers in which more than a record's own gradient depends on it, or on randomness that is not secret.

    Batch statistics mix the records of a batch; a buffer may carry what it saw past clip and noise; dropout draws from
    torch's global generator, whose default seed is a constant.

    Raises:
        PrivacyRefused: names the layers and what to use instead.

    >>> refuse_mixing_layers(torch.nn.Linear(2, 2))
    >>> refuse_mixing_layers(torch.nn.Sequential(torch.nn.Dropout()))
    Traceback (most recent call last):
        ...
    tacit.federated.mechanism.PrivacyRefused: expected no dropout, got layer(s) 0; its randomness is not secret
    """
    mixing = [
        name or "model"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) or any(True for _ in module.buffers(recurse=False))
    ]
    if mixing:
        raise PrivacyRefused(
            f"expected a model whose records do not mix, got batch statistics or buffers in layer(s) "
            f"{', '.join(mixing)}; "
            'use GroupNorm (in a recipe: [model] norm = "group")'
        )
    seeded = [
        n or "model"
        for n, m in model.named_modules()
        if isinstance(m, torch.nn.modules.dropout._DropoutNd) and m.p > 0.0
    ]
    if seeded:
        raise PrivacyRefused(f"expected no dropout, got layer(s) {', '.join(seeded)}; its randomness is not secret")


def trial_records(shape: tuple[int, ...], *, records: int = 3) -> torch.Tensor:
    """Public inputs to try a model on: zeros and ones, which are valid pixels, columns and tokens.

    >>> trial_records((2, 2)).shape
    torch.Size([3, 2, 2])
    """
    return torch.randint(2, (records, *shape), generator=torch.Generator().manual_seed(0)).float()


def refuse_mixing_loss(loss: Loss, targets: torch.Tensor, *, shape: tuple[int, ...]) -> None:
    """Refuses a loss in which a record's gradient depends on other records: one that is not a sum of their own terms.

    It is tried on a few records of random outputs, together and one by one.

    Args:
        loss: from outputs (records, *shape) and targets (records, ...) to a number.
        targets: of a few records, (records, ...).
        shape: of the outputs for one record.

    Raises:
        PrivacyRefused: a mean, a contrast between records, a normalisation over them.

    >>> from torch.nn.functional import cross_entropy
    >>> refuse_mixing_loss(lambda o, t: cross_entropy(o, t, reduction="sum"), torch.arange(4), shape=(10,))
    >>> refuse_mixing_loss(cross_entropy, torch.arange(4), shape=(10,))
    Traceback (most recent call last):
        ...
    tacit.federated.mechanism.PrivacyRefused: expected a loss that sums a term for each record, got one that mixes \
records; sum over records what depends on one record alone
    """
    outputs = torch.randn(len(targets), *shape, generator=torch.Generator().manual_seed(0))
    try:
        # Also small, because a contrast between records vanishes where each is far from the others.
        mixes = any(_mixes(loss, outputs * scale, targets) for scale in (0.1, 1.0, 3.0))
    except (RuntimeError, ValueError, IndexError) as error:
        raise PrivacyRefused(f"expected a loss that takes any number of records, got {error}") from error
    if mixes:
        raise PrivacyRefused(
            "expected a loss that sums a term for each record, got one that mixes records; "
            "sum over records what depends on one record alone"
        )


def _mixes(loss: Loss, logits: torch.Tensor, labels: torch.Tensor) -> bool:
    value, gradient = _value_and_gradient(loss, logits, labels)
    alone = [_value_and_gradient(loss, logits[[i]], labels[[i]]) for i in range(len(logits))]
    values, gradients = torch.stack([v for v, _ in alone]), torch.cat([g for _, g in alone])
    return not (near(value, values.sum()) and near(gradient, gradients))


def _value_and_gradient(loss: Loss, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logits = logits.clone().requires_grad_()
    value = loss(logits, labels)
    return value.detach(), torch.autograd.grad(value, logits)[0]


def near(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether two tensors differ by float32 rounding at most; NaN is near nothing.

    >>> near(torch.tensor([1.0, 2.00001]), torch.tensor([1.0, 2.0])), near(torch.zeros(2), torch.ones(2))
    (True, False)
    """
    return found.shape == wanted.shape and bool((found - wanted).abs().max() <= 1e-3 * wanted.abs().max() + 1e-6)


def refuse_mixing_records(model: torch.nn.Module, inputs: torch.Tensor) -> None:
    """Refuses a model whose output for a record depends on the others, by whatever way its layers are put together.

    Args:
        model: in training mode.
        inputs: a few records to try it on, together and one by one, (records, *shape).

    Raises:
        PrivacyRefused: an output differs, or torch's global generator was drawn from: its randomness is not secret.

    >>> refuse_mixing_records(torch.nn.Linear(2, 1), torch.eye(2))
    """
    state = torch.get_rng_state()
    with torch.no_grad():
        together, alone = model(inputs), torch.cat([model(inputs[[i]]) for i in range(len(inputs))])
    if not torch.equal(state, torch.get_rng_state()):
        torch.set_rng_state(state)
        raise PrivacyRefused("expected a model without randomness, got one that draws from torch's global generator")
    if not near(together, alone):
        raise PrivacyRefused(
            "expected a model whose output for a record depends on it alone, got one that mixes records; "
            "leave the first dimension to the records"
        )
