"""Measures model files in the browser of any phone or computer on the network; nothing has to be installed there.

A browser runs a model several times slower than an app on the same device does, and tells no temperature, no memory and
no clock finer than 5 microseconds. So a result bears the label "in-browser", and ranks models and devices.
"""

import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tacit.devices.answers import DeviceUnreachable, Timed
from tacit.devices.asking import Sustained, TimedGroup
from tacit.devices.browser_invitation import Invitation, addresses_of, certificate, is_loopback, qr_lines
from tacit.devices.browser_job import RUNTIMES, Job, checked, prepare
from tacit.devices.browser_parity import TYPES, is_shape
from tacit.devices.browser_server import Served, serve
from tacit.devices.browser_session import ModelState, PageSession
from tacit.devices.device import Artifact
from tacit.devices.entries import Entry, accuracy_entry, delegate_of, entry_of, flagged, result_key, sustained_entry
from tacit.devices.protocol import SCHEMA_VERSION, Evaluation
from tacit.devices.schedule import Mode

__all__ = ["LABEL", "Invitation", "measure_in_browser"]

LABEL = "in-browser"
Values = npt.NDArray[Any]
_SILENCE_S = 90.0  # a page in a phone that sleeps is heard every minute
_PARTING_S = 2.5  # a page that is in front is heard every two seconds
_SLOWED = 0.10
_LOOK_S = 0.25
_UNKNOWABLE = {
    "peak_memory_bytes": "a browser does not tell what memory a model takes",
    "cold": "a page is no process of its own",
    "energy": "a browser does not tell what energy it takes",
    "profile": "the runtimes for browsers have no profiler of operators",
}
_BROWSERS = (
    ("Edge", r"\bEdgA?/(\d+)"),
    ("Opera", r"\bOPR/(\d+)"),
    ("Samsung Internet", r"\bSamsungBrowser/(\d+)"),
    ("Firefox", r"\b(?:Firefox|FxiOS)/(\d+)"),
    ("Chrome", r"\b(?:Headless)?(?:Chrome|CriOS)/(\d+)"),
    ("Safari", r"\bVersion/(\d+)[\d.]* .*\bSafari/"),
)
_SYSTEMS = ("iPhone", "iPad", "Android", "Windows", "CrOS", "Mac OS X", "Linux")


def measure_in_browser(
    artifacts: Sequence[Artifact],
    inputs: Values | Sequence[Values],
    *,
    invite: Callable[[Invitation], None],
    host: str | None = None,
    port: int = 0,
    mode: Mode = "quick",
    sustained_s: float | None = None,
    evaluation: Evaluation | None = None,
    wait_s: float = 600.0,
    check: Callable[[], None] | None = None,
    keep: Callable[[str, Entry], None] | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Serve a page that measures model files in the browser that opens it, and return what that tells.

    The page runs .onnx files in onnxruntime-web and .tflite files in LiteRT.js, those of one runtime in turn, in blocks
    of 20 ms. It reports as it goes: when it is closed, what was measured by then is the result, and the rest is said to
    be not measured. Whoever opens the link first takes the job; everybody else is refused.

    *Guarantees.* Nothing but the page, these files and these inputs is served, to those who know a token of 128 random
    bits. No figure is believed that does not fit into the time that has passed here.

    Args:
        artifacts: Model files, no two of one name.
        inputs: ``(n, *shape)``, preprocessed, channel first, float32, int32 or int64; of a model that has several, all
            of them. The first 256 are used.
        invite: Called with the link once the page is there: show its ``lines()`` to whoever holds the phone.
        host: The address to serve on; by default this computer's on the network, over HTTPS with a certificate made for
            it. On the loopback ("127.0.0.1") over HTTP, which browsers trust there.
        port: The port; 0 for any that is free.
        mode: "quick" or "full".
        sustained_s: Seconds to run each model for afterwards, at most 3600, to see it slow down as the device heats up.
        evaluation: What answers are compared on: the first 256 examples, or as many as 5 s (full: 20 s) allow.
        wait_s: Seconds to wait for the page to be opened and started.
        check: Called a few times a second; what it raises ends the measurement.
        keep: Called with name and entry of an artifact once all its runs are here.
        progress: Called with a line for people, also from other threads.

    Returns:
        As of ``protocol.measure``, with ``"label": "in-browser"``. ``failed`` says why an artifact has no figures at
        all; an entry of few runs, since the page was closed, is flagged "incomplete".

    Raises:
        ValueError: Names repeat, or an argument is out of range.
        ModuleNotFoundError: The page's runtimes are not there, or ``cryptography`` is missing.
        DeviceUnreachable: There is no network, the port is taken, or nobody opened the page.
    """
    say = progress or _say_nothing
    job = prepare(artifacts, inputs, mode=mode, sustained_s=sustained_s, evaluation=evaluation)
    session = PageSession(pages=job.pages, held=job.held, job=job.told, models=job.models(), say=say)
    run = _Run(job=job, session=session, mode=mode, evaluation=evaluation, sustained_s=sustained_s, say=say)
    session.summary = run.summary
    address, names = addresses_of(host)
    tls, fingerprint = (None, None) if is_loopback(address) else certificate(names)
    with ExitStack() as held:
        serving = serve(session, host=address, port=port, names=names, tls=tls, failed=say)
        try:
            served = held.enter_context(serving)
        except OSError as error:
            raise DeviceUnreachable(
                f"browser: expected to serve a page on {address}, port {port or 'any'}, got: {error.strerror}; choose "
                "another port or host"
            ) from None
        held.callback(lambda: session.dismiss("it was interrupted there", _PARTING_S))
        invite(Invitation(url=served.url, fingerprint=fingerprint, qr=qr_lines(served.url)))
        _wait(run, served, wait_s, keep or _keep_nothing, check or _go_on)
    return run.result(served.refusals)


@dataclass(frozen=True, kw_only=True)
class _Run:
    """A measurement, and the session that tells of it."""

    job: Job
    session: PageSession
    mode: Mode
    evaluation: Evaluation | None
    sustained_s: float | None
    say: Callable[[str], None]

    def entries(self) -> dict[str, Entry]:
        """Of all models that were timed, by the name in the job."""
        made: dict[str, Entry] = {}
        for runtime in RUNTIMES.values():
            models = {name: model for name, model in self.session.models.items() if model.runtime == runtime}
            timed = {name: _timed_of(model) for name, model in models.items() if model.samples_ns}
            if timed:
                made |= self._group(runtime, models, timed)
        return made

    def _group(self, runtime: str, models: Mapping[str, ModelState], timed: Mapping[str, Timed]) -> dict[str, Entry]:
        moments = self.session.conditions.get(runtime, {})
        group = TimedGroup(
            timed={models[name].name: [timing] for name, timing in timed.items()},
            before=moments.get("before", {}),
            after=moments.get("after", {}),
            failed={},
        )
        first = self.job.placed[next(iter(timed))]
        is_complete = runtime in self.session.complete
        return {
            name: self._entry(models[name], entry_of(self.job.placed[name], group, first, self.mode), is_complete)
            for name in timed
        }

    def _entry(self, model: ModelState, entry: Entry, is_complete: bool) -> Entry:
        reasons, early = dict(_UNKNOWABLE), self.session.reason or "the page has not told all of it"
        made = {
            **entry,
            "key": result_key(sha256=entry["sha256"], runtime=model.runtime, mode=self.mode, threads=1),
            "runtime": model.runtime,
            "delegate": delegate_of(model.runtime.lower()),
            "phone": phone_of(self.session.facts),
            "load_us": None if model.load_ns is None else model.load_ns / 1000,
        }
        if not is_complete:
            made = flagged(made, "incomplete")
        if model.buckets:
            count = len(model.buckets)
            run = Sustained(
                buckets=model.buckets,
                start={},
                conditions=[{}] * count,
                asked_s=self.sustained_s or 0.0,
            )
            made["sustained"] = sustained_entry(run)
            if made["sustained"] and made["sustained"]["change"] > _SLOWED:
                made = flagged(made, "slowed")
        elif self.sustained_s:
            reasons["sustained"] = early
        if self.evaluation is not None:
            try:
                made["accuracy"] = _accuracy(model.outputs, self.evaluation)
            except ValueError as error:
                reasons["accuracy"] = str(error) if model.outputs is not None else early
        return {**made, "not_measured": reasons}

    def summary(self) -> dict[str, Any]:
        """What the page shows at the end, by the name in the job."""
        made = self.entries()
        first: dict[str, str] = {}
        for name, entry in made.items():
            first.setdefault(entry["runtime"], name)
        return {"artifacts": {name: _shown(entry, is_first=name in first.values()) for name, entry in made.items()}}

    def result(self, refusals: Mapping[int, int]) -> dict[str, Any]:
        """What ``measure_in_browser`` returns."""
        session = self.session
        with session.snapshot():
            made = self.entries()
            failed = {model.name: self._reason(model) for name, model in session.models.items() if name not in made}
            by_name = {session.models[name].name: entry for name, entry in made.items()}
            conditions = {
                runtime: {"before": {}, "after": {}, **found} for runtime, found in session.conditions.items()
            }
            facts = {**session.facts, "refused_requests": sum(refusals.values())}
        return {
            "schema_version": SCHEMA_VERSION,
            "device": device_name(str(facts.get("user_agent"))),
            "label": LABEL,
            "mode": self.mode,
            "facts": {**facts, **{_fact(runtime): version for runtime, version in self.job.versions.items()}},
            "conditions": conditions,
            "artifacts": {name: by_name[name] for name in self.job.names if name in by_name},
            "failed": {name: reason for name in self.job.names if (reason := (failed | self.job.refused).get(name))},
        }

    def _reason(self, model: ModelState) -> str:
        return model.reason or f"not measured: {self.session.reason or 'the page did not come to it'}"


def device_name(user_agent: str) -> str:
    """Name a browser by what it says of itself, in words of ours.

    >>> device_name("Mozilla/5.0 (Linux; Android 16; K) AppleWebKit/537.36 Chrome/156.0.0.0 Mobile Safari/537.36")
    'browser: Chrome 156, Android'
    """
    found = ((name, re.search(pattern, user_agent)) for name, pattern in _BROWSERS)
    browser = next((f"{name} {match[1][:4]}" for name, match in found if match), "unknown")
    system = next((name for name in _SYSTEMS if name in user_agent), None)
    return f"browser: {browser}" + (f", {system}" if system else "")


def phone_of(facts: Mapping[str, object]) -> str:
    """Tell a phone from another one, as far as a page can.

    >>> phone_of({"user_agent": "Android 16 Chrome/156.0 Mobile", "cores": 8, "screen": "412x915@2.6"})
    'browser: Chrome 156, Android; 8 cores; 412x915@2.6'
    """
    told = [f"{facts['cores']} cores" if facts.get("cores") else None, facts.get("screen")]
    return "; ".join([device_name(str(facts.get("user_agent"))), *(str(one) for one in told if one)])


def _wait(
    run: _Run, served: Served, wait_s: float, keep: Callable[[str, Entry], None], check: Callable[[], None]
) -> None:
    """Until the page has told everything, is closed, falls silent or takes too long."""
    session, kept, limit_s = run.session, set[str](), time.monotonic() + wait_s
    while not session.started.wait(max(0.0, min(_LOOK_S, limit_s - time.monotonic()))) and time.monotonic() < limit_s:
        check()
    if not session.started.is_set():
        refused = f" ({sum(served.refusals.values())} requests were refused)" if served.refusals else ""
        raise DeviceUnreachable(
            f"browser: expected the page to be opened and started within {wait_s:g} s, got nobody{refused}; are both "
            "devices on one network, and does a firewall let this port through?"
        )
    run.say(f"started in {device_name(str(session.facts.get('user_agent')))}")
    limit_s = time.monotonic() + run.job.limit_s
    while not session.ended.wait(_LOOK_S):
        check()
        _keep_complete(run, kept, keep)
        if time.monotonic() - session.heard_s > _SILENCE_S:
            session.end(f"the page has said nothing for {_SILENCE_S:g} s")
        elif time.monotonic() > limit_s:
            session.end(f"the page took more than {run.job.limit_s:.0f} s")
    if session.reason is not None:
        run.say(f"ended early: {session.reason}; what was measured so far is kept")
    _keep_complete(run, kept, keep)


def _keep_complete(run: _Run, kept: set[str], keep: Callable[[str, Entry], None]) -> None:
    if set(run.session.complete) <= kept:
        return
    with run.session.snapshot():
        complete, made = set(run.session.complete), run.entries()
    for name, entry in made.items():
        if entry["runtime"] in complete - kept:
            keep(run.session.models[name].name, entry)
    kept |= complete


def _timed_of(model: ModelState) -> Timed:
    return Timed(
        samples_ns=np.array(model.samples_ns, dtype=np.int64),
        runs_per_sample=model.runs_per_sample,
        steal_share=None,
        block_samples=model.block_samples,
        warmup=model.warmup,
    )


def _accuracy(content: bytes | None, evaluation: Evaluation) -> Entry:
    """Of the outputs that were posted, in the order of the inputs; raises ValueError where they are none."""
    arrays = checked(evaluation.inputs)
    outputs = _outputs(content or b"", len(arrays[0]))
    count = len(outputs)
    labels, expected = (
        None if one is None else np.asarray(one)[:count] for one in (evaluation.labels, evaluation.expected)
    )
    if expected is not None:
        if expected.size != outputs.size:
            raise ValueError(f"expected outputs like {expected.shape}, got {outputs.shape} from the page")
        expected = expected.reshape(outputs.shape)
    return accuracy_entry(outputs, labels, expected)


def _outputs(content: bytes, most: int) -> Values:
    """The outputs ``(n, ...)`` of the first n examples: a line that describes one, and n of them."""
    head, _, rest = content.partition(b"\n")
    try:
        [described] = json.loads(head[:1000])
        kind, shape = TYPES[described["type"]], tuple(described["shape"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError("expected outputs of examples from the page, got something else") from None
    size = kind.itemsize * math.prod(shape) if is_shape(shape) else 0
    if not size or len(rest) % size or not 0 < len(rest) // size <= most:
        raise ValueError("expected whole outputs of examples from the page, got another number of bytes")
    outputs: Values = np.frombuffer(rest, dtype=kind).reshape(len(rest) // size, *shape[1:])
    if not np.isfinite(outputs).all():
        raise ValueError("expected finite outputs from the page, got others")
    return outputs


def _shown(entry: Entry, *, is_first: bool) -> dict[str, Any]:
    """What the page shows at the end, which is what the computer shows: accuracy, else how often answers agree."""
    found = entry["accuracy"] or {}
    kind = next((kind for kind in ("top1", "agreement") if found.get(kind)), None)
    return {
        "p50_us": entry["p50_us"],
        "p90_us": entry["p90_us"],
        "ci_us": entry["ci"]["p50_us"],
        "relative": entry["relative"],
        "is_first": is_first,
        "flags": entry["flags"],
        "accuracy": None if kind is None else {"kind": kind, "n": found["n"], "share": found[kind]["estimate"]},
    }


def _fact(runtime: str) -> str:
    return runtime.lower().replace("-", "_").replace(".", "_")


def _go_on() -> None:
    """Nobody interrupts."""


def _say_nothing(message: str) -> None:
    del message


def _keep_nothing(name: str, entry: Entry) -> None:
    del name, entry
