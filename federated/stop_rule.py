"""When an account may not be charged any more: within its plan by PLD, outside of it by a Rényi filter.

An account's `Opening` is fixed by its first charge, before anything of it was seen, and stands in the ledger:

- a *plan*: how often each kind of event may happen;
- an *order* α and a *share* s of δ for charges outside of the plan.

A history is within the budget (ε, δ) in either of two ways.

1. *Within the plan*: no event more often than planned, and the plan's PLD ε at δ is within ε. The events may come in
   any order, each chosen with all earlier outputs in view, and stop anywhere; δ(ε) is at most the plan's: each step is
   dominated by its own pair (Zhu, Dong & Wang 2022, theorem 10), a product of pairs does not depend on their order, and
   what was left out could only have raised it. So counts are compared and nothing is computed.
2. *By the filter*: the sum of Rényi divergences of order α, converted at s·δ, is within ε. This holds also for events
   whose kind and number were chosen by what earlier ones gave (Feldman & Zrnic 2021), for one order that was fixed in
   advance. Neither PLD nor the least over many orders has that property: the filter that composes exactly is not valid
   for subsampled Gaussians (arXiv 2602.15815).

Together: let L be the privacy loss, and S the outcomes after which the history is still within the plan. Then δ(ε) =
E[(1 − exp(ε − L))⁺] splits into S and the rest. On S it is at most the plan's δ(ε): stop whoever is about to leave the
plan, and nothing on S changes. On the rest it is at most s·δ: exp((α−1)(L − Σ Rényi)) is a supermartingale with mean at
most 1, and the conversion (Canonne et al. 2020) bounds every outcome by itself. Hence s is so small that the plan's
δ(ε) ≤ (1 − s)·δ; where the plan passes the filter by itself, 1. needs no δ of its own and s = 1.

*Guarantees*: an account on which only histories that `fits` accepts are charged is (ε, δ)-DP, however its runs were
chosen. Budgets may differ between charges; the guarantee is then of the largest ε and δ.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from tacit.federated.accounting import Event, epsilon_rdp, reported_epsilon

__all__ = ["Opening", "filter_epsilon", "fits", "open_account", "plan_fits"]

_ORDERS = (1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, *(float(order) for order in range(5, 65)), 128.0, 256.0)
_MARGIN = 1e-6  # of δ, for rounding
_ONE_AT_A_TIME = threading.RLock()  # owners that ask at once mostly ask the same, which is then computed once


@dataclass(frozen=True, kw_only=True)
class Opening:
    """What was fixed when an account was opened.

    Attributes:
        plan: how often each kind of event may happen; empty for none.
        order: α of the filter, > 1.
        share: of δ, for what is outside of the plan; 0 closes the account to it.
        epsilon: the budget that the plan fitted.
        delta: the δ of that budget.
    """

    plan: Mapping[Event, int]
    order: float
    share: float
    epsilon: float
    delta: float


def plan_fits(plan: Mapping[Event, int], epsilon: float, delta: float) -> bool:
    """Whether a plan that was fixed in advance stays within a budget, by the ε that is reported.

    >>> plan_fits({Event(sample_rate=1.0, noise_multiplier=1.0): 1}, 4.4, 1e-5)  # exact: 4.377178
    True
    """
    return _plan_fits(frozenset(plan.items()), epsilon, delta)


def open_account(plan: Mapping[Event, int], epsilon: float, delta: float) -> Opening:
    """Fixes an account's plan, and the order and share of δ for whatever comes besides.

    The order is the one at which the plan could be repeated most often.

    Args:
        plan: one that fits the budget; empty for an account that is held to the filter alone.
        epsilon: the budget.
        delta: its δ.

    >>> event = Event(sample_rate=1.0, noise_multiplier=1.0)
    >>> loose, tight = (open_account({event: 1}, epsilon, 1e-5) for epsilon in (8.0, 4.4))
    >>> loose.share, round(tight.share, 3)  # exact: δ(4.4) = 9.0664e-6
    (1.0, 0.093)
    """
    with _ONE_AT_A_TIME:
        return _open_account(frozenset(plan.items()), epsilon, delta)


def fits(history: Mapping[Event, int], opening: Opening | None, epsilon: float, delta: float) -> bool:
    """Whether an account may have been charged this.

    Args:
        history: all charges, the one in question included.
        opening: of the account. Without one the plan is the first kind of event, as often as fits: what is charged
            besides has little of δ left.
        epsilon: the budget.
        delta: its δ.
    """
    if epsilon == math.inf:
        return True
    with _ONE_AT_A_TIME:
        return _fits(history, opening, epsilon, delta)


def _fits(history: Mapping[Event, int], opening: Opening | None, epsilon: float, delta: float) -> bool:
    if opening is None:
        if len(history) <= 1:
            return plan_fits(history, epsilon, delta)
        opening = _implied(next(iter(history)), epsilon, delta)
    planned = all(count <= opening.plan.get(event, 0) for event, count in history.items())
    if planned and epsilon >= opening.epsilon and delta >= opening.delta:
        return True  # the plan fitted when the account was opened
    if filter_epsilon(history, opening.order, opening.share * delta) <= epsilon:
        return True
    return planned and plan_fits(opening.plan, epsilon, delta)


def filter_epsilon(history: Mapping[Event, int], order: float, delta: float) -> float:
    """ε of events that may each have been chosen by what earlier ones gave, at one order fixed in advance.

    Never below the ε of the best order, which holds for a plan only.

    >>> history = {Event(sample_rate=1.0, noise_multiplier=1.0): 1}
    >>> filter_epsilon(history, 5.0, 1e-5) >= epsilon_rdp(history, 1e-5)
    True
    """
    return _filter_epsilon(frozenset(history.items()), order, delta)


@lru_cache(maxsize=4096)
def _filter_epsilon(history: frozenset[tuple[Event, int]], order: float, delta: float) -> float:
    return epsilon_rdp(dict(history), delta, orders=(order,)) if delta > 0.0 else math.inf


@lru_cache(maxsize=256)
def _plan_fits(plan: frozenset[tuple[Event, int]], epsilon: float, delta: float) -> bool:
    # Cached, because an owner in a process of its own opens its ledger for each message.
    if not plan or epsilon_rdp(dict(plan), delta) <= epsilon:
        return True
    return reported_epsilon(dict(plan), delta) <= epsilon


@lru_cache(maxsize=256)
def _open_account(plan: frozenset[tuple[Event, int]], epsilon: float, delta: float) -> Opening:
    share, order = 1.0, _choose_order(plan, epsilon, delta)
    if _filter_epsilon(plan, order, delta) > epsilon:
        share = max(1.0 - _delta(plan, epsilon) / delta - _MARGIN, 0.0)
        order = _choose_order(plan, epsilon, max(share, _MARGIN) * delta)
    return Opening(plan=dict(plan), order=order, share=share, epsilon=epsilon, delta=delta)


@lru_cache(maxsize=64)
def _implied(event: Event, epsilon: float, delta: float) -> Opening:
    low, high = 0, 1
    while plan_fits({event: high}, epsilon, delta):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if plan_fits({event: middle}, epsilon, delta) else (low, middle)
    return open_account({event: low} if low else {}, epsilon, delta)


def _choose_order(plan: frozenset[tuple[Event, int]], epsilon: float, delta: float) -> float:
    def repeats(order: float) -> float:
        # Canonne et al. 2020, proposition 12: ε = Rényi divergence + this.
        overhead = math.log1p(-1.0 / order) - math.log(delta * order) / (order - 1.0)
        # One Gaussian's divergence grows as its order; so does, about, that of an unknown plan.
        divergence = _filter_epsilon(plan, order, delta) - overhead if plan else order
        return (epsilon - overhead) / max(divergence, 1e-12)

    return max(_ORDERS, key=repeats)


def _delta(plan: frozenset[tuple[Event, int]], epsilon: float) -> float:
    """δ of a plan at ε: the other side of the figure that is reported."""
    import dp_accounting
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.rdp import RdpAccountant

    relation = NeighboringRelation.ADD_OR_REMOVE_ONE
    accountant = PLDAccountant(relation, 1e-4) if epsilon <= 50.0 else RdpAccountant(None, relation)
    for event, count in plan:
        gaussian = dp_accounting.GaussianDpEvent(event.noise_multiplier)
        accountant.compose(dp_accounting.PoissonSampledDpEvent(event.sample_rate, gaussian), count)
    return float(accountant.get_delta(epsilon))
