"""Boards and phones as data: what `profiles/*.toml` says of memory, processor and sources."""

import math
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

__all__ = ["Anchor", "Profile", "Source", "load_profile", "profile_names", "profiles"]

DeviceKind = Literal["mcu", "sbc", "phone"]
Isa = Literal["armv6m", "armv7em", "armv7em-m7", "xtensa-pie", "neon", "dotprod", "i8mm"]
_FOLDER = Path(__file__).with_name("profiles")
_MAX_FILE_BYTES = 64 << 10


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where figures come from: the document, its section, its address."""

    what: str
    section: str
    url: str


@dataclass(frozen=True, kw_only=True)
class Anchor:
    """A published measurement on this very board or chip, by which an estimate can be judged."""

    model: str
    macs: int
    number: Literal["int8", "float32"]
    ms: float
    threads: int
    runtime: str
    source: str


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A board or phone.

    Attributes:
        name: The file's name without its ending, such as "rp2040".
        title: For people.
        kind: Microcontroller, Linux board or phone.
        cpu: The chip and its cores.
        cores: Of the kind that the clock is given for.
        clock_mhz: The highest that the maker states, of the fastest cores.
        isa: What speeds whole-number arithmetic up, by which an estimate is made: "armv6m" (nothing), "armv7em" (DSP,
            single-precision unit), "armv7em-m7" (the same, two instructions at a time), "xtensa-pie" (vectors of 128
            bits), "neon", "dotprod", "i8mm".
        ram_bytes: As sold; of a board sold with several sizes the smallest, unless its name says otherwise.
        arena_bytes: The largest piece in one that a program has by default, where an arena can lie; of microcontrollers
            only.
        flash_bytes: Of microcontrollers: what a program and its model have by default, after the boot loader; of the
            others None, as they take a card or disk.
        runs: "native", or "browser" where only a browser runs models of one's own without an app.
        note: What the figures leave out.
        sources: Where the figures come from.
        anchors: Published measurements; empty where none is known for sure.
    """

    name: str
    title: str
    kind: DeviceKind
    cpu: str
    cores: int
    clock_mhz: int
    isa: Isa
    ram_bytes: int
    arena_bytes: int | None = None
    flash_bytes: int | None = None
    runs: Literal["native", "browser"] = "native"
    note: str = ""
    sources: tuple[Source, ...]
    anchors: tuple[Anchor, ...] = ()


_CHOICES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "kind": ("mcu", "sbc", "phone"),
        "isa": ("armv6m", "armv7em", "armv7em-m7", "xtensa-pie", "neon", "dotprod", "i8mm"),
        "runs": ("native", "browser"),
        "number": ("int8", "float32"),
    }
)
_RANGES: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        "cores": (1, 1024),
        "threads": (1, 1024),
        "clock_mhz": (1, 20_000),
        "ram_bytes": (1024, 1 << 44),
        "arena_bytes": (1024, 1 << 44),
        "flash_bytes": (1024, 1 << 50),
        "macs": (1, 1 << 60),
        "ms": (1e-6, 1e9),
    }
)


def profile_names() -> list[str]:
    """The profiles that come with Tacit, by name.

    >>> "rp2040" in profile_names(), "pi-5" in profile_names()
    (True, True)
    """
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def profiles() -> list[Profile]:
    """All profiles that come with Tacit: microcontrollers first, then boards, then phones.

    >>> [profile.kind for profile in profiles()][0]
    'mcu'
    """
    loaded = [load_profile(name) for name in profile_names()]
    return sorted(loaded, key=lambda profile: (_CHOICES["kind"].index(profile.kind), profile.name))


def load_profile(name: str | Path) -> Profile:
    """Read a profile by the name of one that comes with Tacit, or from a TOML file of one's own.

    Args:
        name: Such as "rp2040"; anything that ends in ".toml" is a file.

    Returns:
        The profile.

    Raises:
        FileNotFoundError: There is no such profile or file; a name that is near is suggested.
        ValueError: The file is no TOML, or a key is unknown, missing, or out of its range.

    >>> load_profile("rp2040").ram_bytes
    270336
    >>> load_profile("rp2400")
    Traceback (most recent call last):
        ...
    FileNotFoundError: expected a profile, got 'rp2400'; did you mean 'rp2040'?
    """
    path = Path(name)
    if path.suffix != ".toml":
        path = _FOLDER / f"{name}.toml"
        if str(name) not in profile_names():
            raise FileNotFoundError(f"expected a profile, got {str(name)!r}{_instead(str(name), profile_names())}")
    if not path.is_file():
        raise FileNotFoundError(f"expected a profile, got path={str(path)!r}; check the path")
    if path.stat().st_size > _MAX_FILE_BYTES:
        raise ValueError(f"{path.name}: expected a profile of at most 64 kB; keep to the keys of those in devices/")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also of bytes that are no UTF-8
        raise ValueError(f"{path.name}: expected TOML, got a syntax error: {error}") from None
    return _read_profile({"name": path.stem, **table}, path.name)


def _read_profile(table: dict[str, Any], where: str) -> Profile:
    known = _read(Profile, table, where)
    sources = _read_all(Source, known["sources"], f"{where}: sources")
    if not sources:
        raise ValueError(f"{where}: expected at least one source; say where the figures come from")
    if known["kind"] == "mcu" and not (known.get("arena_bytes") and known.get("flash_bytes")):
        raise ValueError(f"{where}: expected arena_bytes and flash_bytes of a microcontroller; add them")
    if known.get("arena_bytes", 0) > known["ram_bytes"]:
        raise ValueError(f"{where}: expected arena_bytes <= ram_bytes, got arena_bytes={known['arena_bytes']}")
    anchors = _read_all(Anchor, known.get("anchors", []), f"{where}: anchors")
    return Profile(**{**known, "sources": tuple(sources), "anchors": tuple(anchors)})


def _read_all(build: Callable[..., Any], tables: object, where: str) -> list[Any]:
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ValueError(f"{where}: expected a list of tables, got {tables!r}"[:200])
    return [build(**_read(build, table, where)) for table in tables]


def _read(build: Any, table: dict[str, Any], where: str) -> dict[str, Any]:
    """Check keys, types and ranges of one table against a dataclass."""
    known = {field.name: field for field in fields(build)}
    for key, value in table.items():
        if key not in known:
            raise ValueError(f"{where}: expected a known key, got {key!r}{_instead(key, list(known))}")
        _check(key, value, str(known[key].type), where)
    missing = [name for name, field in known.items() if field.default is MISSING and name not in table]
    if missing:
        raise ValueError(f"{where}: expected the key {missing[0]!r}, got none; add it")
    return table


def _check(key: str, value: object, kind: str, where: str) -> None:
    if key in _CHOICES:
        if value not in _CHOICES[key]:
            raise ValueError(f"{where}: expected {key} {', '.join(_CHOICES[key])}, got {key}={value!r}")
    elif key in _RANGES:
        low, high = _RANGES[key]
        allowed = (int, float) if "float" in kind else (int,)
        numeric = isinstance(value, allowed) and not isinstance(value, bool)
        if not (numeric and math.isfinite(value) and low <= value <= high):  # type: ignore[arg-type,operator] # a number
            raise ValueError(f"{where}: expected {key} from {low:g} to {high:g}, got {key}={value!r}")
    elif "str" in kind and not (isinstance(value, str) and value.isprintable() and len(value) <= 500):
        raise ValueError(f"{where}: expected a line of text, got {key}={value!r}"[:300])


def _instead(name: str, known: list[str]) -> str:
    near = get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
