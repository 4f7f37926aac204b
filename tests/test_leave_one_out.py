"""Forms that claim to use nobody's records: leaving any of 32 calibration records out changes none of their bytes."""

import numpy as np
import pytest
import torch
from torch import nn

from tacit.compression.forms import FORMS
from tacit.compression.material import Material
from tacit.compression.passes import apply_passes, parse_passes
from tacit.compression.targets import TARGETS
from tacit.compression.variant import VariantSpec, build_variant, export_float

RECORDS = 32


def changed(tmp_path, target, entry, left_out):
    """Of how many records the absence changes the file."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    everything = torch.from_numpy(np.random.default_rng(0).standard_normal((RECORDS, 1, 8, 8)).astype(np.float32))
    passes = parse_passes([entry])
    spec = VariantSpec("v", target, passes)

    def artifact(public):
        material = Material(example_inputs=torch.zeros(1, 1, 8, 8), public=public)
        shaped = apply_passes(model, passes, material, seed=0)
        plain = tmp_path / f"plain.{target}"
        if not plain.exists():
            export_float(spec, shaped, material, plain)
        return build_variant(spec, shaped, material, tmp_path / "v", stamp={}, exported=plain)["sha256"]

    whole = artifact(everything)
    keep = [torch.arange(RECORDS) != record for record in left_out]
    return sum(artifact(everything[mask]) != whole for mask in keep), spec.passes[-1].data_use


def free_entries(target):
    for form in TARGETS[target].forms:
        yield {"name": form, **({"calibration": "synthetic"} if FORMS[form].calibrated else {})}


@pytest.mark.parametrize("target", ["onnx", "tflite"])
def test_the_extremes_of_public_calibration_show_in_the_bytes_and_those_of_free_forms_do_not(tmp_path, target):
    torch.manual_seed(0)
    records = range(RECORDS) if target == "onnx" else range(3)
    counted, use = changed(tmp_path, target, {"name": "static_int8"}, records)
    assert use == "public"
    if target == "onnx":
        assert counted > 0  # a control: what is taken from records does depend on them
    assert changed(tmp_path, target, {"name": "static_int8", "calibration": "synthetic"}, records[:3]) == (0, "none")


@pytest.mark.soak
@pytest.mark.parametrize("target", list(TARGETS))
def test_no_record_changes_a_byte_of_any_free_form(tmp_path, target):
    for number, entry in enumerate(free_entries(target)):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert changed(folder, target, entry, range(RECORDS)) == (0, "none"), entry
