"""Structured pruning: whole channels leave the model, chosen by the size of the weights alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
import torch_pruning as tp
from torch import nn

from tacit.compression.plan import LayerPlan, Plan, replay

_SUPPORTED = (nn.Conv1d, nn.Conv2d, nn.Linear, nn.GroupNorm)


@dataclass(frozen=True)
class PruneReport:
    """What a pruning removed; `skipped` says of each layer left whole why so."""

    parameters_before: int
    parameters_after: int
    skipped: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Coupled:
    """Layers that must keep the same channels: name -> (kind of axis, its indices by channel of the root)."""

    root: str
    channels: int
    axes: tuple[
        tuple[str, str, tuple[tuple[int, int], ...]], ...
    ]  # (layer, "outputs"|"inputs", (channel, index) pairs)


def prune(
    model: nn.Module, example: torch.Tensor, *, ratio: float, round_to: int = 1
) -> tuple[nn.Module, Plan, PruneReport]:
    """Remove about `ratio` of the channels of every layer but the last, the smallest by group L2 norm first.

    Which layers are coupled comes from torch-pruning's dependency graph (Fang et al., "DepGraph: Towards Any
    Structural Pruning", CVPR 2023); which channels stay is chosen here, because a GroupNorm must keep equally many
    channels in each of its groups, or lose whole groups, and torch-pruning 1.6 leaves some such layers untouched
    without a word. Of the feasible counts the one nearest to `1 - ratio` is taken.

    Guarantees: looks at weights only, so it costs no privacy. The remaining weights are unchanged. The output's
    shape is unchanged.

    Args:
        model: Convolutions, linear layers and GroupNorm; left as it is.
        example: One input, shape (1, *shape); only its shape and type matter.
        ratio: Fraction of channels to remove, 0 < ratio < 1.
        round_to: Kept counts are multiples of this, for hardware that likes them.

    Returns:
        The smaller model, the plan that `replay` turns the old one into it with, and the report.

    Raises:
        ValueError: If an argument is out of range, or nothing could be removed.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> smaller, _, report = prune(model, torch.zeros(1, 4), ratio=0.5)
        >>> smaller[0], report.parameters_before, report.parameters_after
        (Linear(in_features=4, out_features=4, bias=True), 58, 30)
    """
    if not 0.0 < ratio < 1.0:
        raise ValueError(f"expected 0 < ratio < 1, got ratio={ratio}; 0.5 removes half of the channels")
    if round_to < 1:
        raise ValueError(f"expected round_to >= 1, got round_to={round_to}; use 1 for no rounding")
    before = sum(parameter.numel() for parameter in model.parameters())
    modules = dict(model.named_modules())
    layers: dict[str, LayerPlan] = {}
    skipped: dict[str, str] = {}
    for coupled in _coupled_layers(model, example, skipped):
        norms = [modules[name] for name, _, _ in coupled.axes if isinstance(modules[name], nn.GroupNorm)]
        groups = sorted({norm.num_groups for norm in norms if isinstance(norm, nn.GroupNorm)})
        kept = _select(_importance(coupled, modules), groups, ratio=ratio, round_to=round_to)
        if kept is None:
            skipped[coupled.root] = f"no smaller count fits groups={groups} and round_to={round_to}"
            continue
        _add_to_plan(layers, coupled, modules, kept)
    plan = Plan(layers)
    smaller = replay(model, plan)
    after = sum(parameter.numel() for parameter in smaller.parameters())
    _check_result(model, smaller, example, skipped)
    return smaller, plan, PruneReport(before, after, skipped)


def _check_result(model: nn.Module, smaller: nn.Module, example: torch.Tensor, skipped: Mapping[str, str]) -> None:
    before = sum(parameter.numel() for parameter in model.parameters())
    if sum(parameter.numel() for parameter in smaller.parameters()) >= before:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items()) or "no layer before the last"
        raise ValueError(
            f"expected pruning to remove channels, got none removed of {before} parameters ({reasons}); "
            "raise ratio, lower round_to, or drop the pass"
        )
    expected, got = _output_shape(model, example), _output_shape(smaller, example)
    if expected != got:
        raise ValueError(f"expected an output of shape {expected}, got {got}; give the model a last layer of its own")


@torch.no_grad()
def _output_shape(model: nn.Module, example: torch.Tensor) -> tuple[int, ...]:
    output = model(example)
    return tuple(output.shape)


def _coupled_layers(model: nn.Module, example: torch.Tensor, skipped: dict[str, str]) -> Iterable[_Coupled]:
    traced = copy.deepcopy(model)  # tracing switches to evaluation and hooks every layer
    graph = tp.DependencyGraph().build_dependency(traced, example_inputs=example)
    names = {module: name for name, module in traced.named_modules()}
    for group in graph.get_all_groups():
        root = names[group[0].dep.target.module]
        channels = len(group[0].idxs)
        axes, unsupported = [], None
        for position, (dependency, indices) in enumerate(group):
            module = dependency.target.module
            if module not in names:
                if isinstance(module, nn.Parameter):
                    unsupported = "a bare parameter"
                continue  # concatenations, reshapes and element-wise operations hold no weights
            if not _is_supported(module):
                unsupported = f"{type(module).__name__} {names[module]!r}"
                break
            leaves_outputs = isinstance(module, nn.GroupNorm) or graph.is_out_channel_pruning_fn(dependency.handler)
            axis = "outputs" if leaves_outputs else "inputs"
            pairs = tuple(zip(group[position].root_idxs, indices, strict=True))
            axes.append((names[module], axis, pairs))
        if unsupported is not None:
            skipped[root] = f"coupled to {unsupported}, which cannot be pruned"
        elif any(axis == "inputs" for _, axis, _ in axes):  # else its channels are the model's output
            yield _Coupled(root, channels, tuple(axes))


def _is_supported(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return module.groups == 1 or module.groups == module.in_channels == module.out_channels
    # Containers and activations carry no parameters of their own; anything else that does is not understood.
    return isinstance(module, _SUPPORTED) or not list(module.parameters())


def _importance(coupled: _Coupled, modules: Mapping[str, nn.Module]) -> torch.Tensor:
    """L2 norm over every weight that would leave with a channel, shape (channels,), float64."""
    squares = torch.zeros(coupled.channels, dtype=torch.float64)
    for name, axis, pairs in coupled.axes:
        module = modules[name]
        if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear):
            continue  # a norm's scale says little about a channel's worth and is 1 before training
        weight = module.weight.detach().to("cpu", torch.float64)
        rows = weight if axis == "outputs" or weight.shape[1] == 1 else weight.transpose(0, 1)
        per_index = rows.flatten(1).square().sum(1)
        channel, index = (torch.tensor(column) for column in zip(*pairs, strict=True))
        squares.index_add_(0, channel, per_index[index])
    return squares.sqrt()


def _select(importance: torch.Tensor, groups: list[int], *, ratio: float, round_to: int) -> torch.Tensor | None:
    """Choose the channels to keep, increasing; None if no smaller count is feasible.

    With several GroupNorms on the same channels, parts as fine as their least common multiple are equal in all.
    """
    channels = len(importance)
    parts = math.lcm(*groups) if groups else 1
    size = channels // parts
    within = [(parts * k, True) for k in range(1, size)]
    # Whole groups can go only where all norms agree on what a group is.
    whole = [(size * k, False) for k in range(1, parts)] if len(groups) == 1 else []
    feasible = [(count, inside) for count, inside in within + whole if count % round_to == 0]
    if not feasible:
        return None
    target = (1.0 - ratio) * channels
    count, inside = min(feasible, key=lambda option: (abs(option[0] - target), not option[1], option[0]))
    by_part = importance.reshape(parts, size)
    if inside:
        order = by_part.argsort(dim=1, descending=True, stable=True)[:, : count // parts]
        kept = order + size * torch.arange(parts)[:, None]
    else:
        strongest = by_part.square().sum(1).argsort(descending=True, stable=True)[: count // size]
        kept = strongest[:, None] * size + torch.arange(size)
    return kept.flatten().sort().values


def _add_to_plan(
    layers: dict[str, LayerPlan], coupled: _Coupled, modules: Mapping[str, nn.Module], kept: torch.Tensor
) -> None:
    stays = set(kept.tolist())
    for name, axis, pairs in coupled.axes:
        module = modules[name]
        if not isinstance(module, _SUPPORTED):
            continue
        indices = tuple(sorted(index for channel, index in pairs if channel in stays))
        earlier = layers.get(name, LayerPlan())
        depthwise = isinstance(module, nn.Conv1d | nn.Conv2d) and module.groups > 1
        layers[name] = LayerPlan(
            outputs=indices if axis == "outputs" or depthwise else earlier.outputs,
            inputs=indices if axis == "inputs" or depthwise else earlier.inputs,
            num_groups=_groups_after(module, indices) if isinstance(module, nn.GroupNorm) else None,
        )


def _groups_after(norm: nn.GroupNorm, kept: tuple[int, ...]) -> int:
    size = norm.num_channels // norm.num_groups
    return len({index // size for index in kept})
