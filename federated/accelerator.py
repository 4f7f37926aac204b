"""Which device of this machine computes gradients."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

__all__ = ["Accelerator", "AcceleratorAbsent", "best_accelerator", "check_accelerator"]

Accelerator = Literal["cpu", "cuda", "mps"]
# Where Linux shows a graphics processor that torch may use: NVIDIA's, AMD's, Windows' from its Linux subsystem.
_SIGNS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")


class AcceleratorAbsent(OSError):
    """A recipe names a device that this machine, or its torch, does not have."""


def best_accelerator() -> Accelerator:
    """CUDA's device where there is one, else Apple's, else the processor.

    >>> best_accelerator() in ("cpu", "cuda", "mps")
    True
    """
    if sys.platform == "linux" and not any(Path(sign).exists() for sign in _SIGNS):
        return "cpu"  # without asking torch, whose import takes a second
    return next((name for name in ("cuda", "mps") if _is_there(name)), "cpu")


def check_accelerator(name: Accelerator) -> None:
    """Nothing, where the device is there.

    Raises:
        AcceleratorAbsent: it is not.

    >>> check_accelerator("cpu")
    """
    if name != "cpu" and not _is_there(name):
        raise AcceleratorAbsent(
            f"expected an accelerator that torch finds here, got federated.accelerator={name!r}; set it to 'auto' or "
            "'cpu', or run where there is one"
        )


def _is_there(name: Literal["cuda", "mps"]) -> bool:
    import torch

    return torch.cuda.is_available() if name == "cuda" else torch.backends.mps.is_available()
