"""What the flags of a measurement mean, in a few words; `tacit.devices.judgement` says how each is raised."""

from collections.abc import Iterable
from typing import Final

__all__ = ["FLAGS", "explained"]

FLAGS: Final = {
    "noisy": "runs spread by more than 10 %",
    "drift": "the median moved by more than 5 % while it was measured",
    "averaged": "runs too short for the clock were timed in groups",
    "few-samples": "too few runs for a p90",
    "steal": "other virtual machines took more than 2 % of the processor",
    "contended": "other programs had the processor for more than 2 % of the time",
    "throttled": "the device slowed itself down",
    "incomplete": "the page was closed early",
    "slowed": "the browser became more than 10 % slower under load",
    "departs": "it is right much less often here than where it was judged",
    "governor": "the clock may change: its governor is not performance",
}


def explained(flags: Iterable[str]) -> str:
    """Returns what these flags mean, each once.

    Example:
        >>> explained(["few-samples", "few-samples"])
        'few-samples: too few runs for a p90'
    """
    raised = set(flags)
    return "; ".join(f"{flag}: {meaning}" for flag, meaning in FLAGS.items() if flag in raised)
