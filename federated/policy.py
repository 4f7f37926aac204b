"""What an owner accepts: `owner.toml` on its own disk, which no server can change.

A message is obeyed if its mechanism is at least as private as this on every axis; otherwise it is refused, and nothing
is read. Which unit may stand in for which:

| asked for | record | client | local | why |
|---|---|---|---|---|
| record | yes | no | yes | client hides nothing from the server; local hides all that an owner holds, from everybody |
| client | no | yes | yes | record hides one record only; local hides all that an owner holds, also from the server |
| local | no | no | yes | nothing else hides all that an owner holds from the server |

At level local it shows that an owner takes part; at level client the server knows it, and those it sends models to do
not. An owner for whom that matters asks for client and lists the recipes that it accepts.

The format, every key of `[policy]` but the first three optional; `[sources.NAME]` says what differs for one source, and
`[data]` where the records of a described task lie on this disk, from this file:

    [owner]
    name = "anna"

    [data]
    path = "records.csv"

    [policy]
    unit = "record"               # "record", "client" or "local"
    epsilon = 8.0                 # over all runs
    delta = 1e-5
    recipes = "any"               # or the SHA-256 of each recipe accepted
    min_noise_multiplier = 0.7
    max_sample_rate = 0.5         # local needs 1
    max_steps = 20                # of one participation
    max_participations = 200
    public_sizes = false          # true: recipes that make known how many records there are (zero-out) are accepted
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from tacit.federated.ledger import Objection
from tacit.federated.tally import Account
from tacit.federated.turns import Reservation

__all__ = ["OwnerPolicy", "PolicyInvalid", "Terms", "load_policy"]

_STANDS_IN = {"record": ("record", "local"), "client": ("client", "local"), "local": ("local",)}
_RELATIONS = {"record": "add/remove", "client": "add/remove", "local": "replace-one"}
_SAMPLERS = {"record": "poisson", "client": "poisson", "local": "none"}
_NOISES = ("gaussian", "gaussian on a grid")


class PolicyInvalid(ValueError):
    """An owner.toml that cannot be read; `where` is the file and the key."""

    def __init__(self, message: str, where: str) -> None:
        super().__init__(message)
        self.where = where


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What an owner accepts for one source.

    Attributes:
        unit: whose contribution is to be hidden: "record", "client" or "local".
        epsilon: the budget, over all runs.
        delta: its δ.
        recipes: SHA-256 of each recipe accepted; None for any.
        min_noise_multiplier: least z.
        max_sample_rate: largest q.
        max_steps: of one participation; None for no limit.
        max_participations: in all; None for no limit.
        public_sizes: whether it may become known how many records there are.
    """

    unit: str
    epsilon: float
    delta: float
    recipes: frozenset[str] | None
    min_noise_multiplier: float = 0.0
    max_sample_rate: float = 1.0
    max_steps: int | None = None
    max_participations: int | None = None
    public_sizes: bool = False

    def refusal(self, mechanism: Mapping[str, object], *, recipe: str, participations: int) -> str | None:
        """Why a mechanism is weaker than this, or None when it is obeyed.

        Args:
            mechanism: as `Mechanism.describe` states it.
            recipe: SHA-256 of the recipe that it comes from.
            participations: charged to the source so far.

        >>> terms = Terms(unit="local", epsilon=8.0, delta=1e-5, recipes=None)
        >>> terms.refusal({"unit": "record"}, recipe="", participations=0)
        "expected unit 'local', got 'record'"
        """
        unit = mechanism.get("unit")
        if unit not in _STANDS_IN[self.unit]:
            return f"expected unit {' or '.join(map(repr, _STANDS_IN[self.unit]))}, got {unit!r}"
        if self.recipes is not None and recipe not in self.recipes:
            return f"expected one of {len(self.recipes)} recipes, got {recipe or 'none'}"
        if self.max_participations is not None and participations >= self.max_participations:
            return f"expected at most {self.max_participations} participations, got one more"
        return self._weakness(str(unit), mechanism)

    def _weakness(self, unit: str, mechanism: Mapping[str, object]) -> str | None:
        """The first figure that is worse; one that is missing or no number is."""
        zero_out = ("zero-out",) if unit == "record" and self.public_sizes else ()
        accepted = {"relation": (_RELATIONS[unit], *zero_out), "sampler": (_SAMPLERS[unit],), "noise": _NOISES}
        for name, values in accepted.items():
            if mechanism.get(name) not in values:
                expected = " or ".join(map(repr, values))
                return f"expected {name} {expected} for unit {unit!r}, got {mechanism.get(name)!r}"
        noise, rate, steps, norm = (
            _number(mechanism.get(name)) for name in ("noise_multiplier", "sample_rate", "steps", "max_grad_norm")
        )
        if not (noise > 0.0 and noise >= self.min_noise_multiplier):
            return f"expected noise_multiplier of at least {self.min_noise_multiplier:g} and above 0, got {noise:g}"
        if not 0.0 < rate <= self.max_sample_rate:
            return f"expected sample_rate of at most {self.max_sample_rate:g}, got {rate:g}"
        if not 1.0 <= steps <= (self.max_steps or math.inf):
            return f"expected at most {self.max_steps} steps, got {steps:g}"
        return None if 0.0 < norm < math.inf else f"expected a finite max_grad_norm above 0, got {norm:g}"

    def budget(self, epsilon: float, delta: float) -> tuple[float, float]:
        """ε and δ that a ledger holds a recipe to: no looser than the owner's, nor than the recipe's own.

        >>> Terms(unit="record", epsilon=3.0, delta=1e-6, recipes=None).budget(8.0, 1e-5)
        (3.0, 1e-06)
        """
        return min(self.epsilon, epsilon), min(self.delta, delta)


@dataclass(frozen=True, kw_only=True)
class OwnerPolicy:
    """What an owner accepts, by source.

    Attributes:
        owner: its name.
        terms: for every source that is not named.
        sources: for those that are.
        data: the file or folder of its records; None where the task finds them itself.
    """

    owner: str
    terms: Terms
    sources: Mapping[str, Terms] = field(default_factory=dict)
    data: Path | None = None

    def terms_of(self, source: str) -> Terms:
        """What is accepted for a source."""
        return self.sources.get(source, self.terms)

    def objection(self, recipe: str) -> Objection:
        """What a `Ledger` asks before a new charge.

        Args:
            recipe: SHA-256 of the recipe that this process runs.
        """

        def objection(request: Reservation, account: Account) -> str | None:
            terms = self.terms_of(request.source)
            if request.owner != self.owner:
                return f"expected owner {self.owner!r}, got {request.owner!r}"
            return terms.refusal(request.mechanism, recipe=recipe, participations=account.reserved)

        return objection


def load_policy(path: Path) -> OwnerPolicy:
    r"""Reads and checks an owner.toml.

    Raises:
        PolicyInvalid: syntax, an unknown or missing key, type or range; says where.
        FileNotFoundError: there is no such file.

    >>> import tempfile
    >>> text = '[owner]\nname = "anna"\n[policy]\nunit = "record"\nepsilon = 8\ndelta = 1e-5\nrecipes = "any"\n'
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "owner.toml").write_text(text)
    ...     policy = load_policy(Path(folder, "owner.toml"))
    >>> policy.owner, policy.terms.epsilon, policy.terms_of("digits").max_steps
    ('anna', 8.0, None)
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PolicyInvalid(f"expected TOML in UTF-8, got a syntax error: {error}", str(path)) from None
    _expect_known(content, ["owner", "data", "policy", "sources"], str(path))
    owner = _table(content, "owner", str(path))
    _expect_known(owner, ["name"], f"{path}: [owner]")
    general = _table(content, "policy", str(path))
    sources = _table(content, "sources", str(path)) if "sources" in content else {}
    data = _table(content, "data", str(path)) if "data" in content else None
    if data is not None:
        _expect_known(data, ["path"], f"{path}: [data]")
    return OwnerPolicy(
        data=None if data is None else path.parent / Path(_text(data.get("path"), f"{path}: [data] path")).expanduser(),
        owner=_text(owner.get("name"), f"{path}: [owner] name"),
        terms=_terms(general, {}, f"{path}: [policy]"),
        sources={
            name: _terms(_table(sources, name, str(path)), general, f"{path}: [sources.{name}]") for name in sources
        },
    )


def _terms(table: Mapping[str, Any], general: Mapping[str, Any], where: str) -> Terms:
    _expect_known(table, [key.name for key in fields(Terms)], where)
    given = {**general, **table}
    for key in ("unit", "epsilon", "delta", "recipes"):
        if key not in given:
            raise PolicyInvalid(f"expected the key {key!r}, got none", where)
    return Terms(**{key: _CHECKS[key](value, f"{where} {key}") for key, value in given.items()})


def _unit(value: object, where: str) -> str:
    if not isinstance(value, str) or value not in _STANDS_IN:
        raise PolicyInvalid(f"expected {', '.join(map(repr, _STANDS_IN))}, got {value!r}", where)
    return value


def _recipes(value: object, where: str) -> frozenset[str] | None:
    if value == "any":
        return None
    digests = value if isinstance(value, list) else [value]
    for digest in digests:
        if not (isinstance(digest, str) and len(digest) == 64 and set(digest) <= set("0123456789abcdef")):
            raise PolicyInvalid(f'expected "any" or a list of SHA-256 in small letters, got {digest!r}', where)
    return frozenset(digests)


def _between(
    low: float, high: float, *, open_low: bool = True, open_high: bool = True
) -> Callable[[object, str], float]:
    def check(value: object, where: str) -> float:
        number = _number(value)
        above = number > low if open_low else number >= low
        below = number < high if open_high else number <= high
        if not (above and below):
            limits = f"{low:g} {'<' if open_low else '<='} value {'<' if open_high else '<='} {high:g}"
            raise PolicyInvalid(f"expected a number with {limits}, got {value!r}", where)
        return number

    return check


def _count(value: object, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise PolicyInvalid(f"expected a whole number of at least 1, got {value!r}", where)
    return value


def _truth(value: object, where: str) -> bool:
    if not isinstance(value, bool):
        raise PolicyInvalid(f"expected true or false, got {value!r}", where)
    return value


_CHECKS: Mapping[str, Callable[[object, str], Any]] = {
    "unit": _unit,
    "epsilon": _between(0.0, math.inf),
    "delta": _between(0.0, 1.0),
    "recipes": _recipes,
    "min_noise_multiplier": _between(0.0, math.inf, open_low=False),
    "max_sample_rate": _between(0.0, 1.0, open_high=False),
    "max_steps": _count,
    "max_participations": _count,
    "public_sizes": _truth,
}


def _number(value: object) -> float:
    """A number, or NaN, which is neither above nor below anything."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _text(value: object, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise PolicyInvalid(f"expected text, got {value!r}", where)
    return value


def _table(content: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
    if not isinstance(content.get(name), dict):
        raise PolicyInvalid(f"expected the table [{name}], got {content.get(name)!r}", where)
    table: Mapping[str, Any] = content[name]
    return table


def _expect_known(table: Mapping[str, Any], known: list[str], where: str) -> None:
    for key in table:
        if key not in known:
            near = get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise PolicyInvalid(f"expected a known key, got {key!r}; {hint}", where)
