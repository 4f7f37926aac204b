"""TensorFlow Lite Micro on this computer: the adapter that ``agent.py`` opens models with, and what a model needs.

In the sandboxed child this file stands alone: the standard library, numpy and the ``tflite-micro`` wheel, Python 3.9.
The wheel holds the kernels that microcontrollers run, so what it refuses they refuse.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

import numpy as np

if TYPE_CHECKING:
    from tacit.devices.device import Artifact
    from tacit.devices.parity_only import ParityOnly

NOT_TIMED = "not measured: a host's time says nothing of a microcontroller"
Ports = List[Tuple[Any, float, int]]

_SMALLEST_ARENA, _LARGEST_ARENA, _ALIGNMENT = 1 << 20, 1 << 30, 16
# Where the names of the resolver's methods are not simply those of the operators in capitals.
_METHODS = {
    "BATCH_MATMUL": "AddBatchMatMul",
    "CUMSUM": "AddCumSum",
    "PADV2": "AddPadV2",
    "UNIDIRECTIONAL_SEQUENCE_LSTM": "AddUnidirectionalSequenceLSTM",
}
_TOTAL = re.compile(r"Arena allocation total (\d+) bytes")
_TAIL = re.compile(r"Arena allocation tail (\d+) bytes")
_CRASHED = "it crashed while it was loaded"
_TOO_SMALL = re.compile(r"missing: \d|Too many buffers|" + _CRASHED)
# Python's own words about an error in the process that tries an arena, and what only repeats that it failed.
_NOISE = re.compile(
    r"^(Failed to (get registration|initialize|allocate)|Traceback|File |Exception |return |self\.|\^+$|RuntimeError)"
)


def open_model(path: str, threads: int) -> Tuple[Callable[[List[np.ndarray]], List[np.ndarray]], Ports, Ports]:
    """Load a model for ``agent.py``; there is one thread, as on a microcontroller."""
    del threads
    interpreter, content = _loaded(path)
    inputs, outputs = _ports(content)
    sources = [_port(interpreter.get_input_details(place)) for place in range(inputs)]
    targets = [_port(interpreter.get_output_details(place)) for place in range(outputs)]

    def infer(feeds: List[np.ndarray]) -> List[np.ndarray]:
        for place, feed in enumerate(feeds):
            interpreter.set_input(feed, place)
        interpreter.invoke()
        return [interpreter.get_output(place) for place in range(outputs)]

    return infer, sources, targets


def _loaded(path: str) -> Tuple[Any, bytes]:
    """An interpreter with an arena that is large enough, and the content of its file."""
    from tflite_micro import runtime

    content = Path(path).read_bytes()
    arena = _SMALLEST_ARENA
    while True:
        missing = _missing(content, arena)
        if missing is None:
            return runtime.Interpreter.from_bytes(content, arena_size=arena), content
        if not _TOO_SMALL.search(missing) or arena >= _LARGEST_ARENA:
            raise ValueError(f"TensorFlow Lite Micro does not run it: {_reason(missing)}")
        arena *= 4


def _missing(content: bytes, arena: int) -> Optional[str]:
    """What is said to an arena of this size; None if a model loads with it.

    Found out in a process of its own, for in too small an arena some kernels take addresses that they were not given.
    """
    with tempfile.TemporaryFile() as said:
        child = os.fork()
        if child == 0:
            os.dup2(said.fileno(), 2)
            loads = False
            try:
                from tflite_micro import runtime

                loads = runtime.Interpreter.from_bytes(content, arena_size=arena) is not None
            finally:
                os._exit(0 if loads else 1)
        _, status = os.waitpid(child, 0)
        said.seek(0)
        text = said.read().decode("utf-8", "replace")
    if os.WIFSIGNALED(status):
        return text + _CRASHED
    return None if os.WEXITSTATUS(status) == 0 else text


def _least_arena(content: bytes, used: int) -> int:
    """The least arena with which a model loads: planning takes some that is free again afterwards."""
    enough, more = used, _ALIGNMENT
    while _missing(content, enough) is not None:
        enough, more = enough + more, 2 * more
    too_little = used - _ALIGNMENT
    while enough - too_little > _ALIGNMENT:
        middle = too_little + (enough - too_little) // (2 * _ALIGNMENT) * _ALIGNMENT
        if _missing(content, middle) is None:
            enough = middle
        else:
            too_little = middle
    return enough


def _ports(content: bytes) -> Tuple[int, int]:
    graph = _schema().Model.GetRootAsModel(content, 0).Subgraphs(0)
    return graph.InputsLength(), graph.OutputsLength()


def _port(details: Dict[str, Any]) -> Tuple[Any, float, int]:
    quantisation = details["quantization_parameters"]
    scales, zeros = quantisation["scales"], quantisation["zero_points"]
    whole = np.dtype(details["dtype"]).kind in "iu" and len(scales) == 1 and scales[0] > 0
    return np.dtype(details["dtype"]), float(scales[0]) if whole else 0.0, int(zeros[0]) if whole else 0


def _schema() -> Any:
    from tflite_micro.tensorflow.lite.micro.python import schema_py_generated

    return schema_py_generated


def _kinds(content: bytes) -> List[str]:
    schema = _schema()
    names = {value: name for name, value in vars(schema.BuiltinOperator).items() if isinstance(value, int)}
    model = schema.Model.GetRootAsModel(content, 0)
    codes = [model.OperatorCodes(number) for number in range(model.OperatorCodesLength())]
    graphs = [model.Subgraphs(number) for number in range(model.SubgraphsLength())]
    used = {graph.Operators(number).OpcodeIndex() for graph in graphs for number in range(graph.OperatorsLength())}
    return sorted({names[max(codes[n].BuiltinCode(), codes[n].DeprecatedBuiltinCode())] for n in used})


def method_of(kind: str) -> str:
    """The method of ``MicroMutableOpResolver`` that registers an operator.

    >>> method_of("CONV_2D"), method_of("BATCH_MATMUL")
    ('AddConv2D', 'AddBatchMatMul')
    """
    parts = [part if part[:1].isdigit() else part.capitalize() for part in kind.split("_")]
    return _METHODS.get(kind, "Add" + "".join(parts))


def needs(path: str) -> Dict[str, Any]:
    """Run a model once on zeros and say what it takes; in the sandboxed child only."""
    interpreter, content = _loaded(path)
    for place in range(_ports(content)[0]):
        details = interpreter.get_input_details(place)
        interpreter.set_input(np.zeros(details["shape"], details["dtype"]), place)
    with _Captured() as said:
        try:
            interpreter.invoke()
        except RuntimeError:
            raise ValueError(f"TensorFlow Lite Micro does not run it: {_reason(said.text())}") from None
        interpreter.print_allocations()
        total, tail = _TOTAL.search(said.text()), _TAIL.search(said.text())
    if total is None or tail is None:
        raise ValueError("expected the allocations of the arena, got none; install the pinned tflite-micro")
    return {
        "arena_bytes": _least_arena(content, -(-int(total[1]) // _ALIGNMENT) * _ALIGNMENT),
        "head_bytes": int(total[1]) - int(tail[1]),
        "persistent_bytes": int(tail[1]),
        "bytes": len(content),
        "operators": _kinds(content),
    }


class _Captured:
    """What C++ writes to stderr meanwhile, for the reasons are nowhere else."""

    def __enter__(self) -> "_Captured":
        self._file = tempfile.TemporaryFile()
        self._saved = os.dup(2)
        os.dup2(self._file.fileno(), 2)
        return self

    def text(self) -> str:
        self._file.seek(0)
        return self._file.read().decode("utf-8", "replace")

    def __exit__(self, *error: object) -> None:
        os.dup2(self._saved, 2)
        os.close(self._saved)
        self._file.close()


def _reason(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    telling = [line for line in lines if not _NOISE.match(line)] or lines
    return "; ".join(telling[:2])[:300] or "it says nothing"


def micro_needs(path: Union[Path, str]) -> Dict[str, Any]:
    """What a model takes on a microcontroller, found out in the sandbox after its structure has been examined.

    Args:
        path: A TFLite file.

    Returns:
        ``arena_bytes`` is the least arena, a multiple of 16, with which the model loads on this computer. Of it,
        ``head_bytes`` hold activations, the same on every processor, and ``persistent_bytes`` structures, which 64-bit
        pointers make larger here than on a microcontroller, at most twice as large. ``bytes`` of the file;
        ``operators``, each once.

    Raises:
        ArtifactRefused: The file's structure is not acceptable, or TensorFlow Lite Micro does not run it; says why.
        FileNotFoundError: There is no such file.
        ModuleNotFoundError: The wheel is not installed.
    """
    from tacit.devices.formats import examine
    from tacit.devices.runtime import installed_version
    from tacit.devices.sandbox import ArtifactRefused, Limits, run_limited

    if examine(Path(path)) != "litert":
        raise ArtifactRefused(f"expected a .tflite file, got path={Path(path).name!r}; export the target micro")
    installed_version("micro")
    # -P keeps this folder off the child's sys.path, where statistics.py would shadow the standard library's.
    command = [sys.executable, "-P", str(Path(__file__).resolve()), str(Path(path).resolve())]
    completed = run_limited(command, stdin=b"", limits=Limits())
    lines = completed.stdout.decode("utf-8", "replace").strip().splitlines()
    answer = json.loads(lines[-1]) if completed.returncode == 0 and lines else {}
    if "error" in answer or not answer:
        said = answer.get("error") or completed.stderr.decode("utf-8", "replace").strip()[-300:]
        raise ArtifactRefused("".join(letter for letter in str(said) if letter.isprintable()))
    return _checked(answer)


def micro_device() -> ParityOnly:
    """The device "micro": the kernels of TensorFlow Lite Micro on this computer, for parity and never for a latency.

    Raises:
        ModuleNotFoundError: The wheel is not installed.
    """
    from tacit.devices.local import LocalDevice
    from tacit.devices.parity_only import ParityOnly
    from tacit.devices.runtime import installed_version

    facts = {"micro": installed_version("micro"), "cpu": "TensorFlow Lite Micro's kernels on this computer"}
    return ParityOnly(LocalDevice("micro"), why=NOT_TIMED, runtimes=("micro",), facts=facts)


def measure_micro(artifacts: Sequence[Artifact], inputs: Sequence[np.ndarray], *, outputs: int = 1) -> Dict[str, Any]:
    """What can be known of a microcontroller without one: the same answers or not, operators, the exact arena.

    Args:
        artifacts: TFLite files, no two of one name.
        inputs: All inputs of the models, each ``(n, *shape)``, channel first; the first 64 of each are used.
        outputs: How many outputs the models have.

    Returns:
        As of ``parity_only.measure_parity``, and of each artifact what ``micro_needs`` says. There is no latency.

    Raises:
        ModuleNotFoundError: The wheel is not installed.
        ValueError: Names repeat, or there are no inputs.
    """
    from tacit.devices.parity_only import measure_parity

    with micro_device() as device:
        result = measure_parity(device, artifacts, inputs, outputs=outputs)
    for artifact in artifacts:
        if artifact.name in result["artifacts"]:
            result["artifacts"][artifact.name].update(micro_needs(artifact.path))
    return result


def _checked(answer: Dict[str, Any]) -> Dict[str, Any]:
    """A child that ran a stranger's file is not believed."""
    from tacit.devices.sandbox import ArtifactRefused

    sizes = [answer.get(name) for name in ("arena_bytes", "head_bytes", "persistent_bytes", "bytes")]
    kinds = answer.get("operators")
    named = isinstance(kinds, list) and all(
        isinstance(kind, str) and re.fullmatch(r"[A-Z0-9_]{1,64}", kind) for kind in kinds
    )
    if not named or not all(isinstance(size, int) and 0 <= size < 1 << 40 for size in sizes):
        raise ArtifactRefused(f"expected sizes and operators of the model, got {str(answer)[:200]!r}; export it again")
    return answer


def main() -> None:
    """Print what the model named on the command line needs, as JSON."""
    try:
        answer = needs(sys.argv[1])
    except ValueError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
