"""What a deployed owner runs for each message, in place of `flwr-clientapp`: the app that is installed here.

Flower's own unpacks the app that the server sends, puts its folder first on the import path and runs it: whoever holds
the server could send another, and an owner's policy would be code that nobody asks. (`--trusted-entities` does not
help: a SuperLink passes on signatures of apps from Flower's hub only.) Here nothing that was sent is unpacked or
imported.

    python -P -m tacit.edge.owner_process ...     # with the arguments of flwr-clientapp
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from flwr.clientapp import ClientApp

__all__ = ["main", "pin_app"]

_ROOT = Path(__file__).resolve().parent


def pin_app(runtime: ModuleType) -> None:
    """Makes Flower's client process use the app installed here, whichever it is sent.

    Args:
        runtime: `flwr.supernode.runtime.run_clientapp`.

    Raises:
        AttributeError: a Flower that does this by other names; then nothing is run.

    Example:
        >>> from types import ModuleType
        >>> pin_app(ModuleType("another"))
        Traceback (most recent call last):
            ...
        AttributeError: expected install_from_fab in Flower's client process, got none; install a Flower below 1.44
    """
    pinned = {
        "install_from_fab": lambda *_, **__: None,
        "get_project_dir": lambda *_, **__: _ROOT,
        "get_load_client_app_fn": lambda *_, **__: _installed_app,
        "install_app_dependencies": _refuse_to_install,
    }
    for name, replacement in pinned.items():
        if not hasattr(runtime, name):
            raise AttributeError(
                f"expected {name} in Flower's client process, got none; install a Flower below 1.44", name=name
            )
        setattr(runtime, name, replacement)


def main() -> None:
    """Entry point."""
    from flwr.supernode.cli.flwr_clientapp import flwr_clientapp
    from flwr.supernode.runtime import run_clientapp

    pin_app(run_clientapp)
    flwr_clientapp()


def _installed_app(*_: object) -> ClientApp:
    from tacit.edge.flower_app import client_app

    return client_app


def _refuse_to_install(*_: object, **__: object) -> None:
    raise PermissionError("expected the packages that are installed here, got a request to install others")


if __name__ == "__main__":
    main()
