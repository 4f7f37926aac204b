"""Whether a model fits a board or phone, and by how much, from what can be known without one."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tacit.devices.estimate import Estimate, Work, estimate, work_of
from tacit.devices.formats import RuntimeName, examine
from tacit.devices.micro import micro_needs
from tacit.devices.micro_code import code_bytes
from tacit.devices.profile import Profile
from tacit.devices.sandbox import ArtifactRefused

__all__ = ["ArtifactFacts", "Fit", "MicroNeeds", "Room", "facts_of", "fit", "fit_table"]

Verdict = Literal["fits", "does not fit", "does not run", "unknown"]

# Outside the arena: the runtime's own data (0.9 to 1.3 kB in the programs that micro_code.py was measured with) and a
# stack, of which nothing was measured. What the application itself keeps comes on top.
_STACK_BYTES = (2 << 10, 16 << 10)
# The wheel keeps a record of all allocations in the arena, which a firmware does not.
_RECORD_BYTES = 512
# From a native program with LiteRT to Python with a runtime, of which agent.py measures 45 to 54 MB on this computer.
_PROCESS_BYTES = (8 << 20, 128 << 20)
_SYSTEM_SHARE = 0.5  # of the memory of a Linux board or phone, which its system and other programs may hold


@dataclass(frozen=True, kw_only=True)
class MicroNeeds:
    """What TensorFlow Lite Micro takes, of ``micro.micro_needs``: bytes with 64-bit pointers, and operators."""

    arena_bytes: int
    head_bytes: int
    persistent_bytes: int
    operators: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ArtifactFacts:
    """What is known of a model file.

    Attributes:
        name: That tables use.
        runtime: By the file's format: "onnxruntime", "litert" or "executorch".
        bytes: Of the file.
        micro: What TensorFlow Lite Micro takes; None where it was not asked.
        micro_refused: Why it does not run the file; None where it does, or was not asked.
        work: What one run computes; None where that cannot be counted.
        peak_memory_bytes: What loading and running added to a process, as measured on this computer; None where it was
            not.
    """

    name: str
    runtime: RuntimeName
    bytes: int
    micro: MicroNeeds | None = None
    micro_refused: str | None = None
    work: Work | None = None
    peak_memory_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Room:
    """Bytes that are needed, from and to, and bytes that are there."""

    low_bytes: int
    high_bytes: int
    have_bytes: int

    @property
    def verdict(self) -> Verdict:
        """Whether it fits; "unknown" where that depends on where in the range the need lies.

        >>> Room(low_bytes=80, high_bytes=90, have_bytes=100).verdict
        'fits'
        >>> Room(low_bytes=80, high_bytes=110, have_bytes=100).verdict
        'unknown'
        """
        if self.high_bytes <= self.have_bytes:
            return "fits"
        return "does not fit" if self.low_bytes > self.have_bytes else "unknown"

    def __str__(self) -> str:
        """By how much, in words.

        >>> print(Room(low_bytes=80 << 10, high_bytes=90 << 10, have_bytes=100 << 10))
        10 to 20 KiB to spare
        >>> print(Room(low_bytes=120 << 10, high_bytes=120 << 10, have_bytes=100 << 10))
        20 KiB too much
        >>> print(Room(low_bytes=90 << 10, high_bytes=120 << 10, have_bytes=100 << 10))
        between 20 KiB too much and 10 KiB to spare
        """
        least, most = self.have_bytes - self.high_bytes, self.have_bytes - self.low_bytes
        if least >= 0:
            return f"{_span(least, most)} to spare"
        if most < 0:
            return f"{_span(-most, -least)} too much"
        return f"between {_amount(-least)} too much and {_amount(most)} to spare"


@dataclass(frozen=True, kw_only=True)
class Fit:
    """One model file on one board or phone."""

    artifact: str
    profile: Profile
    verdict: Verdict
    why: str
    flash: Room | None = None
    memory: Room | None = None
    latency: Estimate | None = None


def facts_of(path: Path, *, name: str | None = None, peak_memory_bytes: int | None = None) -> ArtifactFacts:
    """Find out what can be known of a model file on this computer, all in the sandbox.

    Args:
        path: An ONNX, ORT, TFLite or ExecuTorch file.
        name: For tables; by default that of the file.
        peak_memory_bytes: ``peak_memory_bytes`` of ``protocol.measure`` for this file here, if it was measured.

    Returns:
        The facts. Of a TFLite file also the work of a run and, where the wheel of TensorFlow Lite Micro is installed,
        what that takes of it or why it does not run it.

    Raises:
        FileNotFoundError: There is no such file.
        ArtifactRefused: The file is not acceptable as a model.
    """
    runtime = examine(path)
    shown = name or path.name
    size_bytes = path.stat().st_size
    if runtime != "litert":
        return ArtifactFacts(name=shown, runtime=runtime, bytes=size_bytes, peak_memory_bytes=peak_memory_bytes)
    micro, refused = _ask_micro(path)
    return ArtifactFacts(
        name=shown,
        runtime=runtime,
        bytes=size_bytes,
        micro=micro,
        micro_refused=refused,
        work=work_of(path),
        peak_memory_bytes=peak_memory_bytes,
    )


def _ask_micro(path: Path) -> tuple[MicroNeeds | None, str | None]:
    try:
        found = micro_needs(path)
    except ArtifactRefused as error:
        return None, str(error)
    except ModuleNotFoundError:
        return None, None
    sizes = {key: found[key] for key in ("arena_bytes", "head_bytes", "persistent_bytes")}
    return MicroNeeds(**sizes, operators=tuple(found["operators"])), None


def fit(facts: ArtifactFacts, profile: Profile) -> Fit:
    """Say whether a model file fits a board or phone, and by how much.

    On a microcontroller the file and the runtime's code must fit into flash, and the arena, a stack and the runtime's
    own data into memory. The arena was measured with 64-bit pointers: what holds structures is between half as large
    and as large there, hence a range (seven models, run as programs for 32-bit Arm, lie within it). On Linux boards and
    phones the file, the peak that it added to a process here, and a process with a runtime must fit into the half of
    the memory that the system is taken to leave.

    Args:
        facts: Of the file, from ``facts_of``.
        profile: Of the board or phone.

    Returns:
        The verdict with its figures; "unknown" where the figures leave both open, or are not there.

    >>> from tacit.devices.profile import load_profile
    >>> needs = MicroNeeds(arena_bytes=55984, head_bytes=49000, persistent_bytes=6984, operators=("CONV_2D",))
    >>> facts = ArtifactFacts(name="ic", runtime="litert", bytes=98496, micro=needs)
    >>> fit(facts, load_profile("nrf52840")).verdict
    'fits'
    """
    latency = estimate(facts.work, profile) if facts.work is not None else None
    return (_fit_micro if profile.kind == "mcu" else _fit_linux)(facts, profile, latency)


def _fit_micro(facts: ArtifactFacts, profile: Profile, latency: Estimate | None) -> Fit:
    if facts.runtime != "litert":
        why = "microcontrollers run .tflite files; export the target micro"
        return Fit(artifact=facts.name, profile=profile, verdict="does not run", why=why)
    if facts.micro_refused is not None:
        return Fit(artifact=facts.name, profile=profile, verdict="does not run", why=facts.micro_refused)
    if facts.micro is None or profile.arena_bytes is None or profile.flash_bytes is None:
        why = "TensorFlow Lite Micro was not asked; pip install 'tacit[micro]'"
        return Fit(artifact=facts.name, profile=profile, verdict="unknown", why=why)
    code_low, code_high = code_bytes(facts.micro.operators)
    flash = Room(low_bytes=facts.bytes + code_low, high_bytes=facts.bytes + code_high, have_bytes=profile.flash_bytes)
    least_arena = facts.micro.head_bytes + facts.micro.persistent_bytes // 2 - _RECORD_BYTES
    memory = Room(
        low_bytes=max(0, least_arena) + _STACK_BYTES[0],
        high_bytes=facts.micro.arena_bytes + _STACK_BYTES[1],
        have_bytes=profile.arena_bytes,
    )
    verdict = _worse(flash.verdict, memory.verdict)
    why = f"flash: {flash}; memory: {memory}; the firmware around it comes on top"
    runs = latency if verdict != "does not fit" else None
    return Fit(artifact=facts.name, profile=profile, verdict=verdict, why=why, flash=flash, memory=memory, latency=runs)


def _fit_linux(facts: ArtifactFacts, profile: Profile, latency: Estimate | None) -> Fit:
    if profile.runs == "browser" and facts.runtime == "executorch":
        why = "browsers run .onnx and .tflite files; export one of them"
        return Fit(artifact=facts.name, profile=profile, verdict="does not run", why=why)
    have_bytes = int(profile.ram_bytes * _SYSTEM_SHARE)
    if facts.bytes > profile.ram_bytes:
        why = f"the file alone has {_amount(facts.bytes)}, more than the memory"
        return Fit(artifact=facts.name, profile=profile, verdict="does not fit", why=why)
    if facts.peak_memory_bytes is None:
        why = "its peak memory was not measured; measure it on this computer first"
        return Fit(artifact=facts.name, profile=profile, verdict="unknown", why=why, latency=latency)
    need_bytes = facts.bytes + facts.peak_memory_bytes
    memory = Room(
        low_bytes=need_bytes + _PROCESS_BYTES[0], high_bytes=need_bytes + _PROCESS_BYTES[1], have_bytes=have_bytes
    )
    why = f"memory: {memory}, of half of {_amount(profile.ram_bytes)}"
    runs = latency if memory.verdict != "does not fit" else None
    return Fit(artifact=facts.name, profile=profile, verdict=memory.verdict, why=why, memory=memory, latency=runs)


def fit_table(artifacts: Sequence[ArtifactFacts], profiles: Iterable[Profile]) -> list[dict[str, Any]]:
    """All files on all boards and phones, as rows for a report or a console, ready for ``json.dumps``.

    Args:
        artifacts: From ``facts_of``.
        profiles: From ``profile.profiles`` or ``profile.load_profile``.

    Returns:
        A row for each pair, profiles first: ``device``, ``title``, ``kind``, ``artifact``, ``verdict``, ``why``,
        ``flash_bytes`` and ``memory_bytes`` (``[low, high, there]`` or None), ``latency`` (words, always "estimate,
        nothing was run" or "not estimated"), ``latency_ms`` (``[low, high]`` or None), ``latency_basis``, ``note``.
    """
    return [_row(fit(facts, profile)) for profile in profiles for facts in artifacts]


def _row(found: Fit) -> dict[str, Any]:
    return {
        "device": found.profile.name,
        "title": found.profile.title,
        "kind": found.profile.kind,
        "artifact": found.artifact,
        "verdict": found.verdict,
        "why": found.why,
        "flash_bytes": _triple(found.flash),
        "memory_bytes": _triple(found.memory),
        "latency": str(found.latency) if found.latency else "not estimated",
        "latency_ms": [found.latency.low_ms, found.latency.high_ms] if found.latency else None,
        "latency_basis": found.latency.basis if found.latency else None,
        "note": found.profile.note,
    }


def _triple(room: Room | None) -> list[int] | None:
    return [room.low_bytes, room.high_bytes, room.have_bytes] if room else None


def _worse(first: Verdict, second: Verdict) -> Verdict:
    order: tuple[Verdict, ...] = ("fits", "unknown", "does not fit", "does not run")
    return max(first, second, key=order.index)


def _span(low_bytes: int, high_bytes: int) -> str:
    low, high = _amount(low_bytes), _amount(high_bytes)
    if low == high:
        return low
    return f"{low.split()[0]} to {high}" if low.split()[1] == high.split()[1] else f"{low} to {high}"


def _amount(size_bytes: int) -> str:
    """Bytes for people.

    >>> _amount(812), _amount(20 << 10), _amount(3 << 29)
    ('812 B', '20 KiB', '1.5 GiB')
    """
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size_bytes >= scale:
            value = size_bytes / scale
            return f"{value:.1f} {unit}".replace(".0 ", " ") if value < 10 else f"{value:.0f} {unit}"
    return f"{size_bytes} B"
