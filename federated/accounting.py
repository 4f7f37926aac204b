"""How much privacy a sequence of DP-SGD steps has spent.

PLD (dp-accounting) is the figure that is reported; RDP (dp-accounting) and PRV (Opacus) stand beside it as checks.
GDP/CLT is not offered: it is an approximation, not a bound.
"""

from __future__ import annotations

import contextlib
import math
import threading
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

__all__ = [
    "Event",
    "Spend",
    "calibrate_noise",
    "cross_check",
    "epsilon_pld",
    "epsilon_rdp",
    "merge",
    "reported_epsilon",
    "spend",
]

# Above this ε a PLD needs a grid so long that it takes minutes, and the figure is of no use.
_LARGEST_PLD_EPSILON = 50.0
_PRV_TIMEOUT_S = 20.0
_INTEGER_ORDERS = tuple(float(order) for order in range(2, 65))


@dataclass(frozen=True, kw_only=True)
class Event:
    """One access: a Poisson-subsampled Gaussian release under the add/remove relation.

    Attributes:
        sample_rate: probability with which each record takes part, in (0, 1].
        noise_multiplier: standard deviation of the noise over the clipping norm.
    """

    sample_rate: float
    noise_multiplier: float

    def __post_init__(self) -> None:
        if not 0.0 < self.sample_rate <= 1.0:
            raise ValueError(f"expected 0 < sample_rate <= 1, got sample_rate={self.sample_rate}")
        if not (self.noise_multiplier > 0.0 and math.isfinite(self.noise_multiplier)):
            raise ValueError(f"expected a finite noise_multiplier > 0, got noise_multiplier={self.noise_multiplier}")


@dataclass(frozen=True, kw_only=True)
class Spend:
    """What a history of events costs at one δ.

    Attributes:
        epsilon: the figure to report (PLD; RDP above 50).
        accountant: the accountant that gave it, with its version.
        epsilon_rdp: Rényi accounting, never below PLD.
        epsilon_prv: Opacus' PRV accountant, or None when it was not cross-checked.
    """

    epsilon: float
    delta: float
    accountant: str
    epsilon_rdp: float
    epsilon_prv: float | None


def merge(history: Iterable[tuple[Event, int]]) -> dict[Event, int]:
    """Adds up equal events: composition does not depend on order or grouping.

    >>> step = Event(sample_rate=0.1, noise_multiplier=1.0)
    >>> merge([(step, 2), (step, 3)])[step]
    5
    """
    merged: dict[Event, int] = {}
    for event, count in history:
        merged[event] = merged.get(event, 0) + count
    return {event: count for event, count in merged.items() if count > 0}


def epsilon_pld(history: Mapping[Event, int], delta: float, *, discretisation: float = 1e-4) -> float:
    """ε by composing privacy loss distributions (Doroshenko et al. 2022), pessimistically rounded.

    Args:
        history: how often each event happened.
        delta: the δ of (ε, δ)-DP.
        discretisation: grid of the privacy loss; 1e-4 for reports, 1e-3 while bisecting.

    >>> one = {Event(sample_rate=1.0, noise_multiplier=1.0): 1}
    >>> round(epsilon_pld(one, 1e-5), 2)  # exact: 4.377178
    4.38
    """
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, discretisation)
    for event, count in _in_order(history):
        accountant.compose(_dp_event(event), count)
    return float(accountant.get_epsilon(delta))


def epsilon_rdp(history: Mapping[Event, int], delta: float, *, orders: Sequence[float] | None = None) -> float:
    """ε by Rényi differential privacy (Mironov 2017, conversion of Canonne et al. 2020).

    Args:
        history: how often each event happened.
        delta: the δ of (ε, δ)-DP.
        orders: Rényi orders to minimise over; dp-accounting's own when None.

    >>> one = {Event(sample_rate=1.0, noise_multiplier=1.0): 1}
    >>> round(epsilon_rdp(one, 1e-5), 2)  # exact: 4.377178; RDP is never below
    4.73
    """
    from absl import logging as absl_logging
    from dp_accounting import NeighboringRelation
    from dp_accounting.rdp import RdpAccountant

    # Fractional orders near 1 that do not converge are left out, one log line each; leaving one out only raises ε.
    verbosity = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.FATAL)
    try:
        accountant = RdpAccountant(orders, NeighboringRelation.ADD_OR_REMOVE_ONE)
        for event, count in _in_order(history):
            accountant.compose(_dp_event(event), count)
        return float(accountant.get_epsilon(delta))
    finally:
        absl_logging.set_verbosity(verbosity)


def epsilon_prv(history: Mapping[Event, int], delta: float, *, timeout_s: float = _PRV_TIMEOUT_S) -> float | None:
    """ε by Opacus' PRV accountant (Gopi et al. 2021), or None when it gave none within `timeout_s`."""
    found: list[float] = []

    def compute() -> None:
        from opacus.accountants import PRVAccountant

        accountant = PRVAccountant()
        accountant.history = [(event.noise_multiplier, event.sample_rate, count) for event, count in history.items()]
        with contextlib.suppress(Exception), warnings.catch_warnings():  # no figure is "not cross-checked"
            warnings.simplefilter("ignore")
            found.append(float(accountant.get_epsilon(delta=delta)))

    # A daemon thread: with a small noise multiplier PRV may not return for minutes, and it cannot be interrupted.
    worker = threading.Thread(target=compute, daemon=True)
    worker.start()
    worker.join(timeout_s)
    return found[0] if found else None


def reported_epsilon(history: Mapping[Event, int], delta: float, *, discretisation: float = 1e-4) -> float:
    """The ε that a report states: PLD, or RDP where that exceeds 50.

    Budgets, calibration and reports all go by this figure: a budget of 45 met by PLD alone would be reported as 58.

    Args:
        history: how often each event happened.
        delta: the δ of (ε, δ)-DP.
        discretisation: grid of the PLD.

    >>> one = {Event(sample_rate=1.0, noise_multiplier=1.0): 1}
    >>> round(reported_epsilon(one, 1e-5, discretisation=1e-3), 2)
    4.38
    """
    # Integer orders take milliseconds and give an upper bound; where that is small, the full set is not needed.
    if epsilon_rdp(history, delta, orders=_INTEGER_ORDERS) > _LARGEST_PLD_EPSILON:
        rdp = epsilon_rdp(history, delta)
        if rdp > _LARGEST_PLD_EPSILON:
            return rdp
    return epsilon_pld(history, delta, discretisation=discretisation)


def cross_check(*, pld: float, rdp: float, prv: float | None) -> None:
    """Compares what three accountants say of one history.

    Raises:
        ArithmeticError: RDP below PLD, or PRV away from PLD by more than its error budget; nothing may be released.

    >>> cross_check(pld=1.0, rdp=1.2, prv=1.001)
    >>> cross_check(pld=1.0, rdp=0.9, prv=None)
    Traceback (most recent call last):
        ...
    ArithmeticError: expected RDP >= PLD - 0.001, got RDP 0.900000 and PLD 1.000000; do not release
    """
    if not rdp >= pld - 1e-3:
        raise ArithmeticError(f"expected RDP >= PLD - 0.001, got RDP {rdp:.6f} and PLD {pld:.6f}; do not release")
    if prv is not None and not -1e-3 <= prv - pld <= max(0.0125, 0.002 * pld):
        raise ArithmeticError(f"expected PRV - PLD within its error budget, got {prv - pld:.6f}; do not release")


def spend(history: Mapping[Event, int], delta: float, *, with_prv: bool = True) -> Spend:
    """The cost of a history, by accountants that must agree.

    Args:
        history: how often each event happened.
        delta: the δ of (ε, δ)-DP.
        with_prv: also ask Opacus, which takes seconds to import.

    Raises:
        ArithmeticError: RDP below PLD, or PRV away from PLD by more than its error budget; nothing may be released.

    >>> cost = spend({Event(sample_rate=1.0, noise_multiplier=2.0): 1}, 1e-5, with_prv=False)
    >>> round(cost.epsilon, 2), round(cost.epsilon_rdp, 2), cost.epsilon_prv  # exact: 1.993091
    (1.99, 2.17, None)
    """
    return _spend(frozenset(history.items()), delta, with_prv)


@lru_cache(maxsize=64)
def _spend(events: frozenset[tuple[Event, int]], delta: float, with_prv: bool) -> Spend:
    history = dict(events)
    if not history:
        return Spend(epsilon=0.0, delta=delta, accountant=_pld_name(), epsilon_rdp=0.0, epsilon_prv=0.0)
    rdp = epsilon_rdp(history, delta)
    if rdp > _LARGEST_PLD_EPSILON:
        return Spend(epsilon=rdp, delta=delta, accountant=_name("RDP"), epsilon_rdp=rdp, epsilon_prv=None)
    pld = epsilon_pld(history, delta)
    prv = epsilon_prv(history, delta) if with_prv else None
    cross_check(pld=pld, rdp=rdp, prv=prv)
    return Spend(epsilon=pld, delta=delta, accountant=_pld_name(), epsilon_rdp=rdp, epsilon_prv=prv)


def calibrate_noise(
    *, epsilon: float, delta: float, sample_rate: float, steps: int, also: Mapping[Event, int] | None = None
) -> float:
    """The smallest noise multiplier, to 0.1 % from above, whose reported ε over `steps` is at most `epsilon`.

    Args:
        epsilon: the budget, > 0.
        delta: the δ of (ε, δ)-DP, in (0, 1).
        sample_rate: Poisson sampling rate, in (0, 1].
        steps: how many steps are planned, ≥ 1.
        also: other accesses of the same plan, whose noise is given; they come out of the same budget.

    Raises:
        ValueError: no noise multiplier up to 10,000 meets the budget.

    >>> calibrate_noise(epsilon=4.377178, delta=1e-5, sample_rate=1.0, steps=1) >= 1.0
    True
    >>> shared = {Event(sample_rate=1.0, noise_multiplier=2.0): 1}
    >>> calibrate_noise(epsilon=4.377178, delta=1e-5, sample_rate=1.0, steps=1, also=shared) > 1.1
    True
    """
    return _calibrate(epsilon, delta, sample_rate, steps, frozenset((also or {}).items()))


@lru_cache(maxsize=64)
def _calibrate(
    epsilon: float, delta: float, sample_rate: float, steps: int, also: frozenset[tuple[Event, int]]
) -> float:
    def within(noise_multiplier: float, discretisation: float) -> bool:
        history = merge([(Event(sample_rate=sample_rate, noise_multiplier=noise_multiplier), steps), *also])
        # RDP is an upper bound and takes milliseconds: far too little noise never reaches the PLD.
        if epsilon_rdp(history, delta, orders=_INTEGER_ORDERS) > 4.0 * epsilon + 10.0:
            return False
        return reported_epsilon(history, delta, discretisation=discretisation) <= epsilon

    low, high = 0.05, 1.0
    while not within(high, 1e-3):
        low, high = high, high * 2.0
        if high > 1e4:
            raise ValueError(
                f"expected a budget that some noise can meet, got epsilon={epsilon}, delta={delta}, steps={steps}; "
                "raise epsilon or plan fewer rounds"
            )
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if within(middle, 1e-3) else (middle, high)
    while not within(high, 1e-4):  # the finer grid reports less, never more; this only guards the rounding
        high *= 1.0005
    return high


def _in_order(history: Mapping[Event, int]) -> list[tuple[Event, int]]:
    # Rounding depends on the order, and a budget that is the ε of its own plan must be met in any.
    return sorted(history.items(), key=lambda item: (item[0].sample_rate, item[0].noise_multiplier))


def _dp_event(event: Event) -> object:
    import dp_accounting

    gaussian = dp_accounting.GaussianDpEvent(event.noise_multiplier)
    if event.sample_rate == 1.0:
        return gaussian
    return dp_accounting.PoissonSampledDpEvent(event.sample_rate, gaussian)


def _pld_name() -> str:
    return _name("PLD")


def _name(kind: str) -> str:
    from importlib.metadata import version

    return f"{kind} (dp-accounting {version('dp-accounting')})"
