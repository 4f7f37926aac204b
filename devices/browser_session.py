"""What a page has told of a measurement so far. It may be any page, or none: what it posts is checked before it counts.

A page takes the job with its facts, once; then it reports in order, each report with a number. What is out of order,
out of range or about a model that nobody asked for is refused, and changes nothing.
"""

import json
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tacit.devices.answers import Warmup, believe_facts, believe_integer, believe_timings, printable
from tacit.devices.browser_server import Reply, RequestRefused
from tacit.devices.conditions import Conditions
from tacit.devices.sandbox import ArtifactRefused
from tacit.devices.side_answers import Bucket, believe_buckets

_REPORT_BYTES, _OUTPUT_BYTES = 1 << 20, 16 << 20
_MOST_REPORTS, _MOST_SAMPLES, _MOST_BUCKETS = 100_000, 500_000, 4096  # hours of sustained runs
_NONCE = 32

File = tuple[str, bytes | Path]  # its kind, and what is in it or where it lies
_Told = dict[str, Any]


@dataclass(kw_only=True)
class ModelState:
    """What is known of one model."""

    name: str
    runtime: str
    load_ns: int | None = None
    reason: str | None = None  # why it was not measured
    outputs: bytes | None = None
    samples_ns: list[int] = field(default_factory=list)
    runs_per_sample: int = 1
    block_samples: int | None = None
    warmup: Warmup | None = None
    rows: list[object] = field(default_factory=list)
    buckets: list[Bucket] = field(default_factory=list)


class PageSession:
    """One measurement as its page tells it; the site that ``browser_server`` serves.

    Args:
        pages: Files for whoever knows the link, by name.
        held: Files for the page that took the job: models and inputs.
        job: What there is to do, which the page shows before it takes it.
        models: By the names that reports use.
        say: Called with a line for people, from another thread.

    Attributes:
        summary: Makes what the page shows at the end.
    """

    def __init__(
        self,
        *,
        pages: Mapping[str, File],
        held: Mapping[str, File],
        job: Mapping[str, Any],
        models: Mapping[str, ModelState],
        say: Callable[[str], None],
    ) -> None:
        self._pages, self._held, self._job, self._say = pages, held, job, say
        self.summary: Callable[[], Mapping[str, Any]] = dict
        self.models, self.facts = models, believe_facts({})
        self.conditions: dict[str, dict[str, Conditions]] = {}
        self.complete: list[str] = []  # runtimes
        self.started, self.ended = threading.Event(), threading.Event()
        self.parted = threading.Event()  # the page knows that it is over, or is no more
        self.reason: str | None = None  # why it ended early
        self.heard_s = time.monotonic()
        self._lock = threading.Lock()
        self._key, self._nonce, self._expected, self._claimed_ns, self._started_s = "", "", 1, 0, 0.0
        self._readers: dict[str, Callable[[_Told], None]] = {
            "alive": lambda told: None,
            "clock": self._clock,
            "complete": self._complete,
            "failed": self._failed,
            "loaded": self._loaded,
            "moment": self._moment,
            "sustained": self._sustained,
            "timed": self._timed,
        }

    def get(self, name: str, session: str) -> Reply:
        """A file; what is the job's only for the page that took it."""
        if name == "job":
            if self.started.is_set():
                raise RequestRefused(409, "this link has been used; start the measurement again for another one")
            return Reply(kind="application/json", content=json.dumps(self._job).encode())
        if name in self._held:
            self._require(session)
        found = self._pages.get(name or "measure.html") or self._held.get(name)
        if found is None:
            raise RequestRefused(404, "expected a file of this page")
        kind, content = found
        return Reply(kind=kind, content=content if isinstance(content, bytes) else content.read_bytes())

    def allow(self, name: str, session: str) -> int:
        """How much may be posted there."""
        if name == "start":
            return _REPORT_BYTES
        self._require(session)
        known = name in self._readers or name in ("ended", "closed") or name.startswith("outputs/")
        if not known or (name.startswith("outputs/") and name.removeprefix("outputs/") not in self.models):
            raise RequestRefused(404, "expected a report that this page makes, of a model of this job")
        return _OUTPUT_BYTES if name.startswith("outputs/") else _REPORT_BYTES

    def post(self, name: str, headers: dict[str, str], body: bytes) -> Reply:
        """Take a report."""
        wanted = "application/octet-stream" if name.startswith("outputs/") else "application/json"
        if headers.get("content-type") != wanted:
            raise RequestRefused(415, f"expected Content-Type {wanted}")
        told = {} if name.startswith("outputs/") else _parsed(body)
        with self._lock:
            if name == "start":
                return _reply({"session": self._start(told)})
            if self.ended.is_set():
                self.parted.set()
                raise RequestRefused(410, self.reason or "the measurement has ended")
            if name == "closed":
                self.end("the page was closed")
                self.parted.set()
                return _reply({})
            if not self._is_next(headers.get("x-tacit-sequence", "")):
                return _reply({})  # said before, and its answer lost on the way
            self._expected += 1  # also where it is refused: what comes next may be right
            self.heard_s = time.monotonic()
            try:
                answer = self._take(name, told, body)
            except ArtifactRefused as refused:
                raise RequestRefused(422, str(refused)) from None
            return _reply(answer)

    def end(self, reason: str | None) -> None:
        """Nothing more is taken."""
        if not self.ended.is_set():
            self.reason = reason
            self.ended.set()

    def dismiss(self, reason: str, wait_s: float) -> None:
        """End it from here, and wait until the page has asked and been told, so that it does not measure on."""
        if self.started.is_set():
            self.end(reason)
            self.parted.wait(wait_s)

    def snapshot(self) -> threading.Lock:
        """To be held while results are made of what is here."""
        return self._lock

    def _require(self, session: str) -> None:
        if not self._key or not secrets.compare_digest(session.encode(), self._key.encode()):
            raise RequestRefused(401, "expected the page that took the job")

    def _start(self, told: _Told) -> str:
        nonce = told.get("nonce")
        if not isinstance(nonce, str) or len(nonce) != _NONCE or not nonce.isascii():
            raise RequestRefused(422, "expected a nonce of 32 letters")
        if self.started.is_set():
            if not secrets.compare_digest(nonce, self._nonce):
                raise RequestRefused(409, "this link has been used; start the measurement again for another one")
            return self._key
        self._nonce, self._key = nonce, secrets.token_urlsafe(24)
        self.facts = believe_facts(told.get("facts"))
        self._started_s = self.heard_s = time.monotonic()
        self.started.set()
        return self._key

    def _is_next(self, sequence: str) -> bool:
        if not (sequence.isascii() and sequence.isdigit() and len(sequence) < 8):
            raise RequestRefused(400, "expected X-Tacit-Sequence, a whole number")
        if int(sequence) > self._expected:
            raise RequestRefused(409, f"expected report {self._expected}, got {sequence}; one was lost")
        if self._expected > _MOST_REPORTS:
            raise RequestRefused(429, f"expected at most {_MOST_REPORTS} reports")
        return int(sequence) == self._expected

    def _take(self, name: str, told: _Told, body: bytes) -> Mapping[str, Any]:
        if name == "ended":
            reason = told.get("reason")
            self.end(None if reason is None else printable(str(reason)))
            self.parted.set()
            return self.summary()
        if name.startswith("outputs/"):
            self.models[name.removeprefix("outputs/")].outputs = body
        else:
            self._readers[name](told)
        return {}

    def _model(self, told: _Told) -> ModelState:
        found = self.models.get(name) if isinstance(name := told.get("model"), str) else None
        if found is None:
            raise RequestRefused(404, "expected a model of this job")
        return found

    def _runtime(self, told: _Told) -> str:
        runtime = told.get("runtime")
        if not isinstance(runtime, str) or runtime not in {model.runtime for model in self.models.values()}:
            raise RequestRefused(404, "expected a runtime of this job")
        return runtime

    def _wall_ns(self) -> int:
        return int((time.monotonic() - self._started_s) * 1e9)

    def _clock(self, told: _Told) -> None:
        tick_ns = believe_integer(told, "tick_ns", low=1, high=10**10)
        self.facts |= {"clock_tick_us": tick_ns / 1000}

    def _complete(self, told: _Told) -> None:
        runtime = self._runtime(told)
        if runtime not in self.complete:
            self.complete.append(runtime)
            self._say(f"{runtime}: all runs are here")

    def _failed(self, told: _Told) -> None:
        model = self._model(told)
        model.reason = printable(str(told.get("reason")))
        self._say(f"{model.name}: not measured: {model.reason}")

    def _loaded(self, told: _Told) -> None:
        model = self._model(told)
        model.load_ns = believe_integer(told, "load_ns", low=1, high=self._wall_ns())
        self._say(f"{model.name}: loaded in {model.load_ns / 1e6:.0f} ms")

    def _moment(self, told: _Told) -> None:
        runtime, when = self._runtime(told), told.get("when")
        if when not in ("before", "after"):
            raise RequestRefused(422, 'expected when "before" or "after"')
        kept = {key: told[key] for key in ("battery_percent", "charging", "hidden") if type(told.get(key)) is int}
        self.conditions.setdefault(runtime, {})[str(when)] = believe_facts(kept)

    def _sustained(self, told: _Told) -> None:
        model, rows = self._model(told), told.get("buckets")
        if not isinstance(rows, list) or len(model.rows) + len(rows) > _MOST_BUCKETS:
            raise RequestRefused(422, f"expected at most {_MOST_BUCKETS} buckets")
        if not model.rows:
            self._say(f"{model.name}: sustained run")
        model.buckets = believe_buckets({"buckets": model.rows + rows}, self._wall_ns() / 1e9)
        model.rows += rows

    def _timed(self, told: _Told) -> None:
        runtime, entries = self._runtime(told), told.get("models")
        names = list(entries) if isinstance(entries, dict) else []
        if not names or any(name not in self.models or self.models[name].runtime != runtime for name in names):
            raise RequestRefused(404, "expected models of this runtime and job")
        for entry in entries.values() if isinstance(entries, dict) else []:
            warmup = entry.get("warmup") if isinstance(entry, dict) else None
            if isinstance(warmup, dict) and type(warmup.get("slope")) is int:
                warmup["slope"] = float(warmup["slope"])  # JavaScript has one kind of number
        timed = believe_timings({"models": entries}, names, self._wall_ns() / 1e9)
        claimed_ns = sum(int(entry.samples_ns.sum()) * entry.runs_per_sample for entry in timed.values())
        if self._claimed_ns + claimed_ns > self._wall_ns():
            raise RequestRefused(422, "expected no more timed work than time has passed")
        for name, entry in timed.items():
            model = self.models[name]
            same = (entry.runs_per_sample, entry.block_samples) == (model.runs_per_sample, model.block_samples)
            if entry.block_samples is None or (model.samples_ns and not same):
                raise RequestRefused(422, "expected blocks of one size")
            if len(model.samples_ns) + len(entry.samples_ns) > _MOST_SAMPLES:
                raise RequestRefused(422, f"expected at most {_MOST_SAMPLES} samples of a model")
        self._claimed_ns += claimed_ns
        if not any(self.models[name].samples_ns for name in names):
            self._say(f"{', '.join(self.models[name].name for name in names)}: latency in {runtime}, interleaved")
        for name, entry in timed.items():
            model = self.models[name]
            model.samples_ns += entry.samples_ns.tolist()
            model.runs_per_sample, model.block_samples = entry.runs_per_sample, entry.block_samples
            model.warmup = model.warmup or entry.warmup


def _parsed(body: bytes) -> _Told:
    try:
        told = json.loads(body)
    except (ValueError, RecursionError):
        told = None
    if not isinstance(told, dict):
        raise RequestRefused(400, "expected a JSON object")
    return told


def _reply(answer: Mapping[str, Any]) -> Reply:
    return Reply(kind="application/json", content=json.dumps(answer).encode())
