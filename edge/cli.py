"""The command line: one envelope, one line an error, one exit code a cause. Heavy imports happen inside commands."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, NoReturn

from cyclopts import App, CycloptsError, Group, Parameter

from tacit.edge import cli_audit, cli_budget, cli_deploy, cli_measure, cli_setup, cli_stages
from tacit.edge.cli_output import Outcome

__all__ = ["app", "main"]

Format = Literal["text", "json"]

# By name, because importing the classes would import torch. First match along the exception's ancestry.
_CODES = {
    "CycloptsError": 2,
    "RecipeInvalid": 2,
    "PolicyInvalid": 2,
    "FolderMismatch": 2,
    "KeyPresent": 2,
    "DataProblem": 3,
    "RecipeRefused": 4,
    "PrivacyRefused": 4,
    "AuditFailed": 4,
    "ArithmeticError": 4,
    "FederationFailed": 5,
    "TooFew": 5,
    "RepliesLost": 5,
    "WorkerDied": 7,
    "FolderHeld": 5,
    "ChainHeld": 5,
    "ChainDamaged": 6,
    "FileDamaged": 6,
    "ArtifactRefused": 6,
    "RequestRefused": 6,
    "FormRefused": 6,
    "Departure": 6,
    "ModuleNotFoundError": 7,
    "MemoryError": 7,
    "OSError": 7,
}
_BUG = 1

app = App(
    name="tacit",
    help="Train on data that never leaves its owners, shrink the model, ship it with one privacy guarantee.",
    version=lambda: _version(),
    help_format="plaintext",
    suppress_keyboard_interrupt=False,  # it would leave in silence; we say how to go on
)
app.meta.group_parameters = Group("Global options", sort_key=99)
for _commands in (cli_stages, cli_measure, cli_setup, cli_budget, cli_audit, cli_deploy):
    _commands.register(app)


class _Terminated(BaseException):
    """SIGTERM arrived."""


@app.meta.default
def _launch(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    output_format: Annotated[Format, Parameter(name="--format")] = "text",
    debug: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Runs a command and turns whatever comes of it into an exit code.

    Args:
        tokens: The command and its arguments.
        output_format: What stdout carries: text, or one JSON envelope.
        debug: Print tracebacks.
    """
    try:
        outcome = app(tokens, exit_on_error=False, print_error=False, result_action="return_value")
    except (KeyboardInterrupt, _Terminated) as interruption:
        code = 130 if isinstance(interruption, KeyboardInterrupt) else 143
        return _fail(code, "interrupted; nothing that was finished is lost", _resume_hint(tokens), output_format)
    except BrokenPipeError:
        raise
    except Exception as error:  # noqa: BLE001  # the last door: every cause gets its line and code
        if debug:
            traceback.print_exc()
        return _explain(error, output_format)
    if not isinstance(outcome, Outcome):
        return 0  # help or version, already printed
    if output_format == "json":
        _print_envelope(outcome.code, outcome.data, None)
    elif outcome.text:
        sys.stdout.write(outcome.text.rstrip("\n") + "\n")
    return outcome.code


def main() -> NoReturn:
    """Entry point of the `tacit` command."""
    _ready_streams()
    signal.signal(signal.SIGTERM, _on_terminate)
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    try:
        code = app.meta(sys.argv[1:], exit_on_error=False, print_error=False, result_action="return_value")
        sys.stdout.flush()
    except CycloptsError as error:
        code = _explain(error, "json" if "json" in sys.argv[1:] else "text")
    except BrokenPipeError:  # whoever read stdout has gone; that is fine
        code = _discard_stdout(0)
    except SystemExit as leaving:  # rich, which prints help, leaves with 1 when its reader has gone
        code = _discard_stdout(0) if isinstance(leaving.__context__, BrokenPipeError) else leaving.code
    except OSError as error:  # stdout goes to a file, and its disk is full
        code = _discard_stdout(_explain(error, "text"))
    sys.exit(code if isinstance(code, int) else 0)


def _ready_streams() -> None:
    """Makes stdout and stderr take whatever we print.

    Where one is closed, a file that we open would get its number and receive what is printed; and a terminal that does
    not know ε shall show a question mark, not end a run.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115  open for as long as the process lives
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _discard_stdout(code: int) -> int:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def _explain(error: Exception, output_format: Format) -> int:
    names = [kind.__name__ for kind in type(error).__mro__]
    code = next((_CODES[name] for name in names if name in _CODES), _BUG)
    if code == _BUG:
        log = _write_bug(error)
        return _fail(
            code, f"a bug of ours: {type(error).__name__}: {_first_line(error)}", f"report it with {log}", output_format
        )
    message = _first_line(error)
    if isinstance(error, ModuleNotFoundError) and error.name:
        message = (
            f"expected the package {error.name!r}, got none; install the extra that needs it: pip install 'tacit[all]'"
        )
    elif isinstance(error, OSError):
        message = _describe_os_error(error)
    what, _, hint = message.partition("; ")
    return _fail(code, what, hint, output_format, where=str(getattr(error, "where", "")), kind=names[0])


def _fail(
    code: int, message: str, hint: str, output_format: Format, *, where: str = "", kind: str = "Interrupted"
) -> int:
    if output_format == "json":
        _print_envelope(code, None, {"id": kind, "message": message, "where": where, "hint": hint})
    place = f"{where}: " if where else ""
    sys.stderr.write(f"error: {place}{message}" + (f"; {hint}" if hint else "") + "\n")
    return code


def _print_envelope(code: int, data: Mapping[str, object] | None, error: Mapping[str, str] | None) -> None:
    status = "ok" if code == 0 else "partial" if code == 8 else "error"
    envelope = {"schema_version": 1, "status": status, "code": code, "data": data, "error": error}
    sys.stdout.write(json.dumps(envelope, indent=1) + "\n")


def _describe_os_error(error: OSError) -> str:
    import errno

    hints = {
        errno.ENOSPC: "free some disk space, then run again with --resume",
        errno.EACCES: "give this user write permission, or name another folder",
        errno.EROFS: "name a folder on a writable disk",
        errno.EDQUOT: "free some of your quota, then run again with --resume",
    }
    place = f"{error.filename}: " if isinstance(error.filename, str) else ""
    if error.errno is None:  # one of ours, which says what to do
        return _first_line(error)
    reason = error.strerror or _first_line(error)
    return f"{place}{reason[:1].lower()}{reason[1:]}; {hints.get(error.errno, 'see tacit doctor')}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _resume_hint(tokens: tuple[str, ...]) -> str:
    import shlex

    if not tokens or tokens[0] != "run":
        return "run the same command again"
    again = list(tokens) if "--resume" in tokens else [*tokens, "--resume"]
    return f"continue with: tacit {shlex.join(again)}"


def _write_bug(error: Exception) -> Path:
    descriptor, name = tempfile.mkstemp(prefix="tacit-", suffix=".log")
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write("".join(traceback.format_exception(error)))
    return Path(name)


def _on_terminate(number: int, frame: object) -> NoReturn:
    raise _Terminated


def _version() -> str:
    from importlib.metadata import version

    return version("tacit")
