"""Client-level privacy at the server: a cohort nobody learns, one noised sum a round, charged before the draw."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from safetensors.numpy import load, save

from tacit.devices.failpoint import reach
from tacit.federated.averaging import decoded, from_record, part, to_record, views_of
from tacit.federated.clipping import AdaptiveClip, Arrays
from tacit.federated.evaluation import Evaluations, ask
from tacit.federated.mechanism import Mechanism, PrivacyRefused
from tacit.federated.noise import Randomness
from tacit.federated.rounds import FederationFailed
from tacit.federated.server_optimizer import ServerOptimizer
from tacit.federated.turns import Book, Granted, Refused, Replay, Reservation, Turn
from tacit.federated.update_codec import Codec

__all__ = ["SERVER", "PoissonCohorts", "ServerCharge"]

SERVER = "server"
_CLIP = "clip_norm"
_EVALUATION = 1_000_000  # keeps the public coins of evaluations apart from those of training, where nothing is secret


class RepliesLost(RuntimeError):
    """What was to be summed did not come, so nothing leaves; asked again, the noise is fresh."""


@dataclass(frozen=True, kw_only=True)
class ServerCharge:
    """One access to all clients, charged at the server before its cohort is drawn.

    Attributes:
        ledger: the server's; None for the twin.
        turn: what the ledger said.
    """

    ledger: Book | None
    turn: Turn

    @classmethod
    def reserve(
        cls, ledger: Book | None, mechanism: Mechanism, *, source: str, run: str, round_number: int, body: str
    ) -> ServerCharge:
        """Charges, or takes up what was charged before.

        Raises:
            PrivacyRefused: a guarantee, and no ledger to charge.
        """
        if ledger is None:
            if mechanism.private:
                raise PrivacyRefused("expected a ledger at the server for unit 'client', got none; nothing is charged")
            return cls(ledger=None, turn=Granted(""))
        request = Reservation(
            owner=SERVER, source=source, run=run, round=round_number, body=body, mechanism=mechanism.describe()
        )
        return cls(ledger=ledger, turn=ledger.reserve([request])[0])

    @property
    def granted(self) -> bool:
        """Whether a cohort may be drawn."""
        return isinstance(self.turn, Granted)

    def release(self, round_number: int, compute: Callable[[], Arrays]) -> Arrays | None:
        """What may be seen: computed once, on disk before it is returned; None where nothing may.

        A computation that raises is a failure: it stays charged, and the same request is not answered again. One whose
        replies were lost on the way was none.
        """
        if isinstance(self.turn, Replay):
            return load(self.turn.payload)
        if isinstance(self.turn, Refused):
            return None
        try:
            release = compute()
        except RepliesLost:
            raise
        except Exception:
            if self.ledger is not None:
                self.ledger.fail([self.turn.key])
            raise
        reach("server.after_noise")
        if self.ledger is not None:
            self.ledger.release(round_number, {self.turn.key: save(dict(release))})
        return release


@dataclass
class PoissonCohorts(Strategy):
    """DP-FedAvg with a cohort that nobody outside learns (McMahan et al. 2018).

    *Guarantees*: the release of a round is Σ clip(Δ_i) + N(0, (zC)²) over q·N_ref, charged before the cohort is drawn
    and on disk before anybody sees it. A client that does not answer, or whose answer breaks a rule that looks at
    nobody else, contributes zero. Neither the cohort nor its size leaves this object. An evaluation is the same with a
    second cohort, whose clients' shares of right and wrong answers are summed, noised and charged on their own.

    Attributes:
        mechanism: of unit client.
        rounds: planned, for the schedule.
        optimizer: what the server does with the noised average.
        randomness: makes a round's generator; secret for a guarantee.
        source: what the ledger calls the data.
        quorum: registered clients that must be reachable before the draw.
        ledger: None for the twin.
        clip: learned while training, or None for a fixed norm.
        optimizer_state: part of a checkpoint.
        codec: what answers are sent as, decoded before they are clipped; None for whole models.
        evaluations: when to ask a second cohort how often the model is right; never when None.
        folds: replies may be a stream that is read once.
    """

    mechanism: Mechanism
    rounds: int
    optimizer: ServerOptimizer
    randomness: Callable[[int], Randomness]
    source: str
    quorum: int
    ledger: Book | None
    clip: AdaptiveClip | None = None
    optimizer_state: Arrays = field(default_factory=dict)
    codec: Codec | None = None
    evaluations: Evaluations | None = None
    folds: ClassVar[bool] = True
    _weights: Arrays = field(default_factory=dict)
    _charge: ServerCharge = ServerCharge(ledger=None, turn=Refused("unavailable"))

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
        self._charge = self._reserve(self.mechanism, server_round, config, self._weights, "")
        turn = self._charge.turn
        if isinstance(turn, Refused) and turn.reason != "unavailable":
            raise PrivacyRefused(
                f"expected budget for round {server_round}, got {turn.reason}; the last model is kept in the checkpoint"
            )
        if not self._charge.granted:
            return []
        cohort = self.mechanism.draw_cohort(clients, self.randomness(server_round))
        return ask(cohort, MessageType.TRAIN, arrays, config)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The noised average through the server's optimizer; also of an empty cohort, which releases noise.

        Nothing for a round that was interrupted so often that its charge cannot be used again: the model stays.
        """
        release = self._charge.release(server_round, lambda: self._noised(server_round, replies))
        if release is None:
            return None, None
        if self.clip is not None:
            self.clip = self.clip.moved_to(float(release.pop(_CLIP)))
        weights, self.optimizer_state = self.optimizer.step(
            self._weights,
            {name: self._weights[name] + release[name] for name in self._weights},
            self.optimizer_state,
            server_round=server_round,
            rounds=self.rounds,
        )
        return to_record(weights), None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Charges a planned evaluation, then draws its own cohort; a refusal leaves it out and the run goes on."""
        self._charge = ServerCharge(ledger=None, turn=Refused("unavailable"))
        if self.evaluations is None or not self.evaluations.due(server_round):
            return []
        mechanism = self.evaluations.mechanism
        config = ConfigRecord({**config, "server-round": server_round})
        self._charge = self._reserve(mechanism, server_round, config, from_record(arrays), "evaluate\n")
        if not self._charge.granted:
            return []
        cohort = mechanism.draw_cohort(sorted(grid.get_node_ids()), self.randomness(_EVALUATION + server_round))
        return ask(cohort, MessageType.EVALUATE, arrays, config)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """What the noised shares say, also of an empty cohort; None when no evaluation was charged."""
        if self.evaluations is None:
            return None
        evaluations, contents = self.evaluations, [reply.content for reply in replies if reply.has_content()]
        release = self._charge.release(
            server_round, lambda: evaluations.noised(contents, self.randomness(-_EVALUATION - server_round))
        )
        return None if release is None else evaluations.of_cohort(release)

    def state(self) -> Arrays:
        """What a checkpoint keeps."""
        kept = {f"optimizer.{name}": array for name, array in self.optimizer_state.items()}
        if self.clip is not None:
            kept[_CLIP] = np.array(self.clip.clip_norm, np.float32)
        return kept

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Takes up what `state` kept."""
        if self.clip is not None and _CLIP in state:
            self.clip = self.clip.moved_to(float(state[_CLIP]))
        self.optimizer_state = part(dict(state), "optimizer.")

    def summary(self) -> None:
        """Nothing to log: the recipe says it all."""

    @property
    def _clip_norm(self) -> float:
        return self.mechanism.max_grad_norm if self.clip is None else self.clip.clip_norm

    def _reserve(
        self, mechanism: Mechanism, server_round: int, config: ConfigRecord, arrays: Arrays, purpose: str
    ) -> ServerCharge:
        text = purpose + json.dumps({name: str(config[name]) for name in sorted(config)})
        digest = hashlib.sha256(text.encode())
        for name, array in arrays.items():
            digest.update(name.encode() + array.tobytes())
        return ServerCharge.reserve(
            self.ledger,
            mechanism,
            source=self.source,
            run=str(config["run"]),
            round_number=server_round,
            body=digest.hexdigest(),
        )

    def _noised(self, server_round: int, replies: Iterable[Message]) -> Arrays:
        """One Gaussian event: the sum of updates and, where the clip is learned, the sum of bits."""
        randomness, multiplier = self.randomness(-server_round), self.mechanism.noise_multiplier
        bits: list[bool] = []
        on_bits = 0.0
        if self.clip is not None:
            on_bits = self.mechanism.noise_on_count(self.clip.bit_noise, randomness)
            multiplier = self.clip.update_noise_multiplier(multiplier)
        release = self.mechanism.noisy_average(
            self._updates(replies, bits),
            self._weights,
            randomness,
            clip_norm=self._clip_norm,
            noise_multiplier=multiplier,
        )
        if self.clip is None:
            return release
        return {_CLIP: np.array(self.clip.step(sum(bits), len(bits), on_bits).clip_norm, np.float32), **release}

    def _updates(self, replies: Iterable[Message], bits: list[bool]) -> Iterator[Arrays]:
        """Usable updates as they come, whose clients' bits are taken down.

        Raises:
            RepliesLost: the grid broke; nothing leaves, and the charge may be used again.
        """
        stream = iter(replies)
        while True:
            try:
                reply = next(stream, None)
            except Exception as error:
                raise RepliesLost(str(error)) from error
            if reply is None:
                return
            update = self._contribution(reply.content) if reply.has_content() else None
            if update is not None:
                bits.append(_unclipped(reply.content))
                del reply
                yield update
            del update

    def _contribution(self, content: RecordDict) -> Arrays | None:
        """A client's update, or None when it breaks a rule that looks at this reply alone."""
        record = content.get("arrays")
        if not isinstance(record, ArrayRecord):
            return None
        try:
            arrays = decoded(views_of(record), self._weights, self.codec)
        except (ValueError, TypeError, EOFError):
            return None
        if list(arrays) != list(self._weights):
            return None
        if any(_kind(arrays[name]) != _kind(self._weights[name]) for name in arrays):
            return None
        return {name: arrays[name] - self._weights[name] for name in self._weights}


def _kind(array: np.ndarray) -> tuple[object, ...]:
    return array.dtype, array.shape


def _unclipped(content: RecordDict) -> bool:
    """The client's own bit, taken before it clipped; anything but 1 is 0, so that nobody counts for more than one."""
    metrics = content.get("metrics")
    return isinstance(metrics, MetricRecord) and metrics.get("unclipped") == 1
