"""An owner's optimizers against torch's own, and the terms that pull its steps."""

import numpy as np
import pytest
import torch

from tacit.federated.local_steps import LocalRule, LocalSteps

ORACLES = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
}


def parameters():
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 2), (2,), ())]


def gradients(number):
    generator = torch.Generator().manual_seed(100 + number)
    return [torch.randn(shape, generator=generator) for shape in ((3, 2), (2,), ())]


@pytest.mark.parametrize("name", ORACLES)
def test_steps_are_those_of_torchs_optimizer(name):
    ours, theirs = parameters(), parameters()
    steps = LocalSteps(LocalRule(learning_rate=0.1, optimizer=name, momentum=0.8), ours)
    oracle = ORACLES[name](theirs)
    for number in range(4):
        steps.take(gradients(number))
        for parameter, gradient in zip(theirs, gradients(number), strict=True):
            parameter.grad = gradient
        oracle.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.detach(), other.detach())


def test_the_proximal_term_is_the_gradient_of_half_mu_times_the_squared_distance():
    ours = parameters()
    start = [parameter.detach().clone() for parameter in ours]
    steps = LocalSteps(LocalRule(learning_rate=0.1, proximal=2.0), ours)
    for number in range(3):
        wanted = []
        for parameter, begin, gradient in zip(ours, start, gradients(number), strict=True):
            free = parameter.detach().clone().requires_grad_()
            (2.0 / 2 * (free - begin).pow(2).sum()).backward()
            wanted.append(parameter.detach() - 0.1 * (gradient + free.grad))
        steps.take(gradients(number))
        for parameter, value in zip(ours, wanted, strict=True):
            torch.testing.assert_close(parameter.detach(), value)


def test_a_correction_is_added_to_every_gradient():
    plain, corrected = parameters(), parameters()
    shift = [torch.ones_like(parameter) for parameter in plain]
    LocalSteps(LocalRule(learning_rate=0.1), plain).take([g + 1.0 for g in gradients(0)])
    LocalSteps(LocalRule(learning_rate=0.1), corrected, correction=shift).take(gradients(0))
    for one, other in zip(plain, corrected, strict=True):
        assert torch.equal(one, other)


def test_state_begins_anew_with_every_participation():
    moved = parameters()
    rule = LocalRule(learning_rate=0.1, optimizer="momentum")
    before = [parameter.detach().clone() for parameter in moved]
    LocalSteps(rule, moved).take(gradients(0))
    first = [b - p.detach() for b, p in zip(before, moved, strict=True)]
    before = [parameter.detach().clone() for parameter in moved]
    LocalSteps(rule, moved).take(gradients(0))
    second = [b - p.detach() for b, p in zip(before, moved, strict=True)]
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other)
    assert all(parameter.grad is None for parameter in moved)


@pytest.mark.parametrize(
    "wrong",
    [{"optimizer": "sdg"}, {"learning_rate": 0.0}, {"learning_rate": np.nan}, {"momentum": 1.0}, {"proximal": -1.0}],
)
def test_a_rule_out_of_range_is_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        LocalRule(**{"learning_rate": 0.1, **wrong})
