"""Recovery: a smaller model learns to answer as the model it came from, on public inputs without labels."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from tacit.compression.material import Answers

_MIN_VIEWS = 128  # views a step: few public images are seen several times over, each time otherwise
_NOISE = 0.05  # of the images' own standard deviation

Progress = Callable[[str, int, int], None]


def distill(
    student: nn.Module,
    teacher: nn.Module,
    public: torch.Tensor,
    *,
    seed: int,
    epochs: int = 400,
    learning_rate: float = 0.02,
    temperature: float = 2.0,
    answers: Answers = "classes",
    progress: Progress | None = None,
) -> nn.Module:
    """Train a copy of `student` towards the softened answers of `teacher` (Hinton et al., arXiv:1503.02531, eq. 1-4).

    Values have nothing to soften: there the student learns the teacher's numbers by squared error (Ba and Caruana,
    arXiv:1312.6184, eq. 1), which of logits is the limit of a high temperature.

    An epoch is one step of Adam, with a cosine schedule, on jittered views of all the public inputs (images shifted
    by a pixel, all with mild noise, and mixed with one another), so that a few dozen carry far.

    Guarantees: reads the two models and the public inputs, nothing else, so it costs no privacy. The result is a
    function of the arguments and the number of threads; the global random state is neither read nor changed.

    Args:
        student: The model to recover; left as it is.
        teacher: The model to imitate, with the same inputs and outputs; evaluated, never changed.
        public: Shape (n, *shape); the last two axes are shifted if there are three axes or more after n.
        seed: Of the jitter.
        epochs: Steps.
        learning_rate: At the start; it falls to zero.
        temperature: Above 1 softens the teacher's answers; values do without.
        answers: What the models answer with.
        progress: Called with ("distill", epoch, epochs).

    Returns:
        The trained copy, in evaluation mode.

    Raises:
        ValueError: If an argument is out of range, or training leaves a weight that is not finite.
    """
    if epochs < 1 or learning_rate <= 0.0 or temperature <= 0.0 or len(public) == 0:
        raise ValueError(
            "expected epochs >= 1, learning_rate > 0, temperature > 0 and at least one public input, got "
            f"epochs={epochs}, learning_rate={learning_rate}, temperature={temperature}, inputs={len(public)}"
        )
    trained, imitated = copy.deepcopy(student).train(), copy.deepcopy(teacher).eval()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(trained.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # dropout, if the model has any, draws from the global generator
        for epoch in range(epochs):
            views = jitter(public, generator)
            with torch.no_grad():
                wanted = imitated(views)  # (views, classes), or (views, ...) of values
            loss = _distance(trained(views), wanted, answers, temperature)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call] # torch leaves this one untyped
            optimizer.step()
            schedule.step()
            if progress is not None:
                progress("distill", epoch + 1, epochs)
    if not all(bool(torch.isfinite(parameter).all()) for parameter in trained.parameters()):
        raise ValueError(f"expected finite weights, got NaN or infinity; lower learning_rate={learning_rate}")
    return trained.eval()


def _distance(found: torch.Tensor, wanted: torch.Tensor, answers: Answers, temperature: float) -> torch.Tensor:
    if answers == "values":
        return F.mse_loss(found, wanted)
    return F.cross_entropy(found / temperature, F.softmax(wanted / temperature, dim=1)) * temperature**2


def jitter(public: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return random views of the public inputs: repeated, shifted by a pixel, mixed, with noise.

    Half of the views are convex combinations of two inputs: the teacher's answers between the images say where its
    borders run, which the images alone do not.

    Args:
        public: Shape (n, *shape).
        generator: The only source of randomness.

    Returns:
        Shape (n * repeats, *shape), where repeats makes at least 128 views.

    Example:
        >>> jitter(torch.zeros(10, 1, 8, 8), torch.Generator().manual_seed(1)).shape
        torch.Size([130, 1, 8, 8])
    """
    repeats = math.ceil(_MIN_VIEWS / len(public))
    views = public.repeat(repeats, *(1 for _ in public.shape[1:]))
    count = len(views)
    if views.dim() >= 4:
        views = _shift(views, generator)
    partner = views[torch.randperm(count, generator=generator)]
    share = torch.rand(count, generator=generator)
    share = torch.where(torch.rand(count, generator=generator) < 0.5, share, torch.ones(())).reshape(
        -1, *(1 for _ in public.shape[1:])
    )
    noise = torch.randn(views.shape, generator=generator) * (_NOISE * public.std(correction=0))
    return share * views + (1.0 - share) * partner + noise


def _shift(views: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shift each view by -1, 0 or 1 along its last two axes; what comes in is the edge repeated."""
    height, width = views.shape[-2:]
    count = len(views)
    down, right = torch.randint(-1, 2, (2, count, 1), generator=generator)
    rows = (torch.arange(height) + down).clamp(0, height - 1)  # (views, height)
    columns = (torch.arange(width) + right).clamp(0, width - 1)  # (views, width)
    flat = views.reshape(count, -1, height, width).movedim(1, -1)  # (views, height, width, rest)
    shifted = flat[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return shifted.movedim(-1, 1).reshape(views.shape)
