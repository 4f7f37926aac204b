"""What a compression pass is: a name, parameters, and the data it uses; and running those that change the model."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

import torch
from torch import nn

from tacit.compression.distill import distill
from tacit.compression.forms import FORMS
from tacit.compression.material import Material
from tacit.compression.plan import Plan, compose
from tacit.compression.prune import prune

DataUse = Literal["none", "public", "private"]
Value = int | float | str
Progress = Callable[[str, int, int], None]

_STRENGTH: tuple[DataUse, ...] = ("none", "public", "private")


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One step of a variant.

    Attributes:
        name: "prune", "distill", or a form of `forms.FORMS` other than float32.
        parameters: Every parameter, defaults filled in.
        data_use: "none" for weights only, "public" for public data; "private" is an access that must be charged.
    """

    name: str
    parameters: Mapping[str, Value] = field(default_factory=dict)
    data_use: DataUse = "none"

    def __post_init__(self) -> None:
        """Check that the pass exists and does not understate the data it uses.

        Raises:
            ValueError: If so.
        """
        if self.name not in _KNOWN:
            raise ValueError(
                f"expected name to be one of {', '.join(_KNOWN)}, got name={self.name!r}{_hint(self.name, _KNOWN)}"
            )
        if self.data_use != _data_use(self.name, self.parameters):
            raise ValueError(
                f"expected data_use={_data_use(self.name, self.parameters)!r} for the pass {self.name!r}, got "
                f"data_use={self.data_use!r}; build passes with parse_passes"
            )


@dataclass(frozen=True)
class Shaped:
    """A model after its model-level passes, and the plan that turns the unpruned model into its shape."""

    model: nn.Module
    plan: Plan
    parameters_before: int

    @property
    def parameters(self) -> int:
        """Number of parameters left."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def pruned(self) -> float:
        """Fraction of the parameters that pruning removed."""
        return 1.0 - self.parameters / self.parameters_before


@dataclass(frozen=True)
class _Parameter:
    default: int | float | None  # None: must be given
    low: float
    high: float
    whole: bool = False
    open_ends: bool = True  # the ends themselves are refused


@dataclass(frozen=True)
class _Choice:
    default: str
    among: tuple[str, ...]


_Parameters = Mapping[str, _Parameter | _Choice]
# Synthetic inputs are made from the model alone, so what they calibrate tells of nobody's records.
_CALIBRATION = {"calibration": _Choice("public", ("public", "synthetic"))}
_KNOWN: Mapping[str, tuple[DataUse, _Parameters]] = MappingProxyType(
    {
        "prune": (
            "none",
            {
                "ratio": _Parameter(None, 0.0, 1.0),
                "round_to": _Parameter(1, 1, 1024, whole=True, open_ends=False),
            },
        ),
        "distill": (
            "public",
            {
                "epochs": _Parameter(400, 1, 100_000, whole=True, open_ends=False),
                "learning_rate": _Parameter(0.02, 0.0, 1.0),
                "temperature": _Parameter(2.0, 0.0, 100.0),
            },
        ),
        **{
            name: ("public", _CALIBRATION) if form.calibrated else ("none", {})
            for name, form in FORMS.items()
            if name != "float32"
        },
    }
)


def parse_passes(entries: Iterable[Mapping[str, object]]) -> tuple[Pass, ...]:
    """Read the passes of a variant, in order, as a recipe spells them.

    Args:
        entries: Each with the key `name` and the pass's parameters.

    Returns:
        The passes, defaults filled in.

    Raises:
        ValueError: If a name or parameter is unknown, missing, of the wrong type or out of range; if there are two
            quantisation passes, or a pass follows one.

    Example:
        >>> [p.data_use for p in parse_passes([{"name": "prune", "ratio": 0.5}, {"name": "static_int8"}])]
        ['none', 'public']
    """
    passes = tuple(_parse_pass(entry) for entry in entries)
    for position, step in enumerate(passes):
        if step.name in FORMS and position != len(passes) - 1:
            raise ValueError(
                f"expected a quantisation pass to be the last and only one, got {step.name!r} at position "
                f"{position + 1} of {len(passes)}; move it to the end"
            )
    return passes


def form_of(passes: Sequence[Pass]) -> str:
    """Return the form that these passes end in, by its name in `forms.FORMS`.

    Example:
        >>> form_of(parse_passes([{"name": "prune", "ratio": 0.5}]))
        'float32'
    """
    return passes[-1].name if passes and passes[-1].name in FORMS else "float32"


def strongest_data_use(passes: Iterable[Pass]) -> DataUse:
    """Return the strongest use among the passes: private over public over none.

    Example:
        >>> strongest_data_use(parse_passes([{"name": "prune", "ratio": 0.5}, {"name": "static_int8"}]))
        'public'
    """
    return max((step.data_use for step in passes), key=_STRENGTH.index, default="none")


def check_material(passes: Iterable[Pass], material: Material) -> None:
    """Refuse passes that need data which are not there, before any work is done.

    Raises:
        ValueError: With the name of the pass and what to do.

    Example:
        >>> material = Material(example_inputs=torch.zeros(1, 4))
        >>> check_material(parse_passes([{"name": "dynamic_int8"}]), material)
        >>> check_material(parse_passes([{"name": "static_int8"}]), material)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ValueError: expected public inputs for the pass 'static_int8', got public=None; ...
    """
    for step in passes:
        if step.data_use == "public":
            require_public(step, material)


def require_public(step: Pass, material: Material) -> torch.Tensor:
    """Return the public inputs that `step` needs.

    Raises:
        ValueError: If there are none.

    Example:
        >>> (step,) = parse_passes([{"name": "static_int8"}])
        >>> require_public(step, Material(example_inputs=torch.zeros(1, 2), public=torch.ones(3, 2))).shape
        torch.Size([3, 2])
    """
    if material.public is None:
        raise ValueError(
            f"expected public inputs for the pass {step.name!r}, got public=None; declare a public split, or use "
            "passes that need no data (prune, dynamic_int8)"
        )
    return material.public


def apply_passes(
    model: nn.Module, passes: Sequence[Pass], material: Material, *, seed: int, progress: Progress | None = None
) -> Shaped:
    """Run the passes that change the model, in order; quantisation is left to the export.

    The teacher of a distillation is `model` as given here.

    Args:
        model: The trained model; left as it is.
        passes: From `parse_passes`.
        material: What the passes may look at.
        seed: Of the passes that draw random numbers.
        progress: Called with (pass name, step, steps).

    Returns:
        The model in evaluation mode, and its plan (empty if nothing was pruned).

    Raises:
        ValueError: If a pass needs data which are not there, or cannot do its work.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> half = parse_passes([{"name": "prune", "ratio": 0.5}])
        >>> shaped = apply_passes(model, half, Material(example_inputs=torch.zeros(1, 4)), seed=1)
        >>> shaped.parameters_before, shaped.parameters
        (58, 30)
    """
    check_material(passes, material)
    shaped = Shaped(model, Plan(), sum(parameter.numel() for parameter in model.parameters()))
    for step in passes:
        if step.name == "prune":
            shaped = _prune(shaped, step, material)
            if progress is not None:
                progress("prune", 1, 1)
        elif step.name == "distill":
            recovered = distill(
                shaped.model,
                model,
                require_public(step, material),
                seed=seed,
                epochs=int(step.parameters["epochs"]),
                learning_rate=float(step.parameters["learning_rate"]),
                temperature=float(step.parameters["temperature"]),
                answers=material.answers,
                progress=progress,
            )
            shaped = replace(shaped, model=recovered)
    return shaped


def _prune(shaped: Shaped, step: Pass, material: Material) -> Shaped:
    smaller, plan, _ = prune(
        shaped.model,
        material.example_inputs,
        ratio=float(step.parameters["ratio"]),
        round_to=int(step.parameters["round_to"]),
    )
    return replace(shaped, model=smaller.eval(), plan=compose(shaped.plan, plan))


def _parse_pass(entry: Mapping[str, object]) -> Pass:
    name = entry.get("name")
    if not isinstance(name, str) or name not in _KNOWN:
        raise ValueError(f"expected name to be one of {', '.join(_KNOWN)}, got name={name!r}{_hint(name, _KNOWN)}")
    known = _KNOWN[name][1]
    for key in entry:
        if key != "name" and key not in known:
            raise ValueError(
                f"expected parameters {', '.join(known) or '(none)'} for the pass {name!r}, got {key}={entry[key]!r}"
                f"{_hint(key, known)}"
            )
    parameters = {key: _parse_value(name, key, entry.get(key, known[key].default)) for key in known}
    return Pass(name=name, parameters=MappingProxyType(parameters), data_use=_data_use(name, parameters))


def _data_use(name: str, parameters: Mapping[str, Value]) -> DataUse:
    return "none" if parameters.get("calibration") == "synthetic" else _KNOWN[name][0]


def _parse_value(name: str, key: str, value: object) -> Value:
    known = _KNOWN[name][1][key]
    if isinstance(known, _Choice):
        if value not in known.among:
            raise ValueError(f"expected {key} to be one of {', '.join(known.among)}, got {key}={value!r}; choose one")
        return str(value)
    kind = "a whole number" if known.whole else "a number"
    span = f"{known.low:g} < {key} < {known.high:g}" if known.open_ends else f"{known.low:g} <= {key} <= {known.high:g}"
    wrong = isinstance(value, bool) or not isinstance(value, int if known.whole else int | float)
    if wrong or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"expected {kind}, {span}, for the pass {name!r}, got {key}={value!r}; write {key} = ...")
    inside = known.low < value < known.high if known.open_ends else known.low <= value <= known.high
    if not inside:
        raise ValueError(f"expected {span} for the pass {name!r}, got {key}={value!r}; choose a value inside")
    return value


def _hint(given: object, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(given), list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else "; remove it or choose one of these"
