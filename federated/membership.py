"""Can somebody who asks the model tell whose records it was trained on? Likelihood-ratio attacks, and honest figures.

The attack is LiRA (Carlini et al. 2022, "Membership inference attacks from first principles") in its offline form:
shadow models, trained like the target on other halves of the pool, say how confident a model is about a record that it
has not seen; a target that is more confident than that has probably seen it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tacit.federated.lower_bounds import clopper_pearson
from tacit.federated.noise import public_generator

__all__ = ["Attack", "allowed_hit_rate", "confidences", "judge_attack", "lira_scores", "shadow_halves"]

_ALPHA = 0.05
_FALSE_POSITIVES = 10  # below so many expected ones a rate is an anecdote
_MOST_POINTS = 64

Values = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Attack:
    """How well scores tell members from others.

    Attributes:
        members: records that the target was trained on.
        others: records that it was not.
        auc: probability that a member's score is above another's; 0.5 by chance.
        auc_interval: 95 % (DeLong et al. 1988).
        false_rate: the lowest false positive rate at which ten false positives are expected.
        hit_rate: share of members recognised there.
        hit_interval: 95 % (Clopper and Pearson 1934), with the threshold taken as given.
        advantage: largest difference of hit rate and false positive rate over all thresholds.
        chance: what the advantage stays below in 95 of 100 audits of a model that tells nothing.
        curve: the receiver operating characteristic, (false positive rate, hit rate) from (0, 0) to (1, 1).
    """

    members: int
    others: int
    auc: float
    auc_interval: tuple[float, float]
    false_rate: float
    hit_rate: float
    hit_interval: tuple[float, float]
    advantage: float
    chance: float
    curve: tuple[tuple[float, float], ...]


def confidences(logits: npt.NDArray[np.floating], labels: npt.NDArray[np.int64]) -> Values:
    """The logit-scaled confidence φ = ln(p/(1 - p)) of each record's own class (Carlini et al. 2022, section IV-C).

    From logits it is the class' own minus the log-sum-exp of the others, which no rounding of probabilities saturates.

    Args:
        logits: (records, classes), at least two classes.
        labels: (records,).

    >>> confidences(np.array([[2.0, 0.0], [800.0, 0.0]]), np.array([0, 0])).tolist()
    [2.0, 800.0]
    """
    if logits.ndim != 2 or logits.shape[1] < 2 or len(logits) != len(labels):
        raise ValueError(f"expected logits of shape ({len(labels)}, classes >= 2), got {logits.shape}")
    wide = logits.astype(np.float64)
    rows = np.arange(len(wide))
    own = wide[rows, labels]
    wide[rows, labels] = -math.inf
    largest = wide.max(axis=1)
    rest: Values = own - (largest + np.log(np.exp(wide - largest[:, None]).sum(axis=1)))
    return rest


def shadow_halves(records: int, shadows: int, *, seed: int) -> npt.NDArray[np.bool_]:
    """Which records each shadow model is trained on: each record for half of the shadows.

    Args:
        records: in the pool.
        shadows: even, or one record more often than not.
        seed: public; an attack has no secrets to keep.

    Returns:
        (shadows, records).

    >>> shadow_halves(5, 4, seed=1).sum(axis=0).tolist()
    [2, 2, 2, 2, 2]
    """
    generator = public_generator(seed, "shadow halves", shadows)
    order = np.argsort(generator.random((shadows, records)), axis=0)
    return order < shadows / 2


def lira_scores(target: Values, shadows: Values, seen: npt.NDArray[np.bool_]) -> Values:
    """How much more confident the target is of each record than models that have not seen it.

    Offline LiRA with one variance for all records, as its authors advise for few shadows: (φ - μ_out)/σ_out. Without
    shadows it is φ itself, the attack by a threshold that is the same for all (Yeom et al. 2018).

    Args:
        target: φ of each record under the target, (records,).
        shadows: φ under each shadow, (shadows, records).
        seen: which records each shadow was trained on, (shadows, records).

    Returns:
        (records,), higher for those that seem to be members.

    >>> lira_scores(np.array([3.0, 1.0]), np.array([[1.0, 1.0], [1.0, 1.0]]), np.zeros((2, 2), dtype=bool)).tolist()
    [2.0, 0.0]
    """
    if not len(shadows):
        return target
    out = np.where(seen, np.nan, shadows)
    unseen = (~seen).sum(axis=0)
    means = np.where(unseen > 0, np.nansum(out, axis=0) / np.maximum(unseen, 1), shadows.mean(axis=0))
    residuals = (out - means)[~seen]
    freedom = max(1, int(np.maximum(unseen - 1, 0).sum()))
    spread = math.sqrt(float(np.sum(residuals**2)) / freedom)
    return np.asarray((target - means) / (spread if spread > 0.0 else 1.0))


def judge_attack(scores: Values, member: npt.NDArray[np.bool_]) -> Attack:
    """What an attack's scores are worth.

    Args:
        scores: (records,), higher for those that seem to be members.
        member: (records,), whether they are; at least eleven others.

    Raises:
        ValueError: too few of either kind.

    >>> scores = np.concatenate([np.arange(40.0) + 100.0, np.arange(20.0)])
    >>> attack = judge_attack(scores, np.arange(60) < 40)
    >>> attack.auc, attack.false_rate, attack.hit_rate
    (1.0, 0.5, 1.0)
    """
    inside, outside = scores[member], scores[~member]
    if len(inside) < 2 or len(outside) <= _FALSE_POSITIVES:
        raise ValueError(f"expected 2 members and {_FALSE_POSITIVES + 1} others, got {len(inside)} and {len(outside)}")
    auc, interval = _area(inside, outside)
    threshold = np.sort(outside)[-_FALSE_POSITIVES - 1]  # ten others lie above
    hits = int((inside > threshold).sum())
    low, _ = clopper_pearson(hits, len(inside), _ALPHA / 2.0)
    _, high = clopper_pearson(hits, len(inside), _ALPHA / 2.0)
    false_rates, hit_rates = _rates(inside, outside)
    sizes = (len(inside) + len(outside)) / (len(inside) * len(outside))
    return Attack(
        members=len(inside),
        others=len(outside),
        auc=auc,
        auc_interval=interval,
        false_rate=_FALSE_POSITIVES / len(outside),
        hit_rate=hits / len(inside),
        hit_interval=(low, high),
        advantage=float((hit_rates - false_rates).max()),
        chance=math.sqrt(-0.5 * math.log(_ALPHA) * sizes),  # one-sided, Smirnov 1944
        curve=_thinned(false_rates, hit_rates),
    )


def allowed_hit_rate(false_rate: float, *, epsilon: float, delta: float) -> float:
    """The highest hit rate that (ε, δ)-DP allows at a false positive rate (Kairouz et al. 2015).

    Args:
        false_rate: in [0, 1].
        epsilon: of the guarantee.
        delta: of the guarantee.

    >>> [round(allowed_hit_rate(0.1, epsilon=epsilon, delta=0.0), 3) for epsilon in (0.0, 1.0, 8.0)]
    [0.1, 0.272, 1.0]
    """
    steep = math.exp(min(epsilon, 700.0)) * false_rate + delta
    flat = 1.0 - math.exp(-epsilon) * (1.0 - delta - false_rate)
    return max(0.0, min(1.0, steep, flat))


def _area(inside: Values, outside: Values) -> tuple[float, tuple[float, float]]:
    """Area under the curve with its interval (DeLong, DeLong and Clarke-Pearson 1988), ties counting half."""
    from scipy.stats import rankdata

    everyone = rankdata(np.concatenate([inside, outside]))
    beaten = (everyone[: len(inside)] - rankdata(inside)) / len(outside)  # share of others below each member
    beating = 1.0 - (everyone[len(inside) :] - rankdata(outside)) / len(inside)  # share of members above each other
    auc = float(beaten.mean())
    variance = float(beaten.var(ddof=1) / len(inside) + beating.var(ddof=1) / len(outside))
    half = 1.959964 * math.sqrt(variance)
    return auc, (max(0.0, auc - half), min(1.0, auc + half))


def _rates(inside: Values, outside: Values) -> tuple[Values, Values]:
    """Both rates at every threshold, from the highest down."""
    thresholds = np.concatenate([[math.inf], np.unique(np.concatenate([inside, outside]))[::-1]])
    above = [1.0 - np.searchsorted(np.sort(values), thresholds) / len(values) for values in (outside, inside)]
    return above[0], above[1]


def _thinned(false_rates: Values, hit_rates: Values) -> tuple[tuple[float, float], ...]:
    """At most so many points, evenly spaced on a logarithmic axis, with the highest hit rate at each."""
    positive = false_rates[false_rates > 0.0]
    grid = np.unique(np.concatenate([[0.0], np.geomspace(positive[0], 1.0, _MOST_POINTS - 2), [1.0]]))
    last = np.searchsorted(false_rates, grid, side="right") - 1
    points = {(round(float(false_rates[i]), 6), round(float(hit_rates[i]), 6)) for i in last}
    return tuple(sorted(points))
