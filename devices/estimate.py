"""A labelled estimate of latency where nothing was run: always a range, never a number.

Time = multiply-accumulates x cycles each + elements x cycles each + operators x cycles each, over the clock, on one
core. The cycles are ranges by processor and kind of number. Where they come from:

- Cortex-M and int8: MLPerf Tiny results v0.5 to v1.3, closed division, from the best (X-CUBE-AI, Plumerai, Bosch
  HALE) to the reference with TensorFlow Lite Micro. ``tests/test_fit.py`` holds 40 of them and checks that each falls
  into its range. All are of optimised kernels: the plain ones take ten times as long, or more.
- Cortex-M4 and M7, float32: the lower ends from Bosch's float submissions to v1.2. TensorFlow Lite Micro runs floats in
  plain kernels; the upper ends are not checked against anything published, nor is float32 without a float unit.
- ESP32-S3, int8: person_detect and the table of kernels in Espressif's READMEs, with ESP-NN. Float32 is unchecked.
- Arm with NEON, float32: the peak of the cores, and MobileNets on Raspberry Pis in XNNPACK's README of 2020. Whole
  numbers there, and all of "dotprod" and "i8mm": from the peak of the cores down to what is usual of small models,
  which is unchecked.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tacit.devices.formats import ask_reader
from tacit.devices.profile import Isa, Profile
from tacit.devices.sandbox import ArtifactRefused

__all__ = ["NOTHING_WAS_RUN", "Estimate", "Work", "estimate", "work_of"]

NOTHING_WAS_RUN = "estimate, nothing was run"
Range = tuple[float, float]

_CYCLES_PER_MAC: Mapping[Isa, Mapping[str, Range]] = MappingProxyType(
    {
        "armv6m": {"int8": (7, 20), "int16": (7, 60), "float32": (40, 200)},
        "armv7em": {"int8": (1.2, 10), "int16": (1.2, 30), "float32": (5, 60)},
        "armv7em-m7": {"int8": (0.8, 6), "int16": (0.8, 18), "float32": (2.5, 40)},
        "xtensa-pie": {"int8": (1, 8), "int16": (1, 40), "float32": (8, 80)},
        "neon": {"int8": (0.12, 2.0), "hybrid": (0.12, 2.5), "float32": (0.25, 2.5), "int16": (1, 40)},
        "dotprod": {"int8": (0.03, 1.0), "hybrid": (0.03, 1.5), "float32": (0.12, 1.5), "int16": (1, 40)},
        "i8mm": {"int8": (0.015, 1.0), "hybrid": (0.015, 1.2), "float32": (0.06, 1.2), "int16": (1, 40)},
    }
)
# What an element of other operators costs (ESP-NN's README: an int8 addition 44 cycles, 193 with plain kernels), and an
# operator as such.
_CYCLES_PER_ELEMENT: Mapping[str, Range] = MappingProxyType({"mcu": (5, 200), "linux": (0.1, 20)})
_CYCLES_PER_OPERATOR: Mapping[str, Range] = MappingProxyType({"mcu": (500, 10_000), "linux": (500, 20_000)})
# A browser against the same phone's native runtime: TOSEM 2025, doi 10.1145/3688843, 15.8 times in the mean; on a
# computer we found 4 to 8.
_BROWSER: Range = (3, 17)
_MAX_COUNT = 1 << 62


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one run of a model computes.

    Attributes:
        macs: Multiply-accumulates by kind of number: "float32", "int8", "int16", "hybrid".
        elements: That the other operators write.
        operators: How many run.
        whole: Whether each of them could be counted.
    """

    macs: Mapping[str, int]
    elements: int
    operators: int
    whole: bool


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A range in which the latency of one inference should lie; nothing was run."""

    low_ms: float
    high_ms: float
    basis: str

    def __str__(self) -> str:
        """The range in words, always with its label."""
        return f"{_short(self.low_ms)} to {_short(self.high_ms)} ms ({NOTHING_WAS_RUN})"


def work_of(path: Path) -> Work:
    """Count what one run of a TFLite file computes, in the sandbox and without running it.

    Raises:
        FileNotFoundError: There is no such file.
        ArtifactRefused: The file is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"expected a model file, got path={str(path)!r}; check the path")
    answer = ask_reader("tflite_work.py", path)
    macs: dict[str, Any] = answer.get("macs", {})
    counts: list[Any] = [*macs.values(), answer.get("elements"), answer.get("operators")]
    named = set(macs) <= {"float32", "int8", "int16", "hybrid"}
    if not named or not all(type(count) is int and 0 <= count < _MAX_COUNT for count in counts):
        raise ArtifactRefused(f"path={path.name!r}: expected sizes that a model can have; export it again")
    return Work(macs=macs, elements=counts[-2], operators=counts[-1], whole=answer.get("whole") is True)


def estimate(work: Work, profile: Profile) -> Estimate | None:
    """Say in which range the latency of one inference on one core should lie, without running anything.

    Args:
        work: What one run computes.
        profile: Of the board or phone.

    Returns:
        A range; None where an operator could not be counted, or the processor has no kernels for the kind of number.

    >>> from tacit.devices.profile import load_profile
    >>> work = Work(macs={"int8": 12_501_632}, elements=28_746, operators=16, whole=True)
    >>> print(estimate(work, load_profile("stm32f746")))  # MLPerf Tiny's ResNet-8; measured: 63 ms
    47 to 370 ms (estimate, nothing was run)
    """
    rates = _CYCLES_PER_MAC[profile.isa]
    if not work.whole or not set(work.macs) <= set(rates):
        return None
    group = "mcu" if profile.kind == "mcu" else "linux"
    costs = [(count, rates[kind]) for kind, count in work.macs.items()]
    costs += [(work.elements, _CYCLES_PER_ELEMENT[group]), (work.operators, _CYCLES_PER_OPERATOR[group])]
    slower = _BROWSER if profile.runs == "browser" else (1.0, 1.0)
    low, high = (
        sum(count * cycles[end] for count, cycles in costs) * slower[end] / (profile.clock_mhz * 1e3) for end in (0, 1)
    )
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in work.macs.items()) or "no"
    basis = f"{kinds} multiply-accumulates in optimised kernels on one core at {profile.clock_mhz} MHz ({profile.isa})"
    return Estimate(low_ms=low, high_ms=high, basis=basis)


def _short(value: float) -> str:
    """Two digits that count.

    >>> _short(0.01234), _short(46.7), _short(374.2)
    ('0.012', '47', '370')
    """
    rounded = float(f"{value:.1e}")
    return f"{rounded:.0f}" if rounded >= 10 else f"{rounded:.2g}"
