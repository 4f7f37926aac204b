"""A model of one's own in any target and form, and whether it answers there as it does here; no federation needed."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn

from tacit.compression.calibrate import synthetic_inputs
from tacit.compression.departure import Departure, Values, first_departure
from tacit.compression.export_onnx import check_examples, count_outputs
from tacit.compression.forms import FORMS, Calibration, Label, Source
from tacit.compression.material import Answers
from tacit.compression.parity import THRESHOLDS, Parity, compare
from tacit.compression.targets import TARGETS, Format, check_form, label_of, target_of
from tacit.devices.runtime import open_artifact

__all__ = ["Exported", "export", "outputs_of", "write_form"]


@dataclass(frozen=True, kw_only=True)
class Exported:
    """An artifact that was written.

    Attributes:
        path: Of the file.
        target: In which it runs.
        form: Of `forms.FORMS`.
        outputs: How many the model has.
        calibration: What its ranges were taken from, if any.
    """

    path: Path
    target: Format
    form: str
    outputs: int
    calibration: Calibration | None = None

    @property
    def label(self) -> Label:
        """What reports call the form."""
        return label_of(self.target, self.form)

    def run(self, inputs: Sequence[Values]) -> list[Values]:
        """Outputs, each (n, ...), for inputs, each (n, *shape) and channel first, in the target's own runtime.

        Raises:
            ArtifactRefused: The file does not run there.
        """
        target = TARGETS[self.target]
        runtime = open_artifact(self.path, input_layout=target.layout, runtime=target.runtime)
        return runtime.run(list(inputs), outputs=self.outputs)

    def compare(self, model: nn.Module, inputs: Sequence[Values], *, answers: Answers = "values") -> list[Parity]:
        """How near each output is to the model's.

        Args:
            model: That was exported.
            inputs: As for `run`.
            answers: "classes" where the outputs are logits, of which the largest counts.
        """
        pairs = zip(outputs_of(model, inputs), self.run(inputs), strict=True)
        return [compare(w.astype(np.float32), f.astype(np.float32), answers=answers) for w, f in pairs]

    def check(self, model: nn.Module, inputs: Sequence[Values], *, answers: Answers = "values") -> list[Parity]:
        """As `compare`, and refuse what is too far away.

        Raises:
            Departure: With the first layer that departs.
        """
        found = self.compare(model, inputs, answers=answers)
        for parity in found:
            if not parity.passes(self.label):
                raise self.departed(model, inputs, parity)
        return found

    def departed(self, model: nn.Module, inputs: Sequence[Values], parity: Parity) -> Departure:
        """What is wrong with an artifact that is too far from its model, by name of the layer to blame."""
        far = "NaN or infinity" if not np.isfinite(parity.max_abs) else f"a largest difference of {parity.max_abs:.3g}"
        if parity.top1_agreement is not None:
            far += f" and {parity.top1_agreement:.1%} of the same classes"
        return Departure(
            f"expected {self.path.name} ({self.label}) to answer as its model, got {far}; {self._blame(model, inputs)}"
        )

    def _blame(self, model: nn.Module, inputs: Sequence[Values]) -> str:
        few = [values[:16] for values in inputs]

        def answer(part: nn.Module, path: Path) -> Values:
            examples = tuple(torch.from_numpy(np.ascontiguousarray(values[:1])) for values in few)
            written = path.with_suffix(f".{TARGETS[self.target].suffix}")
            write_form(part, examples, written, target=self.target, form=self.form, calibration=self.calibration)
            part_of_it = Exported(path=written, target=self.target, form=self.form, outputs=1)
            return part_of_it.run(few)[0]

        departed = first_departure(model, few, answer, tolerance=THRESHOLDS[self.label].layer)
        if departed is None:
            return "no single layer departs; leave the form to a model that it suits"
        name, share = departed
        kind = type(model.get_submodule(name)).__name__
        return f"layer {name!r} ({kind}) departs first, by {share:.2g} of its norm; choose another form or target"


def export(
    model: nn.Module,
    examples: tuple[torch.Tensor, ...],
    path: Path | str,
    *,
    form: str = "float32",
    target: Format | None = None,
    calibration: Calibration | Literal["synthetic"] | None = None,
) -> Exported:
    """Write a model as one file; it appears whole or not at all.

    Args:
        model: Any module that takes and returns tensors; exported in evaluation mode, left as it is.
        examples: One example of each input, (1, *shape).
        path: Of the file.
        form: Of `forms.FORMS`.
        target: Of `targets.TARGETS`; by the path's suffix when None.
        calibration: For forms that are calibrated: inputs, one array (n, *shape) each, which the file then depends on,
            or "synthetic" for some made from the model alone.

    Returns:
        What was written.

    Raises:
        FormRefused: The target cannot hold the model in this form; by layer, where one is to blame.
        ValueError: Unknown names, or inputs that do not fit.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     artifact = export(model, (torch.zeros(1, 4),), Path(folder, "model.onnx"))
        ...     artifact.check(model, [np.eye(3, 4, dtype=np.float32)])[0].max_abs < 1e-5
        True
    """
    path = Path(path)
    name = target or _by_suffix(path)
    check_examples(examples)
    inputs = synthetic_inputs(model, examples) if calibration == "synthetic" else calibration
    outputs = count_outputs(model.eval(), examples)
    write_form(model, examples, path, target=name, form=form, calibration=inputs)
    return Exported(path=path, target=name, form=form, outputs=outputs, calibration=inputs)


def write_form(
    model: nn.Module,
    examples: tuple[torch.Tensor, ...],
    path: Path,
    *,
    target: Format,
    form: str,
    calibration: Calibration | None,
    exported: Path | None = None,
) -> None:
    """Write a model to a file in one form of a target.

    Args:
        model: Left as it is.
        examples: One example of each input.
        path: Replaced if it exists, once the new file is whole.
        target: Of `targets.TARGETS`.
        form: Of `forms.FORMS`.
        calibration: For forms that are calibrated.
        exported: The float32 file of the target, where it was written before.

    Raises:
        FormRefused: The target cannot hold it.
    """
    check_form(target, form)
    tools = target_of(target)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
        plain = exported or Path(scratch, f"float.{tools.suffix}")
        if exported is None:
            tools.export(model, examples, plain)
        made = Path(scratch, f"made.{tools.suffix}")
        if form == "float32":
            made.write_bytes(plain.read_bytes())
        else:
            used = calibration if FORMS[form].calibrated else None
            tools.forms[form](Source(model=model, examples=examples, exported=plain, calibration=used), made)
        made.replace(path)


def _by_suffix(path: Path) -> Format:
    for name, target in TARGETS.items():
        if path.suffix.lower() == f".{target.suffix}":
            return name  # type: ignore[return-value]  # its keys are
    wanted = ", ".join(sorted({f".{target.suffix}" for target in TARGETS.values()}))
    raise ValueError(f"expected a path ending in {wanted}, got {path.name!r}; name the target")


def outputs_of(model: nn.Module, inputs: Sequence[Values]) -> list[Values]:
    """What a model answers in evaluation mode, one array an output; its mode is put back.

    Example:
        >>> outputs_of(nn.ReLU(), [np.float32([[-1.0, 2.0]])])[0].tolist()
        [[0.0, 2.0]]
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            answer = model(*(torch.from_numpy(np.ascontiguousarray(values)) for values in inputs))
    finally:
        model.train(training)
    return [one.numpy() for one in (answer if isinstance(answer, tuple | list) else (answer,))]
