"""Runs pytest in copies of the repository, in forked children of one process that has imported what is not ours.

Used by test_mutations.py, because importing torch and Flower anew would take longer than most tests that notice a bug.
Reads from stdin a JSON line for each job, {"name", "folder", "tests"}; prints one for each as it ends, {"name", "code",
"text", "wall_s"}.
"""

import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path

AT_ONCE = 2
# Whatever tests and product import from elsewhere; nothing of tacit, which each child takes from its own copy.
FOREIGN = (
    "cryptography.hazmat.primitives.ciphers",
    "dp_accounting.pld",
    "dp_accounting.rdp",
    "flwr.clientapp",
    "flwr.serverapp",
    "flwr.serverapp.strategy",
    "opacus.accountants",
    "opacus.grad_sample",
    "pydantic",
    "pytest",
    "safetensors.numpy",
    "scipy.stats",
    "sklearn.datasets",
    "sklearn.model_selection",
    "torch",
)
OPTIONS = ("-x", "-q", "-p", "no:cacheprovider", "--tb=short", "-m", "not soak", "--hypothesis-seed=0")


def start(job: dict[str, object]) -> int:
    """Forks a child for a job; its output goes to a file beside the copy. Returns its process id."""
    folder = Path(str(job["folder"]))
    child = os.fork()
    if child:
        return child
    output = os.open(folder.with_suffix(".txt"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.chdir(folder)
    sys.path.insert(0, str(folder / ".src"))
    os.environ["PYTHONPATH"] = str(folder / ".src")  # for processes that tests start
    import pytest

    code = 3
    try:
        code = int(pytest.main([*OPTIONS, *(f"tests/{test}" for test in job["tests"])]))
        ours = sys.modules.get("tacit")
        if ours is not None and not str(ours.__file__).startswith(str(folder)):
            code = 3  # the copy was not what was tested
    except BaseException:  # noqa: BLE001  # a child must not go on as its parent
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    """Runs all jobs, a few at once."""
    for name in FOREIGN:
        importlib.import_module(name)
    if "tacit" in sys.modules:
        raise RuntimeError("expected no module of tacit before a fork, got some; take what imports them out of FOREIGN")
    waiting = [json.loads(line) for line in sys.stdin]
    running: dict[int, tuple[dict[str, object], float]] = {}
    while waiting or running:
        while waiting and len(running) < AT_ONCE:
            job = waiting.pop(0)
            running[start(job)] = (job, time.monotonic())
        child, status = os.wait()
        job, started = running.pop(child)
        text = Path(str(job["folder"])).with_suffix(".txt").read_text(errors="replace")
        result = {"name": job["name"], "code": os.waitstatus_to_exitcode(status), "text": text}
        print(json.dumps({**result, "wall_s": time.monotonic() - started}), flush=True)  # noqa: T201  # its answer


if __name__ == "__main__":
    main()
