"""Client-level privacy at the server: a cohort nobody learns, one noised sum a round, charged before the draw."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from safetensors.numpy import load, save

from tacit.federated.averaging import ServerOptimizer, from_record, momentum_step, to_record
from tacit.federated.clipping import AdaptiveClip, Arrays
from tacit.federated.ledger import Granted, Ledger, Refused, Replay, Reservation, Turn
from tacit.federated.mechanism import Mechanism, PrivacyRefused
from tacit.federated.noise import Randomness
from tacit.federated.rounds import FederationFailed

__all__ = ["PoissonCohorts"]

_SERVER = "server"
_CLIP = "clip_norm"


@dataclass
class PoissonCohorts(Strategy):
    """DP-FedAvg with a cohort that nobody outside learns (McMahan et al. 2018).

    *Guarantees*: the release of a round is Σ clip(Δ_i) + N(0, (zC)²) over q·N_ref, charged before the cohort is drawn
    and on disk before anybody sees it. A client that does not answer, or whose answer breaks a rule that looks at
    nobody else, contributes zero. Neither the cohort nor its size leaves this object.

    Attributes:
        mechanism: of unit client.
        rounds: planned, for the schedule.
        optimizer: what the server does with the noised average.
        randomness: makes a round's generator; secret for a guarantee.
        source: what the ledger calls the data.
        quorum: registered clients that must be reachable before the draw.
        ledger: None for the twin.
        clip: learned while training, or None for a fixed norm.
        velocity: the server's momentum, part of a checkpoint.
    """

    mechanism: Mechanism
    rounds: int
    optimizer: ServerOptimizer
    randomness: Callable[[int], Randomness]
    source: str
    quorum: int
    ledger: Ledger | None
    clip: AdaptiveClip | None = None
    velocity: Arrays | None = None
    _weights: Arrays = field(default_factory=dict)
    _turn: Turn | None = None

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Charges the round, then draws its cohort.

        Raises:
            FederationFailed: fewer reachable clients than the quorum; nothing was charged.
            PrivacyRefused: the budget is spent.
        """
        clients = sorted(grid.get_node_ids())
        if len(clients) < self.quorum:
            raise FederationFailed(
                f"expected at least {self.quorum} reachable clients in round {server_round}, got {len(clients)}; "
                "lower federated.quorum or bring clients back, then resume"
            )
        self._weights = from_record(arrays)
        config = ConfigRecord({**config, "server-round": server_round, _CLIP: self._clip_norm})
        self._turn = self._reserve(server_round, config)
        if isinstance(self._turn, Replay):
            return []
        content = RecordDict({"arrays": arrays, "config": config})
        cohort = self.mechanism.draw_cohort(clients, self.randomness(server_round))
        return [Message(content, client, MessageType.TRAIN) for client in cohort]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The noised average through the server's optimizer; also of an empty cohort, which releases noise."""
        if isinstance(self._turn, Replay):
            release = load(self._turn.payload)
        else:
            release = self._release(server_round, [r.content for r in replies if r.has_content()])
        if self.clip is not None:
            self.clip = self.clip.moved_to(float(release.pop(_CLIP)))
        weights, self.velocity = momentum_step(
            self._weights,
            {name: self._weights[name] + release[name] for name in self._weights},
            self.velocity,
            learning_rate=self.optimizer.rate(server_round, self.rounds),
            momentum=self.optimizer.momentum,
        )
        return to_record(weights), None

    def state(self) -> Arrays:
        """What a checkpoint keeps."""
        kept = {f"velocity.{name}": array for name, array in (self.velocity or {}).items()}
        if self.clip is not None:
            kept[_CLIP] = np.array(self.clip.clip_norm, np.float32)
        return kept

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Takes up what `state` kept."""
        if self.clip is not None and _CLIP in state:
            self.clip = self.clip.moved_to(float(state[_CLIP]))
        velocity = {n.removeprefix("velocity."): a for n, a in state.items() if n.startswith("velocity.")}
        self.velocity = velocity or None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """None: figures from a client's records would have to be charged."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """None, as above."""
        return None

    def summary(self) -> None:
        """Nothing to log: the recipe says it all."""

    @property
    def _clip_norm(self) -> float:
        return self.mechanism.max_grad_norm if self.clip is None else self.clip.clip_norm

    def _reserve(self, server_round: int, config: ConfigRecord) -> Turn:
        if self.ledger is None:
            return Granted("")
        digest = hashlib.sha256(json.dumps({name: str(config[name]) for name in sorted(config)}).encode())
        for name, array in self._weights.items():
            digest.update(name.encode() + array.tobytes())
        request = Reservation(
            owner=_SERVER,
            source=self.source,
            run=str(config["run"]),
            round=server_round,
            body=digest.hexdigest(),
            mechanism=self.mechanism.describe(),
        )
        turn = self.ledger.reserve([request])[0]
        if isinstance(turn, Refused):
            raise PrivacyRefused(
                f"expected budget for round {server_round}, got {turn.reason}; the last model is kept in the checkpoint"
            )
        return turn

    def _release(self, server_round: int, contents: list[RecordDict]) -> Arrays:
        """One Gaussian event: the sum of updates and, where the clip is learned, the sum of bits."""
        answers = [(content, self._contribution(content)) for content in contents]
        usable = [update for _, update in answers if update is not None]
        randomness, multiplier = self.randomness(-server_round), self.mechanism.noise_multiplier
        release: Arrays = {}
        if self.clip is not None:
            unclipped = sum(_unclipped(content) for content, update in answers if update is not None)
            noise = float(randomness.gaussian(1, self.clip.bit_noise)[0]) if self.mechanism.private else 0.0
            release[_CLIP] = np.array(self.clip.step(unclipped, len(usable), noise).clip_norm, np.float32)
            multiplier = self.clip.update_noise_multiplier(multiplier)
        release |= self.mechanism.noisy_average(
            usable, self._weights, randomness, clip_norm=self._clip_norm, noise_multiplier=multiplier
        )
        if self.ledger is not None and isinstance(self._turn, Granted):
            self.ledger.release(server_round, {self._turn.key: save(dict(release))})
        return release

    def _contribution(self, content: RecordDict) -> Arrays | None:
        """A client's update, or None when it breaks a rule that looks at this reply alone."""
        record = content.array_records.get("arrays")
        if record is None or list(record) != list(self._weights):
            return None
        try:
            arrays = from_record(record)
        except (ValueError, TypeError, EOFError):
            return None
        if any(arrays[name].shape != self._weights[name].shape for name in arrays):
            return None
        return {name: arrays[name] - self._weights[name] for name in self._weights}


def _unclipped(content: RecordDict) -> bool:
    """The client's own bit, taken before it clipped; anything but 1 is 0, so that nobody counts for more than one."""
    metrics = content.metric_records.get("metrics")
    return metrics is not None and metrics.get("unclipped") == 1
