"""How fast exported models run, beside the runtimes' own converters used as their guides say, at what accuracy.

Usage: python benchmarks/export.py [--quick] [--json FILE] [--cases cnn-onnx ...] [--norms]

Every family is trained for a moment on scikit-learn's digits, stretched to the family's usual shape; whole models, not
operators, are timed, on one thread, with a batch of one, in blocks of milliseconds that alternate between ours and the
peer's. The case's figure is of static int8, calibrated with the same 64 images; other forms stand beside it. A time is
the tenth percentile over the rounds, which a busy machine shifts least; a ratio above 1 says that ours is faster, and
its spread is that of neighbouring blocks. Accuracy is on 360 images that neither has seen.
`--norms` times the spellings of GroupNorm among which `compression/norms.py` chooses. `--digits` says how long a
process takes, its start included, to export the model of `digits` to ONNX and TFLite and to compare both with PyTorch.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from tacit.compression.export import export, write_form
from tacit.compression.export_onnx import export_onnx
from tacit.compression.forms import Source
from tacit.compression.norms import Spelling
from tacit.compression.quantize_onnx import static_int8
from tacit.compression.silence import silenced
from tacit.federated.models import build_family

# Model -> shape of an example; those with GroupNorm first.
MODELS: Mapping[str, tuple[int, ...]] = {
    "cnn": (1, 8, 8),
    "ds-cnn": (1, 49, 10),
    "resnet-8": (3, 32, 32),
    "mobilenet": (3, 48, 48),
    "conv1d": (9, 128),
    "mlp": (30,),
    "vit-tiny": (1, 28, 28),
    "transformer": (9, 128),
    "gru": (9, 64),
    "lstm": (9, 64),
}
QUICK = ("cnn", "ds-cnn", "mlp")
FORMS = ("static_int8", "dynamic_int8", "float32")
SPELLINGS: tuple[Spelling, ...] = ("exporter", "layer", "instance", "batch")
EPOCHS, CALIBRATION, TEST = 4, 64, 360
_PACKAGES = ("torch", "onnx", "onnxruntime", "litert-torch", "ai-edge-quantizer", "ai-edge-litert", "executorch")
BLOCK_S = 0.002

Images = np.ndarray
Infer = Callable[[Images], Images]


@dataclass(frozen=True, kw_only=True)
class Work:
    """A trained model and what there is to calibrate and test it with, channel first."""

    model: nn.Module
    calibration: Images
    test: Images
    answers: Images


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A target's own tools.

    Attributes:
        name: Of the peer.
        make: Writes a form of a model as the guide of the tools says; returns a remark on what it took.
        open: Loads a file of the target, with one thread, for single examples, channel first.
    """

    name: str
    make: Callable[[Work, str, Path], str]
    open: Callable[[Path], Infer]


def _open_onnx(path: Path) -> Infer:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda image: session.run(None, {name: image})[0]


def _make_onnx_default(work: Work, form: str, path: Path) -> str:
    """torch.onnx.export and onnxruntime.quantization with nothing chosen."""
    from onnxruntime.quantization import quantize_dynamic, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    plain, prepared = path.with_suffix(".plain.onnx"), path.with_suffix(".prepared.onnx")
    example = torch.from_numpy(work.test[:1])
    program = torch.onnx.export(work.model, (example,), dynamo=True, external_data=False, verbose=False)
    program.save(str(path if form == "float32" else plain))
    if form == "float32":
        return ""
    quant_pre_process(str(plain), str(prepared))
    if form == "dynamic_int8":
        quantize_dynamic(str(prepared), str(path))
        return ""
    return _first_that_works(
        lambda **options: quantize_static(str(prepared), str(path), _Reader(work.calibration, prepared), **options)
    )


def _first_that_works(quantize: Callable[..., None]) -> str:
    """The default fails on some models: "parameter shared mode is not supported for weight yet"."""
    try:
        quantize()
    except ValueError as error:
        quantize(op_types_to_quantize=["Conv", "Gemm", "MatMul", "Add", "Mul", "Relu", "MaxPool", "ReduceMean"])
        return f"default raised {str(error)[:70]!r}; InstanceNormalization and Reshape left out"
    return ""


class _Reader:
    def __init__(self, images: Images, model: Path) -> None:
        import onnx

        self.name, self.images = onnx.load(model).graph.input[0].name, iter(images)

    def get_next(self) -> dict[str, Images] | None:
        image = next(self.images, None)
        return None if image is None else {self.name: image[None]}


def _open_tflite(path: Path) -> Infer:
    from ai_edge_litert.interpreter import Interpreter

    with silenced():  # LiteRT announces its delegate
        interpreter = Interpreter(str(path), num_threads=1)
        interpreter.allocate_tensors()
    source, target = interpreter.get_input_details()[0], interpreter.get_output_details()[0]["index"]
    held: list[Images] = []

    def infer(image: Images) -> Images:
        if not held or held[0] is not image:  # laid out and rounded once, outside of what is timed
            held[:] = [image, _as_taken(image, source)]
        interpreter.set_tensor(source["index"], held[1])
        interpreter.invoke()
        return interpreter.get_tensor(target)  # of whole numbers, too, the largest is the answer

    return infer


def _as_taken(image: Images, source: Mapping[str, object]) -> Images:
    last = image.ndim > 2 and tuple(source["shape"]) == (*image.shape[:1], *image.shape[2:], image.shape[1])
    laid, (scale, zero) = np.moveaxis(image, 1, -1) if last else image, source["quantization"]
    if scale:
        laid = np.clip(np.rint(laid / scale) + zero, -128, 127)
    return np.ascontiguousarray(laid, dtype=source["dtype"])


def _make_tflite_default(work: Work, form: str, path: Path) -> str:
    """litert_torch.convert and ai-edge-quantizer's recipes with nothing chosen."""
    import litert_torch
    from ai_edge_quantizer import quantizer, recipe

    plain = path if form == "float32" else path.with_suffix(".plain.tflite")
    litert_torch.convert(work.model, (torch.from_numpy(work.test[:1]),)).export(str(plain))
    if form == "float32":
        return ""
    chosen = recipe.static_wi8_ai8() if form == "static_int8" else recipe.dynamic_wi8_afp32()
    quantise = quantizer.Quantizer(str(plain), chosen)
    data = {"serving_default": [{"args_0": image[None]} for image in work.calibration]}
    ranges = quantise.calibrate(data) if quantise.need_calibration else None
    path.write_bytes(quantise.quantize(ranges).quantized_model)
    return ""


def _open_pte(path: Path) -> Infer:
    from tacit.devices.executorch import open_model

    with silenced():  # it announces its threads
        infer, _, _ = open_model(str(path), 1)
    return lambda image: infer([image])[0]


def _make_pte_default(work: Work, form: str, path: Path) -> str:
    """XNNPACKQuantizer and to_edge_transform_and_lower as ExecuTorch's XNNPACK guide has them."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer as xnnpack
    from executorch.exir import to_edge_transform_and_lower
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    example = (torch.from_numpy(work.test[:1]),)
    model = work.model
    if form != "float32":
        config = xnnpack.get_symmetric_quantization_config(is_per_channel=True, is_dynamic=form == "dynamic_int8")
        quantizer = xnnpack.XNNPACKQuantizer().set_global(config)
        prepared = prepare_pt2e(torch.export.export(model, example).module(), quantizer)
        for image in work.calibration:
            prepared(torch.from_numpy(image[None]))
        model = convert_pt2e(prepared)
    program = to_edge_transform_and_lower(torch.export.export(model, example), partitioner=[XnnpackPartitioner()])
    path.write_bytes(program.to_executorch().buffer)
    return ""


PEERS: Mapping[str, Peer] = {
    "onnx": Peer(name="onnxruntime-default", make=_make_onnx_default, open=_open_onnx),
    "tflite": Peer(name="ai-edge-quantizer-default", make=_make_tflite_default, open=_open_tflite),
    "pte": Peer(name="executorch-default", make=_make_pte_default, open=_open_pte),
}


def main() -> None:
    """Runs the cases, prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--cases", nargs="+")
    parser.add_argument("--norms", action="store_true")
    parser.add_argument("--digits", action="store_true")
    parser.add_argument("--digits-here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rounds = 60 if options.quick else 200
    every = [f"{model}-{target}" for target in PEERS for model in (QUICK if options.quick else MODELS)]
    with tempfile.TemporaryDirectory() as folder:
        if options.digits:
            started_s = time.perf_counter()
            subprocess.run([sys.executable, __file__, "--digits-here"], check=True)
            _say(f"{time.perf_counter() - started_s:.1f} s")
            return
        if options.digits_here:
            _export_digits(Path(folder))
            return
        if options.norms:
            _compare_norms(Path(folder), rounds)
            return
        cases = {}
        for case in options.cases or every:
            model, target = case.rsplit("-", 1)
            cases[case] = _measure(model, target, Path(folder), rounds)
            _print(case, cases[case])
    if options.json:
        versions = {name: version(name) for name in _PACKAGES} | {"python": sys.version}
        machine = {"system": platform.platform(), "cpus": os.cpu_count()}
        content = {"benchmark": "export", "machine": machine, "versions": versions, "cases": cases}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


def _measure(model: str, target: str, folder: Path, rounds: int) -> dict[str, object]:
    work, peer = trained(model), PEERS[target]
    forms: dict[str, dict[str, object]] = {}
    for form in FORMS:
        ours, theirs = folder / f"{model}-{form}.{target}", folder / f"{model}-{form}-peer.{target}"
        example = (torch.from_numpy(work.test[:1]),)
        calibration = (work.calibration,) if form == "static_int8" else None
        write_form(work.model, example, ours, target=target, form=form, calibration=calibration)
        with silenced():
            remark = peer.make(work, form, theirs)
        runs = [peer.open(ours), peer.open(theirs)]
        times = interleaved(runs, work.test[:1], rounds)
        ours_us, theirs_us = np.quantile(times, 0.1, axis=1)
        forms[form] = {
            "tacit": round(float(ours_us), 2),
            "peer": round(float(theirs_us), 2),
            "ratio": round(float(theirs_us / ours_us), 3),
            "spread": [round(float(share), 3) for share in np.quantile(times[1] / times[0], (0.25, 0.75))],
            "accuracy": {"tacit": accuracy(runs[0], work), "peer": accuracy(runs[1], work), "torch": _of_torch(work)},
            "bytes": {"tacit": ours.stat().st_size, "peer": theirs.stat().st_size},
            "remark": remark,
        }
    first = forms[FORMS[0]]
    values = {"tacit": first["tacit"], "peers": {peer.name: first["peer"]}, "unit": "us"}
    return {**values, "ratio": {peer.name: first["ratio"]}, "forms": forms}


def interleaved(runs: list[Infer], image: Images, rounds: int) -> np.ndarray:
    """Microseconds a call, (runs, rounds): blocks A B, B A, A B ..., each long against the clock."""
    counts = []
    for infer in runs:
        fastest = min(_timed(infer, image, 1) for _ in range(50))
        counts.append(max(1, int(BLOCK_S / fastest)))
    times = np.empty((len(runs), rounds))
    for turn in range(rounds):
        order = range(len(runs)) if turn % 2 else reversed(range(len(runs)))
        for index in order:
            runs[index](image)
            times[index, turn] = 1e6 * _timed(runs[index], image, counts[index]) / counts[index]
    return times


def _timed(infer: Infer, image: Images, count: int) -> float:
    start_s = time.perf_counter()
    for _ in range(count):
        infer(image)
    return time.perf_counter() - start_s


def accuracy(infer: Infer, work: Work) -> float:
    """Share of the test images that are given their digit."""
    answers = np.array([infer(image[None]).argmax() for image in work.test])
    return round(float((answers == work.answers).mean()), 4)


def _of_torch(work: Work) -> float:
    with torch.no_grad():
        return accuracy(lambda image: work.model(torch.from_numpy(image)).numpy(), work)


@functools.cache
def trained(family: str) -> Work:
    """A family of `federated/models.py` after a few epochs, without privacy: it is latency that is measured."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = _stretched(torch.from_numpy((digits.images / 8 - 1).astype(np.float32)), MODELS[family])
    answers = torch.from_numpy(digits.target)
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(images)))
    images, answers = images[order], answers[order]
    torch.manual_seed(0)
    model = build_family({"family": family}, shape=MODELS[family], outputs=10)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    seen = slice(TEST + CALIBRATION, None)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(images[seen])).split(32):
            optimizer.zero_grad()
            F.cross_entropy(model(images[seen][batch]), answers[seen][batch]).backward()
            optimizer.step()
    calibration = images[TEST : TEST + CALIBRATION].numpy()
    return Work(model=model.eval(), calibration=calibration, test=images[:TEST].numpy(), answers=answers[:TEST].numpy())


def _stretched(images: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Images (n, 8, 8) in another shape: as an image, a sequence whose channels are rows, or a row of pixels."""
    if len(shape) == 1:
        return F.interpolate(images.flatten(1)[:, None], size=shape[0], mode="linear")[:, 0].contiguous()
    wide = F.interpolate(images[:, None], size=shape[-2:], mode="bilinear")
    return wide.expand(-1, shape[0], -1, -1).contiguous() if len(shape) == 3 else wide[:, 0].contiguous()


def _export_digits(folder: Path) -> None:
    from sklearn.datasets import load_digits

    images = (load_digits().images[:, None] / 8 - 1).astype(np.float32)
    model = build_family({"family": "cnn"}, shape=(1, 8, 8), outputs=10).eval()
    for target in ("onnx", "tflite"):
        artifact = export(model, (torch.zeros(1, 1, 8, 8),), folder / f"digits.{target}", target=target)
        (found,) = artifact.check(model, [images], answers="classes")
        _say(f"{target}: {found.top1_agreement:.1%} of {found.n} agree, off by {found.max_abs:.1e} at most")


def _compare_norms(folder: Path, rounds: int) -> None:
    _say("| model | form | opset 21 | " + " | ".join(SPELLINGS) + " |")
    _say("|---" * (3 + len(SPELLINGS)) + "|")
    for family in ("cnn", "ds-cnn", "resnet-8"):
        work = trained(family)
        example = (torch.from_numpy(work.test[:1]),)
        for form in ("static_int8", "float32"):
            runs = []
            for norms, opset in (("exporter", 21), *((spelling, 18) for spelling in SPELLINGS)):
                plain, path = folder / "plain.onnx", folder / "form.onnx"
                export_onnx(work.model, example, plain, norms=norms, opset=opset)
                if form == "static_int8":
                    calibration = (work.calibration,)
                    made_of = Source(model=work.model, examples=example, exported=plain, calibration=calibration)
                    static_int8(made_of, path)
                runs.append(_open_onnx(path if form == "static_int8" else plain))
            times = np.quantile(interleaved(runs, work.test[:1], rounds), 0.1, axis=1)
            _say(f"| {family} | {form} | " + " | ".join(f"{time_us:.1f}" for time_us in times) + " |")


def _print(case: str, measured: Mapping[str, object]) -> None:
    for form, figures in measured["forms"].items():
        right = figures["accuracy"]
        _say(
            f"{case:18} {form:13} {figures['tacit']:8.1f} us  peer {figures['peer']:8.1f} us  "
            f"ratio {figures['ratio']:5.2f} ({figures['spread'][0]:.2f}-{figures['spread'][1]:.2f})  accuracy "
            f"{right['tacit']:.1%} peer {right['peer']:.1%} torch {right['torch']:.1%}  bytes "
            f"{figures['bytes']['tacit']:,} peer {figures['bytes']['peer']:,}  {figures['remark']}"
        )


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201  # its purpose


if __name__ == "__main__":
    main()
