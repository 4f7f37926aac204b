"""A reshaped model as data: which channels each layer keeps, and the weights that remain."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from tacit.devices.sandbox import ArtifactRefused
from tacit.devices.weights import read_header

SCHEMA_VERSION = 1
_MAX_PLAN_BYTES = 64 * 2**20

Indices = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """What one layer keeps, as indices into the unpruned layer; None keeps everything.

    Attributes:
        outputs: Kept output channels (for GroupNorm: kept channels).
        inputs: Kept input channels or features.
        num_groups: GroupNorm only: the number of groups afterwards.
    """

    outputs: Indices | None = None
    inputs: Indices | None = None
    num_groups: int | None = None


@dataclass(frozen=True)
class Plan:
    """Layer name, as in `model.named_modules()`, to what the layer keeps; a layer not named keeps everything."""

    layers: Mapping[str, LayerPlan] = field(default_factory=dict)


def compose(first: Plan, second: Plan) -> Plan:
    """Return the plan that does `first`, then `second`, to the unpruned model.

    Example:
        >>> first = Plan({"fc": LayerPlan(outputs=(1, 3, 5))})
        >>> compose(first, Plan({"fc": LayerPlan(outputs=(0, 2))})).layers["fc"].outputs
        (1, 5)
    """
    layers = dict(first.layers)
    for name, later in second.layers.items():
        earlier = layers.get(name, LayerPlan())
        layers[name] = LayerPlan(
            outputs=_compose_indices(earlier.outputs, later.outputs),
            inputs=_compose_indices(earlier.inputs, later.inputs),
            num_groups=earlier.num_groups if later.num_groups is None else later.num_groups,
        )
    return Plan(layers)


def replay(model: nn.Module, plan: Plan) -> nn.Module:
    """Return a copy of the unpruned `model` reduced to what `plan` keeps; the remaining weights are unchanged.

    Args:
        model: The unpruned model; left as it is.
        plan: Indices into that model's layers.

    Returns:
        A new model of the same classes with fewer channels.

    Raises:
        ValueError: If the plan names a layer that the model has not, an index out of range or out of order, or
            groups that a GroupNorm cannot have.

    Example:
        >>> replay(nn.Sequential(nn.Linear(4, 8)), Plan({"0": LayerPlan(outputs=(0, 2, 5))}))[0]
        Linear(in_features=4, out_features=3, bias=True)
    """
    reshaped = copy.deepcopy(model)
    modules = dict(reshaped.named_modules())
    for name, layer_plan in plan.layers.items():
        layer = modules.get(name)
        if isinstance(layer, nn.Conv1d | nn.Conv2d):
            _keep_conv(name, layer, layer_plan)
        elif isinstance(layer, nn.Linear):
            _keep_linear(name, layer, layer_plan)
        elif isinstance(layer, nn.GroupNorm):
            _keep_group_norm(name, layer, layer_plan)
        else:
            raise ValueError(
                f"expected a Conv1d, Conv2d, Linear or GroupNorm named in the plan, got {name!r}="
                f"{type(layer).__name__}; load the plan into the model it was made from"
            )
    return reshaped


def save(folder: Path, model: nn.Module, plan: Plan) -> None:
    """Write `plan.json` and `weights.safetensors` of a reshaped model into an existing folder.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(Path(folder), nn.Linear(4, 2), Plan())
        ...     sorted(path.name for path in Path(folder).iterdir())
        ['plan.json', 'weights.safetensors']
    """
    layers = {
        name: {
            key: value
            for key, value in (
                ("outputs", layer.outputs and list(layer.outputs)),
                ("inputs", layer.inputs and list(layer.inputs)),
                ("num_groups", layer.num_groups),
            )
            if value is not None
        }
        for name, layer in sorted(plan.layers.items())
    }
    text = json.dumps({"schema_version": SCHEMA_VERSION, "layers": layers}, indent=1)
    (folder / "plan.json").write_text(text + "\n", encoding="utf-8")
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
    save_file(tensors, folder / "weights.safetensors")


def load(folder: Path, model: nn.Module) -> tuple[nn.Module, Plan]:
    """Rebuild the reshaped model saved in `folder` on a fresh, unpruned `model`.

    Args:
        folder: Holds `plan.json` and `weights.safetensors`.
        model: The unpruned model; its weights do not matter and are left as they are.

    Returns:
        The reshaped model with the saved weights, and the plan.

    Raises:
        ValueError: If the plan is not exactly what `save` writes, does not fit the model, or a weight is missing, too
            many, of another shape or dtype, or not finite.
        OSError: If a file cannot be read.

    Example:
        >>> import tempfile
        >>> model, plan = nn.Sequential(nn.Linear(4, 8)), Plan({"0": LayerPlan(outputs=(0, 2, 5))})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(Path(folder), replay(model, plan), plan)
        ...     reshaped, loaded = load(Path(folder), nn.Sequential(nn.Linear(4, 8)))
        >>> torch.equal(reshaped[0].weight, model[0].weight[[0, 2, 5]]), loaded == plan
        (True, True)
    """
    plan = _read_plan(folder / "plan.json")
    reshaped = replay(model, plan)
    try:
        read_header(folder / "weights.safetensors")  # in the sandbox: a folder may come from elsewhere
        weights = load_file(folder / "weights.safetensors")
    except (ArtifactRefused, SafetensorError) as error:
        raise ValueError(
            f"expected a safetensors file, got {folder / 'weights.safetensors'}: {error}; build the variant again"
        ) from error
    _check_weights(weights, reshaped.state_dict())
    reshaped.load_state_dict(weights)
    return reshaped, plan


def _compose_indices(first: Indices | None, second: Indices | None) -> Indices | None:
    if first is None or second is None:
        return second if first is None else first
    return tuple(first[index] for index in second)


def _checked(name: str, indices: Indices | None, size: int) -> torch.Tensor:
    kept = tuple(range(size)) if indices is None else indices
    if not kept or kept[0] < 0 or kept[-1] >= size or any(a >= b for a, b in itertools.pairwise(kept)):
        raise ValueError(
            f"expected increasing indices in 0..{size - 1} for layer {name!r}, got {list(kept[:8])}...; "
            "load the plan into the model it was made from"
        )
    return torch.tensor(kept)


def _keep_conv(name: str, layer: nn.Conv1d | nn.Conv2d, plan: LayerPlan) -> None:
    if plan.num_groups is not None:
        raise ValueError(f"expected num_groups on GroupNorm only, got layer {name!r}; remove it from the plan")
    outputs = _checked(name, plan.outputs, layer.out_channels)
    inputs = _checked(name, plan.inputs, layer.in_channels)
    if layer.groups == 1:
        weight = layer.weight[outputs][:, inputs]
    elif layer.groups == layer.in_channels == layer.out_channels and torch.equal(outputs, inputs):
        weight, layer.groups = layer.weight[outputs], len(outputs)  # depthwise: one filter a channel
    else:
        raise ValueError(
            f"expected an ungrouped or depthwise convolution, got layer {name!r} with groups={layer.groups}; "
            "leave it out of the plan"
        )
    layer.out_channels, layer.in_channels = len(outputs), len(inputs)
    _set_weights(layer, weight, outputs)


def _keep_linear(name: str, layer: nn.Linear, plan: LayerPlan) -> None:
    if plan.num_groups is not None:
        raise ValueError(f"expected num_groups on GroupNorm only, got layer {name!r}; remove it from the plan")
    outputs = _checked(name, plan.outputs, layer.out_features)
    inputs = _checked(name, plan.inputs, layer.in_features)
    layer.out_features, layer.in_features = len(outputs), len(inputs)
    _set_weights(layer, layer.weight[outputs][:, inputs], outputs)


def _keep_group_norm(name: str, layer: nn.GroupNorm, plan: LayerPlan) -> None:
    kept = _checked(name, plan.outputs, layer.num_channels)
    groups = layer.num_groups if plan.num_groups is None else plan.num_groups
    size = layer.num_channels // layer.num_groups
    fits = groups >= 1 and len(kept) % groups == 0
    # Each new group must come from one old group, or channels would be normalised with strangers.
    if not fits or any(len(set(part.tolist())) != 1 for part in (kept // size).reshape(groups, -1)):
        raise ValueError(
            f"expected {len(kept)} kept channels to fall into whole groups of the old ones, got num_groups={groups} "
            f"for layer {name!r}; keep equally many channels of each kept group"
        )
    if plan.inputs is not None:
        raise ValueError(f"expected no inputs for a GroupNorm, got layer {name!r}; name its channels as outputs")
    layer.num_channels, layer.num_groups = len(kept), groups
    if layer.affine:
        _set_weights(layer, layer.weight[kept], kept)


def _set_weights(
    layer: nn.Conv1d | nn.Conv2d | nn.Linear | nn.GroupNorm, weight: torch.Tensor, kept: torch.Tensor
) -> None:
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=layer.weight.requires_grad)
    bias = layer.bias
    if bias is not None:
        layer.bias = nn.Parameter(bias[kept].detach().clone(), requires_grad=bias.requires_grad)


def _read_plan(path: Path) -> Plan:
    if path.stat().st_size > _MAX_PLAN_BYTES:
        raise ValueError(f"expected a plan of at most {_MAX_PLAN_BYTES} bytes, got {path}; build the variant again")
    try:
        data = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"expected JSON, got {path}: {error}; build the variant again") from error
    if not isinstance(data, dict) or set(data) != {"schema_version", "layers"} or not isinstance(data["layers"], dict):
        raise ValueError(f"expected the keys schema_version and layers, got {path}; build the variant again")
    if data["schema_version"] != SCHEMA_VERSION or isinstance(data["schema_version"], bool):
        raise ValueError(
            f"expected schema_version={SCHEMA_VERSION}, got {data['schema_version']!r} in {path}; "
            "read it with the version that wrote it"
        )
    return Plan({name: _parse_layer(name, entry) for name, entry in data["layers"].items()})


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) != len(keys):
        raise ValueError(f"expected each key once, got duplicates among {sorted(keys)[:8]}; build the variant again")
    return dict(pairs)


def _parse_layer(name: str, entry: object) -> LayerPlan:
    if not isinstance(entry, dict) or not set(entry) <= {"outputs", "inputs", "num_groups"}:
        raise ValueError(
            f"expected outputs, inputs or num_groups for layer {name!r}, got {entry!r:.80}; build it again"
        )
    groups = entry.get("num_groups")
    if groups is not None and type(groups) is not int:
        raise ValueError(f"expected a whole number of groups for layer {name!r}, got {groups!r:.80}; build it again")
    return LayerPlan(
        outputs=_parse_indices(name, entry, "outputs"), inputs=_parse_indices(name, entry, "inputs"), num_groups=groups
    )


def _parse_indices(name: str, entry: Mapping[str, object], key: str) -> Indices | None:
    if key not in entry:
        return None
    values = entry[key]
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise ValueError(
            f"expected a list of whole numbers as {key} of layer {name!r}, got {values!r:.80}; build it again"
        )
    return tuple(values)


def _check_weights(weights: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    if set(weights) != set(expected):
        difference = sorted(set(weights) ^ set(expected))
        raise ValueError(
            f"expected the weights of the planned model, got missing or surplus {difference[:4]}; build it again"
        )
    for name, value in weights.items():
        if value.shape != expected[name].shape or value.dtype != expected[name].dtype:
            raise ValueError(
                f"expected {name!r} of {tuple(expected[name].shape)} {expected[name].dtype}, "
                f"got {tuple(value.shape)} {value.dtype}; build it again"
            )
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"expected finite weights, got NaN or infinity in {name!r}; train again")
