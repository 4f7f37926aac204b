"""A phone's browser as a device: what its page tells becomes a result; whoever else asks, or lies, changes nothing."""

import http.client
import json
import os
import re
import shutil
import socket
import ssl
import sys
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tacit.devices import browser, browser_job, browser_server, browser_session, judgement
from tacit.devices.answers import DeviceUnreachable
from tacit.devices.browser import device_name, measure_in_browser
from tacit.devices.browser_invitation import Invitation, addresses_of, certificate, lan_addresses, qr_lines
from tacit.devices.browser_server import Reply, serve
from tacit.devices.device import Artifact
from tacit.devices.protocol import Evaluation

sys.path.insert(0, str(Path(__file__).parent))  # tests are no package
import hostile_files

WEB = Path(browser.__file__).with_name("web")
PAGES = sorted(path for path in WEB.iterdir() if path.is_file())
MS = 1_000_000


@dataclass
class Phone:
    """A page that does what it is told, also what it should not."""

    url: str
    session: str = ""
    sequence: int = 0
    nonce: str = "n" * 32

    def ask(self, name="", body=None, *, method=None, host=None, origin=None, path=None, headers=()):
        parts = urlsplit(self.url)
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=10)
        sent = {"Host": host or parts.netloc, "X-Tacit-Session": self.session, **dict(headers)}
        if body is not None:
            sent = {"Origin": origin or f"http://{parts.netloc}", "Content-Type": "application/json", **sent}
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
        try:
            connection.request(method or ("GET" if body is None else "POST"), path or parts.path + name, body, sent)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def start(self, **facts):
        status, answer = self.ask("start", {"nonce": self.nonce, "facts": facts})
        if status == 200:
            self.session, self.sequence = json.loads(answer)["session"], 0
        return status

    def tell(self, name, body, **more):
        self.sequence += 1
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        headers = {"X-Tacit-Sequence": str(self.sequence), "Content-Type": kind}
        return self.ask(name, body, headers=headers | more.pop("headers", {}), **more)[0]


@dataclass
class Measured:
    """A measurement that goes on in another thread."""

    said: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    invited: threading.Event = field(default_factory=threading.Event)
    url: str = ""
    result: dict | None = None
    error: Exception | None = None
    thread: threading.Thread | None = None

    def invite(self, invitation):
        self.url = invitation.url
        self.invited.set()

    def finished(self):
        self.thread.join(30)
        assert not self.thread.is_alive()
        if self.error is not None:
            raise self.error
        return self.result


@contextmanager
def measuring(artifacts, inputs, **named):
    made = Measured()

    def go():
        try:
            made.result = measure_in_browser(
                artifacts,
                inputs,
                invite=made.invite,
                host="127.0.0.1",
                progress=made.said.append,
                keep=lambda name, entry: made.kept.append((name, entry)),
                **named,
            )
        except (OSError, ValueError, ImportError) as error:
            made.error = error
        made.invited.set()

    made.thread = threading.Thread(target=go, daemon=True)
    made.thread.start()
    assert made.invited.wait(30)
    if made.error is not None:
        raise made.error
    yield made
    if made.thread.is_alive():  # a test that needs no result
        phone = Phone(made.url)
        phone.start()
    made.thread.join(30)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    content = hostile_files.onnx_linear().SerializeToString()
    made = []
    for name in ("float32", "small"):
        (folder / f"{name}.onnx").write_bytes(content)
        made.append(Artifact(name=name, path=folder / f"{name}.onnx"))
    return made


@pytest.fixture
def inputs():
    return np.random.default_rng(0).standard_normal((5, *hostile_files.SHAPE[1:])).astype(np.float32)


@pytest.fixture(autouse=True)
def vendored(tmp_path, monkeypatch):
    """The pages with runtimes that are only names: what is tested here never runs them."""
    web = tmp_path / "web"
    web.mkdir()
    for path in PAGES:
        shutil.copy(path, web)
    for name in ("onnxruntime-web/ort.wasm.min.mjs", "litert/index.js"):
        (web / "vendor" / name).parent.mkdir(parents=True)
        (web / "vendor" / name).write_text("export {};\n")
    (web / "vendor" / "versions.json").write_text('{"onnxruntime-web": "1.30.0", "LiteRT.js": "2.5.3"}')
    monkeypatch.setattr(browser_job, "_WEB", web)
    monkeypatch.setattr(browser, "_PARTING_S", 0.2)  # phones that only pretend do not ask again
    return web


def samples(*values_ns, runs=1, block=2, **more):
    return {"samples_ns": list(values_ns), "runs_per_sample": runs, "block_samples": block, **more}


def timed(**models):
    return {"runtime": "onnxruntime-web", "models": models}


def outputs_of(values, shape=(1, 3)):
    return json.dumps([{"type": "float32", "shape": list(shape)}]).encode() + b"\n" + values.astype("<f4").tobytes()


def warmup():
    return {"runs": 12, "spent_ns": 3, "slope": 0}


def test_what_a_page_tells_becomes_a_result_like_those_of_other_devices(models, inputs):
    expected = np.random.default_rng(1).standard_normal((5, 3)).astype(np.float32)
    evaluation = Evaluation(inputs=inputs, expected=expected, labels=np.array([0, 1, 2, 0, 1]))
    with measuring(models, inputs, evaluation=evaluation, sustained_s=2.0) as made:
        phone = Phone(made.url)
        job = json.loads(phone.ask("job")[1])
        assert [model["name"] for group in job["groups"] for model in group["models"]] == ["float32", "small"]
        agent = "Mozilla/5.0 (Linux; Android 16; K) AppleWebKit/537.36 Chrome/156.0.0.0 Mobile Safari/537.36"
        assert phone.start(user_agent=agent + "\x1b[2J", cores=8, label="an app") == 200
        assert phone.ask("model/m0")[1] == models[0].path.read_bytes()
        file = job["inputs"]["channel_first"][0]["file"]
        np.testing.assert_array_equal(np.frombuffer(phone.ask(file)[1], "<f4").reshape(inputs.shape), inputs)
        time.sleep(0.1)
        assert phone.tell("clock", {"tick_ns": 5000, "isolated": True}) == 200
        assert phone.tell("loaded", {"model": "m0", "load_ns": 7 * MS}) == 200
        assert phone.tell("outputs/m0", outputs_of(expected[:4])) == 200  # there was no time for the fifth
        assert phone.tell("moment", {"runtime": "onnxruntime-web", "when": "before", "charging": 1, "x": "y"}) == 200
        slow, fast = [2000 + i % 7 for i in range(80)], [1000 + i % 7 for i in range(80)]
        told = timed(m0=samples(*slow, warmup=warmup()), m1=samples(*fast, runs=3, warmup=warmup()))
        assert phone.tell("timed", told) == 200
        assert phone.tell("timed", timed(m0=samples(*slow), m1=samples(*fast, runs=3))) == 200
        assert phone.tell("sustained", {"model": "m0", "buckets": [[0, 9000, 4, 2000], [10000, 9000, 4, 2600]]}) == 200
        assert phone.tell("complete", {"runtime": "onnxruntime-web"}) == 200
        status, answer = phone.ask("ended", {"reason": None}, headers={"X-Tacit-Sequence": str(phone.sequence + 1)})
        assert status == 200
        result = made.finished()
    json.dumps(result, allow_nan=False)
    first, second = result["artifacts"]["float32"], result["artifacts"]["small"]
    assert first["delegate"] == "wasm"
    assert first["phone"] == second["phone"] == "browser: Chrome 156, Android; 8 cores"
    assert (result["label"], result["device"], result["mode"]) == (
        "in-browser",
        "browser: Chrome 156, Android",
        "quick",
    )
    assert result["failed"] == {}
    assert (first["runtime"], first["n"], first["load_us"]) == ("onnxruntime-web", 160, 7000.0)
    assert first["p50_us"] == pytest.approx(2.003, abs=0.002)
    assert first["relative"] is None
    assert second["relative"]["to"] == "float32"
    assert second["relative"]["low"] <= second["relative"]["estimate"] == pytest.approx(0.5, rel=0.01)
    assert "averaged" in second["flags"]
    assert "averaged" not in first["flags"]
    assert first["accuracy"]["agreement"]["estimate"] == 1.0
    assert first["accuracy"]["n"] == 4
    assert (first["sustained"]["change"], "slowed" in first["flags"]) == (0.3, True)
    assert second["accuracy"] is second["sustained"] is None
    assert {"accuracy", "sustained", "energy", "peak_memory_bytes"} <= set(second["not_measured"])
    assert (first["peak_memory_bytes"], first["energy"]) == (None, None)
    assert result["conditions"]["onnxruntime-web"] == {"before": {"charging": 1}, "after": {}}
    facts = result["facts"]
    assert (facts["cores"], facts["clock_tick_us"], facts["onnxruntime_web"]) == (8, 5.0, "1.30.0")
    assert "\x1b" not in facts["user_agent"]
    shown = json.loads(answer)["artifacts"]
    assert shown["m0"]["is_first"]
    right = float((expected[:4].argmax(axis=1) == evaluation.labels[:4]).mean())
    assert shown["m0"]["accuracy"] == {"kind": "top1", "n": 4, "share": right}
    assert (shown["m0"]["p50_us"], shown["m0"]["flags"]) == (first["p50_us"], first["flags"])
    assert shown["m1"]["accuracy"] is None
    assert shown["m1"]["relative"]["estimate"] == second["relative"]["estimate"]
    assert [name for name, _ in made.kept] == ["float32", "small"]


def test_each_hostile_request_gets_its_own_status_and_the_run_goes_on(models, inputs):
    with measuring(models, inputs) as made:
        phone, stranger = Phone(made.url), Phone(made.url)
        token = urlsplit(made.url).path.strip("/")
        assert stranger.ask(path="/measure.html")[0] == 400
        assert stranger.ask(path=f"/{'A' * len(token)}/job")[0] == 404
        for traversal in ("../agent.py", "vendor/../../agent.py", "%2e%2e/agent.py", "..\\agent.py", "//etc/passwd"):
            assert stranger.ask(traversal)[0] == 400, traversal
        for absent in ("browser.py", "parity.html", "parity.js", "vendor/versions.json", "model/m9"):
            assert stranger.ask(absent)[0] == 404, absent
        assert stranger.ask("job", host="evil.example")[0] == 421
        assert stranger.ask("start", {}, origin="https://evil.example")[0] == 403
        assert stranger.ask("start", {}, origin="null")[0] == 403
        assert stranger.ask("job", headers={"Origin": "https://evil.example"})[0] == 403
        assert stranger.ask("job", method="DELETE")[0] == 501
        assert stranger.ask("model/m0")[0] == stranger.ask("timed", {})[0] == 401
        assert stranger.ask("start", {"nonce": 5})[0] == 422
        assert phone.start() == 200
        stranger.nonce = "other" + "n" * 27
        assert stranger.start() == 409
        assert stranger.ask("job")[0] == 409
        assert phone.start() == 200  # the same page once more: its answer was lost on the way
        assert stranger.tell("timed", timed(m0=samples(1))) == 401
        stranger.session = "\u00e9" * 32
        assert stranger.ask("model/m0", headers={"X-Tacit-Session": "\u00e9" * 8})[0] == 401
        assert phone.ask("alive", b"[" * 50_000, headers={"X-Tacit-Sequence": "1"})[0] == 400
        assert phone.ask("alive", b"{", headers={"X-Tacit-Sequence": "1"})[0] == 400
        assert phone.ask("alive", {}, headers={"X-Tacit-Sequence": "-1"})[0] == 400
        assert phone.ask("alive", {}, headers={"X-Tacit-Sequence": "7"})[0] == 409
        assert phone.ask("alive", b"x" * 10_000_000, headers={"X-Tacit-Sequence": "1"})[0] == 413
        assert phone.ask("outputs/m0", b"x" * (16 * 1024 * 1024 + 1), headers={"X-Tacit-Sequence": "1"})[0] == 413
        assert phone.ask("outputs/m9", b"x", headers={"X-Tacit-Sequence": "1"})[0] == 404
        assert phone.ask("other", {}, headers={"X-Tacit-Sequence": "1"})[0] == 404
        assert phone.ask("alive", {}, headers={"X-Tacit-Sequence": "1", "Content-Type": "text/plain"})[0] == 415
        assert phone.ask("alive", {}, headers={"X-Tacit-Sequence": "1", "Content-Length": "nine"})[0] == 411
        time.sleep(0.01)
        assert phone.tell("timed", timed(m0=samples(1000, 1001))) == 200
        assert phone.tell("ended", {"reason": None}) == 200
        result = made.finished()
    assert result["artifacts"]["float32"]["n"] == 2
    assert result["facts"]["refused_requests"] > 25
    assert result["failed"] == {"small": "not measured: the page did not come to it"}


@pytest.mark.parametrize(
    "entry",
    [
        samples(),
        samples(-5),
        samples(0),
        samples(1.5),
        samples("7"),
        samples(float("nan")),
        samples(float("inf")),
        samples(True),
        samples(10**20),
        samples(10**12),
        samples(*[1000] * 200_000, runs=10**6),
        samples(1000, runs=0),
        samples(1000, runs="1"),
        samples(1000, block=-1),
        samples(1000, block=3),
        samples(1000, warmup={"runs": -1, "spent_ns": 1, "slope": None}),
        {"samples_ns": {"0": 5}, "runs_per_sample": 1},
        {"samples_ns": [1000], "runs_per_sample": 1},
        [1000],
        None,
    ],
    ids=lambda entry: str(entry)[:40],
)
def test_figures_that_cannot_be_true_are_refused_and_change_nothing(entry):
    session, headers = begun()
    assert post(session, "timed", timed(m0=samples(1000, 1002)), headers) == 200
    for body in (timed(m0=entry), timed(m1=samples(1000), m0=entry)):
        assert post(session, "timed", body, headers) == 422
    assert session.models["m0"].samples_ns == [1000, 1002]
    assert session.models["m1"].samples_ns == []
    assert post(session, "timed", timed(m0=samples(1004)), headers) == 200


def begun():
    made = browser_session.PageSession(
        pages={},
        held={},
        job={},
        models={name: browser_session.ModelState(name=name, runtime="onnxruntime-web") for name in ("m0", "m1")},
        say=lambda line: None,
    )
    headers = {"content-type": "application/json", "x-tacit-sequence": "0"}
    made.post("start", headers, json.dumps({"nonce": "n" * 32}).encode())
    time.sleep(0.002)
    return made, headers


def post(session, name, body, headers):
    headers["x-tacit-sequence"] = str(int(headers["x-tacit-sequence"]) + 1)
    try:
        session.post(name, headers, json.dumps(body).encode())
    except browser_server.RequestRefused as refused:
        return refused.status
    return 200


@pytest.mark.parametrize(
    ("name", "body", "status"),
    [
        ("timed", {"runtime": "onnxruntime-web", "models": {"../m0": samples(5)}}, 404),
        ("timed", {"runtime": "LiteRT.js", "models": {"m0": samples(5)}}, 404),
        ("timed", {"runtime": ["onnxruntime-web"], "models": {}}, 404),
        ("timed", {"runtime": "onnxruntime-web", "models": ["m0"]}, 404),
        ("loaded", {"model": {"m0": 1}, "load_ns": 5}, 404),
        ("loaded", {"model": "m0", "load_ns": -5}, 422),
        ("loaded", {"model": "m0", "load_ns": 10**15}, 422),
        ("clock", {"tick_ns": float("nan")}, 422),
        ("moment", {"runtime": "onnxruntime-web", "when": "never"}, 422),
        ("complete", {"runtime": 5}, 404),
        ("failed", {"model": "m7", "reason": "x"}, 404),
        ("sustained", {"model": "m0", "buckets": [[0, 10**12, 1, 5]]}, 422),
        ("sustained", {"model": "m0", "buckets": [[0, 5, 1, -5]]}, 422),
        ("sustained", {"model": "m0", "buckets": [[0, 1, 1, 1]] * 5000}, 422),
        ("sustained", {"model": "m0", "buckets": "x"}, 422),
    ],
)
def test_reports_about_strangers_and_out_of_range_are_refused(name, body, status):
    session, headers = begun()
    assert post(session, name, body, headers) == status
    assert session.models == begun()[0].models
    assert (session.conditions, session.complete) == ({}, [])


def test_a_report_is_taken_once_and_what_follows_a_lost_one_is_refused():
    session, headers = begun()
    for _ in range(3):
        headers["x-tacit-sequence"] = "0"
        assert post(session, "timed", timed(m0=samples(1000)), headers) == 200
    assert session.models["m0"].samples_ns == [1000]
    headers["x-tacit-sequence"] = "4"
    assert post(session, "timed", timed(m0=samples(1000)), headers) == 409


def test_all_reports_together_claim_no_more_work_than_time_has_passed():
    session, headers = begun()
    session._started_s -= 10.0
    assert post(session, "timed", timed(m0=samples(6 * 10**9)), headers) == 200
    assert post(session, "timed", timed(m1=samples(6 * 10**9)), headers) == 422
    assert session.models["m1"].samples_ns == []
    assert post(session, "timed", timed(m1=samples(3 * 10**9)), headers) == 200


SOMETHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=9)
    | st.sampled_from(["m0", "LiteRT.js"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
KEYS = ["model", "runtime", "models", "m0", "when", "reason", "buckets", "load_ns", "tick_ns", "nonce", "facts"]


@given(
    name=st.sampled_from(["start", "timed", "sustained", "moment", "loaded", "failed", "clock", "complete", "alive"]),
    body=SOMETHING | st.dictionaries(st.sampled_from(KEYS), SOMETHING),
)
def test_whatever_is_posted_is_taken_or_refused_with_a_status(name, body):
    session, headers = begun()
    assert post(session, name, body, headers) in (200, 400, 404, 409, 422)
    json.dumps(
        [session.facts, session.conditions, [model.reason for model in session.models.values()]], allow_nan=False
    )


def test_after_the_end_nothing_is_taken():
    session, headers = begun()
    session.end("the page was closed")
    assert post(session, "timed", timed(m0=samples(1000)), headers) == 410
    assert session.models["m0"].samples_ns == []


def test_reports_are_bounded_in_number(monkeypatch):
    monkeypatch.setattr(browser_session, "_MOST_REPORTS", 3)
    session, headers = begun()
    assert [post(session, "alive", {}, headers) for _ in range(5)] == [200, 200, 200, 429, 409]


def test_a_page_that_is_closed_leaves_what_it_measured_and_the_rest_is_not_measured(models, inputs):
    with measuring(models, inputs, sustained_s=60.0) as made:
        phone = Phone(made.url)
        phone.start()
        time.sleep(0.01)
        phone.tell("failed", {"model": "m1", "reason": "no such operator \x1b[2J" + "x" * 1000})
        phone.tell("timed", timed(m0=samples(*[1000] * 64)))
        assert phone.ask("closed", {})[0] == 200
        result = made.finished()
    entry = result["artifacts"]["float32"]
    assert (entry["n"], entry["p90_us"]) == (64, 1.0)
    assert "incomplete" in entry["flags"]
    assert entry["not_measured"]["sustained"] == "the page was closed"
    assert entry["sustained"] is None
    assert re.fullmatch(r"no such operator  ?\[2Jx+", result["failed"]["small"])
    assert len(result["failed"]["small"]) <= 300
    assert made.kept == []
    assert "ended early: the page was closed; what was measured so far is kept" in made.said


def test_a_page_that_falls_silent_ends_the_run(models, inputs, monkeypatch):
    monkeypatch.setattr(browser, "_SILENCE_S", 0.2)
    with measuring(models, inputs) as made:
        assert Phone(made.url).start() == 200
        result = made.finished()
    assert set(result["failed"].values()) == {"not measured: the page has said nothing for 0.2 s"}
    assert result["artifacts"] == {}


def test_a_browser_without_webassembly_is_named_as_the_reason(models, inputs):
    with measuring(models, inputs) as made:
        phone = Phone(made.url)
        phone.start(webassembly=0)
        phone.tell("ended", {"reason": "this browser has no WebAssembly with SIMD"})
        result = made.finished()
    assert result["failed"]["small"] == "not measured: this browser has no WebAssembly with SIMD"


def test_a_page_that_nobody_opens_is_a_device_that_cannot_be_reached(models, inputs):
    with (
        pytest.raises(DeviceUnreachable, match=r"within 0\.05 s, got nobody.*on one network"),
        measuring(models, inputs, wait_s=0.05) as made,
    ):
        made.finished()


@pytest.mark.parametrize("is_open", [False, True])
def test_what_interrupts_it_ends_the_wait(models, inputs, is_open):
    enough = threading.Event()

    def check():
        if enough.is_set():
            raise ConnectionAbortedError("interrupted")

    with measuring(models, inputs, check=check) as made:
        if is_open:
            Phone(made.url).start()
        enough.set()
        with pytest.raises(ConnectionAbortedError):
            made.finished()


def test_a_page_that_measures_on_is_told_that_the_computer_has_ended_it(models, inputs, monkeypatch):
    monkeypatch.setattr(browser, "_PARTING_S", 20.0)
    enough = threading.Event()

    def check():
        if enough.is_set():
            raise ConnectionAbortedError("interrupted")

    with measuring(models, inputs, check=check) as made:
        phone = Phone(made.url)
        phone.start()
        enough.set()
        deadline_s, status = time.monotonic() + 10.0, 200
        while status == 200 and time.monotonic() < deadline_s:
            phone.sequence += 1
            status, answer = phone.ask("alive", {}, headers={"X-Tacit-Sequence": str(phone.sequence)})
        assert (status, json.loads(answer)) == (410, {"error": "it was interrupted there"})
        with pytest.raises(ConnectionAbortedError):
            made.finished()


def test_without_labels_the_page_is_told_how_often_answers_agree():
    interval = {"estimate": 0.75, "low": 0.5, "high": 0.9}
    entry = {"p50_us": 1.0, "p90_us": None, "ci": {"p50_us": None}, "relative": None, "flags": ["noisy"]}
    for top1, kind in ((None, "agreement"), (interval, "top1")):
        found = {"n": 8, "top1": top1, "agreement": interval, "max_abs": 0.0}
        shown = browser._shown({**entry, "accuracy": found}, is_first=False)
        assert shown["accuracy"] == {"kind": kind, "n": 8, "share": 0.75}
    nothing = {"n": 8, "top1": None, "agreement": None, "max_abs": None}
    assert browser._shown({**entry, "accuracy": nothing}, is_first=False)["accuracy"] is None


def test_a_port_that_is_taken_is_a_device_that_cannot_be_reached(models, inputs):
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(DeviceUnreachable, match=r"serve a page on 127\.0\.0\.1, port \d+, got: .*another port"),
        measuring(models, inputs, port=taken.getsockname()[1]),
    ):
        pass


def test_connections_that_say_nothing_are_bounded_and_ended(models, inputs, monkeypatch):
    monkeypatch.setattr(browser_server, "_ASK_S", 0.5)
    monkeypatch.setattr(browser_server, "_MOST_OF_ONE_ADDRESS", 5)
    with measuring(models, inputs) as made:
        phone, address = Phone(made.url), urlsplit(made.url)
        idle = [socket.create_connection((address.hostname, address.port), timeout=5) for _ in range(12)]
        try:
            idle[0].sendall(b"GET / HTTP/1.1\r\nHost: ")
            answers = [one.recv(100) for one in idle]  # each is ended: at once, or when its time is over
        finally:
            for one in idle:
                one.close()
        assert sum(answer.startswith(b"HTTP/1.0 503") for answer in answers) == 7
        status, deadline_s = 503, time.monotonic() + 10.0
        while status == 503 and time.monotonic() < deadline_s:  # until their threads have ended too
            with suppress(ConnectionError):
                status = phone.start()
            time.sleep(0.05)
        assert status == 200
        assert phone.tell("ended", {"reason": None}) == 200
        made.finished()


def test_a_request_that_trickles_is_ended_though_it_is_never_silent(models, inputs, monkeypatch):
    monkeypatch.setattr(browser_server, "_ASK_S", 0.5)
    with measuring(models, inputs) as made:
        address = urlsplit(made.url)
        with socket.create_connection((address.hostname, address.port), timeout=5) as slow:
            slow.sendall(b"GET / HTTP/1.1\r\n")
            with suppress(ConnectionError):
                for place in range(100):
                    slow.sendall(b"X-%d: 1\r\n" % place)
                    time.sleep(0.05)
        assert place < 60
        phone = Phone(made.url)
        phone.start()
        phone.tell("ended", {"reason": None})
        made.finished()


def test_outputs_that_are_none_are_not_measured_and_never_zero(models, inputs):
    evaluation = Evaluation(inputs=inputs, expected=np.zeros((5, 3), np.float32))
    bad = {
        b"": "something else",
        b"x" * 5000: "something else",
        b"[" * 900 + b"\n": "something else",
        outputs_of(np.zeros((6, 3))): "another number of bytes",
        outputs_of(np.zeros(4)): "another number of bytes",
        outputs_of(np.zeros(4), shape=(1, -3)): "another number of bytes",
        outputs_of(np.zeros(4), shape=(1, 1 << 30, 1 << 30)): "another number of bytes",
        outputs_of(np.full((5, 3), np.nan)): "finite",
        outputs_of(np.zeros((5, 4)), shape=(1, 4)): r"like \(5, 3\)",
    }
    for content, said in bad.items():
        with pytest.raises(ValueError, match=said):
            browser._accuracy(content, evaluation)
    with measuring(models[:1], inputs, evaluation=evaluation) as made:
        phone = Phone(made.url)
        phone.start()
        time.sleep(0.01)
        phone.tell("outputs/m0", outputs_of(np.full((5, 3), np.nan)))
        phone.tell("timed", timed(m0=samples(1000, 1000)))
        phone.tell("complete", {"runtime": "onnxruntime-web"})
        phone.tell("ended", {"reason": None})
        entry = made.finished()["artifacts"]["float32"]
    assert entry["accuracy"] is None
    assert entry["not_measured"]["accuracy"] == "expected finite outputs from the page, got others"


def test_files_that_no_browser_runs_and_runtimes_that_are_missing_are_said(models, inputs, vendored, tmp_path):
    text = tmp_path / "x.onnx"
    text.write_text("not a model at all")
    more = [
        Artifact(name="text", path=text),
        Artifact(name="two", path=models[0].path, threads=2),
        Artifact(name="laid", path=models[0].path, input_layout=("channel_last", "channel_first")),
    ]
    with measuring([*models, *more], inputs) as made:
        job = json.loads(Phone(made.url).ask("job")[1])
        assert len(job["notices"]) == 3
        phone = Phone(made.url)
        phone.start()
        phone.tell("ended", {"reason": None})
        failed = made.finished()["failed"]
    assert "which is text" in failed["text"] or "expected" in failed["text"]
    assert "threads=2" in failed["two"]
    assert "layout of each of 1 inputs, got 2" in failed["laid"]
    (tmp_path / "m.tflite").write_bytes(hostile_files.CRASHING_TFLITE)
    tflite = Artifact(name="tflite", path=tmp_path / "m.tflite")
    (vendored / "vendor" / "litert" / "index.js").unlink()
    with measuring([models[0], tflite], inputs) as made:
        job = json.loads(Phone(made.url).ask("job")[1])
        assert [group["runtime"] for group in job["groups"]] == ["onnxruntime-web"]
        assert "LiteRT.js is not in" in job["notices"][0]
        phone = Phone(made.url)
        phone.start()
        time.sleep(0.01)
        phone.tell("timed", timed(m0=samples(1000)))
        phone.tell("ended", {"reason": None})
        result = made.finished()
    assert list(result["artifacts"]) == ["float32"]
    assert re.search(r"LiteRT\.js is not in .*run make web", result["failed"]["tflite"])
    (vendored / "vendor" / "onnxruntime-web" / "ort.wasm.min.mjs").unlink()
    with pytest.raises(ModuleNotFoundError, match="run make web"), measuring(models, inputs):
        pass


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ({"sustained_s": -1.0}, "sustained_s"),
        ({"sustained_s": float("nan")}, "sustained_s"),
        ({"mode": "slow"}, "mode"),
    ],
)
def test_arguments_out_of_range_are_refused(models, inputs, named, said):
    with pytest.raises(ValueError, match=said), measuring(models, inputs, **named):
        pass
    with pytest.raises(ValueError, match="different names"), measuring([models[0]] * 2, inputs):
        pass
    with pytest.raises(ValueError, match="float64"), measuring(models, inputs.astype(np.float64)):
        pass


class Plain:
    def get(self, name, session):
        return Reply(kind="text/plain", content=b"held")


def test_over_tls_the_certificate_names_the_address_and_is_the_one_that_is_shown():
    tls, fingerprint = certificate(("127.0.0.1", "192.168.7.9"))
    with serve(Plain(), host="127.0.0.1", port=0, names=("127.0.0.1",), tls=tls, failed=pytest.fail) as served:
        parts = urlsplit(served.url)
        assert parts.scheme == "https"
        trusting = ssl.create_default_context()
        trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
        connection = http.client.HTTPSConnection(parts.hostname, parts.port, timeout=5, context=trusting)
        connection.request("GET", parts.path)
        der = connection.sock.getpeercert(binary_form=True)
        response = connection.getresponse()
        assert response.read() == b"held"
        assert response.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
        assert response.headers["Cross-Origin-Opener-Policy"] == "same-origin"
        connection.close()
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes

        made = x509.load_der_x509_certificate(der)
        assert made.fingerprint(hashes.SHA256()).hex(":").upper() == fingerprint
        names = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert [str(one) for one in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1", "192.168.7.9"]
        strict = ssl.create_default_context(cadata=ssl.DER_cert_to_PEM_cert(der))
        with socket.create_connection((parts.hostname, parts.port), timeout=5) as raw:
            strict.wrap_socket(raw, server_hostname="127.0.0.1").close()  # who trusts it needs no exception
        plain = http.client.HTTPConnection(parts.hostname, parts.port, timeout=5)
        plain.request("GET", parts.path)
        assert plain.getresponse().status == 426
        plain.close()


def test_an_invitation_says_how_to_accept_the_certificate_and_its_code_holds_the_link():
    segno = pytest.importorskip("segno")
    url, fingerprint = "https://192.168.1.23:54321/abcdefghijklmnopqrstuv/", ":".join(["AB"] * 32)
    code = qr_lines(url)
    said = "\n".join(Invitation(url=url, fingerprint=fingerprint, qr=code).lines(colours=True))
    assert url in said
    assert fingerprint in said.replace("\n  ", ":").replace("  ", "")
    assert {"Chrome", "iPhone", "Firefox", "firewalls"} <= set(re.findall(r"\w+", said))
    assert max(len(re.sub(r"\x1b\[[\d;]*m", "", line)) for line in said.splitlines()) <= 120
    pairs = {" ": (0, 0), "▀": (1, 0), "▄": (0, 1), "█": (1, 1)}
    drawn = [[pairs[letter] for letter in re.sub(r"\x1b\[[\d;]*m", "", line)] for line in code.splitlines()]
    rows = [[pair[half] for pair in line] for line in drawn for half in (0, 1)]
    right = [[int(bool(one)) for one in row] for row in segno.make(url, error="m", micro=False).matrix]
    assert [row[2:-2] for row in rows[2 : 2 + len(right)]] == right
    assert len(drawn) <= 23  # a terminal of 24 lines shows it whole


@pytest.mark.parametrize("fingerprint", [None, ":".join(["AB"] * 32)])
def test_only_a_terminal_is_given_colours(fingerprint, monkeypatch):
    code = "\x1b[30;107m █▀ \x1b[0m\n\x1b[30;107m ▄█ \x1b[0m\n"
    invitation = Invitation(url="http://127.0.0.1:8000/t/", fingerprint=fingerprint, qr=code)
    assert invitation.lines()[:2] == [" █▀ ", " ▄█ "]
    assert not [line for line in invitation.lines() if "\x1b" in line]
    ours, theirs = os.openpty()
    try:
        with os.fdopen(theirs, "w") as terminal:
            monkeypatch.setattr(sys, "stderr", terminal)
            assert invitation.lines()[:2] == code.splitlines()
            monkeypatch.setattr(sys, "stderr", None)
            assert invitation.lines()[0] == " █▀ "
            monkeypatch.undo()
    finally:
        os.close(ours)


def test_addresses_are_this_computers_and_a_name_is_none():
    assert addresses_of("127.0.0.1") == ("127.0.0.1", ("127.0.0.1",))
    assert addresses_of("::1") == ("::1", ("::1",))
    with pytest.raises(ValueError, match="expected an IP address"):
        addresses_of("my-laptop; rm -rf /")
    found = lan_addresses()
    assert not any(address.startswith("127.") for address in found)
    if found:
        assert addresses_of(None) == (found[0], found[:1])
        assert addresses_of("0.0.0.0") == ("0.0.0.0", found)  # noqa: S104  # what a user may ask for


@pytest.mark.parametrize(
    ("agent", "name"),
    [
        ("Mozilla/5.0 (iPhone; CPU iPhone OS 26_1) Version/26.1 Mobile/15E148 Safari/604.1", "Safari 26, iPhone"),
        ("Mozilla/5.0 (Android 16; Mobile; rv:145.0) Gecko/145.0 Firefox/145.0", "Firefox 145, Android"),
        ("(Linux; Android 16) SamsungBrowser/29.0 Chrome/136.0 Mobile", "Samsung Internet 29, Android"),
        ("Chrome/99999999999999999999", "Chrome 9999"),
        ("\x1b[2J../../etc", "unknown"),
    ],
)  # fmt: skip
def test_a_device_is_named_in_words_of_ours(agent, name):
    assert device_name(agent) == f"browser: {name}"


def test_the_page_has_no_script_of_its_own_text_and_asks_for_nothing_from_elsewhere():
    page = (WEB / "measure.html").read_text(encoding="utf-8")
    assert page.count("<script") == page.count("src=") == 1
    assert re.search(r"\s(on\w+|style)=", page) is None
    for path in PAGES:
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert re.search(r"https?:|url\(|@import|innerHTML|eval\(|document\.write", text) is None, path.name


def test_the_page_has_words_for_every_flag_that_its_results_may_carry():
    script = (WEB / "measure.js").read_text(encoding="utf-8")
    words = re.search(r"const FLAGS = \{(.*?)\n\};", script, re.DOTALL)[1]
    explained = set(re.findall(r'^  "?([\w-]+)"?: "', words, re.MULTILINE))
    raised = set(re.findall(r"``([\w-]+)`` \(", judgement.Latency.__doc__)) | {"slowed", "incomplete"}
    unseen = {"steal", "governor"}  # a page learns neither
    assert explained == raised - unseen


def contrast(first, second):
    def luminance(colour):
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_colours_have_the_contrast_that_accessibility_asks_for():
    styles = (WEB / "measure.css").read_text(encoding="utf-8")
    found = re.findall(r":root \{(.*?)\}", styles, re.DOTALL)
    assert len(found) == 2  # light and dark
    for block in found:
        colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
        for back in ("page", "card"):
            for ink in ("ink", "quiet", "bad"):
                assert contrast(colours[ink], colours[back]) >= 4.5, (ink, back)
            for place in range(8):
                assert contrast(colours[f"s{place}"], colours[back]) >= 3, (place, back)
        assert contrast(colours["on-accent"], colours["accent"]) >= 4.5
        assert contrast(colours["notice-ink"], colours["notice"]) >= 4.5


# From here on a real browser, driven by Selenium.


@pytest.fixture
def chromium(monkeypatch):
    webdriver = pytest.importorskip("selenium.webdriver")
    program, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("needs Chromium and its driver (Debian: apt-get install chromium chromium-driver)")
    if not (WEB / "vendor" / "versions.json").is_file():
        pytest.skip("devices/web/vendor is missing: make web")
    monkeypatch.setattr(browser_job, "_WEB", WEB)
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    ours = "".join(f", EXCLUDE {address}" for address in ("127.0.0.1", *lan_addresses()))
    options.add_argument(f"--host-resolver-rules=MAP * ~NOTFOUND{ours}")
    options.add_argument("--ignore-certificate-errors")  # as a person does who taps "proceed"
    opened = webdriver.Chrome(options=options, service=webdriver.chrome.service.Service(driver))
    opened.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    )
    yield opened
    opened.quit()


@pytest.fixture(scope="module")
def convolutions(tmp_path_factory):
    torch = pytest.importorskip("torch")
    from tacit.compression.export import export, outputs_of

    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8 * 64, 4)]
        model = torch.nn.Sequential(*layers).eval()
    values = np.random.default_rng(0).standard_normal((20, 1, 8, 8)).astype(np.float32)
    folder, example = tmp_path_factory.mktemp("convolutions"), (torch.from_numpy(values[:1]),)
    made = []
    for suffix, layout in (("onnx", "channel_first"), ("tflite", "channel_last")):
        for form in ("float32", "dynamic_int8"):
            path = folder / f"{form}.{suffix}"
            export(model, example, path, form=form, calibration=(values,))
            made.append(Artifact(name=f"{form} {suffix}", path=path, input_layout=layout))
    return made, values, outputs_of(model, [values])[0]


def shown(driver, section, limit_s=60.0):
    """Wait until a section of the page is in view; gives its text and how long that took."""
    started_s = time.monotonic()
    while time.monotonic() - started_s < limit_s:
        found = driver.find_element("id", section)
        if found.get_attribute("hidden") is None:
            return found.text, time.monotonic() - started_s
        time.sleep(0.1)
    pytest.fail(f"{section} was not shown: {driver.find_element('tag name', 'body').text}")


def begin(driver, url):
    driver.get(url)
    text, _ = shown(driver, "start")
    driver.find_element("id", "begin").click()
    return text


@pytest.mark.soak
def test_a_browser_measures_both_runtimes_and_answers_as_the_model_does(chromium, convolutions):
    artifacts, values, expected = convolutions
    with measuring(artifacts, values, evaluation=Evaluation(inputs=values, expected=expected)) as made:
        assert "Measure 4 models on this device" in begin(chromium, made.url)
        started_s = time.monotonic()
        while not any("interleaved" in line for line in made.said):
            assert time.monotonic() - started_s < 20.0  # the first result
            time.sleep(0.1)
        shown(chromium, "done")
        result = made.finished()
        text = chromium.find_element("id", "results").text
        asked = chromium.execute_script("return performance.getEntriesByType('resource').map((one) => one.name)")
        wide = chromium.execute_script("return document.documentElement.scrollWidth")
    assert result["failed"] == {}
    for artifact in artifacts:
        entry = result["artifacts"][artifact.name]
        assert artifact.name in text
        assert entry["p50_us"] > 0
        assert entry["p90_us"] is not None
        assert entry["accuracy"]["n"] == len(values)
        assert entry["accuracy"]["max_abs"] < (1e-4 if "float32" in artifact.name else 0.2)
        assert "incomplete" not in entry["flags"]
    for suffix in ("onnx", "tflite"):
        assert result["artifacts"][f"dynamic_int8 {suffix}"]["relative"]["to"] == f"float32 {suffix}"
    assert result["facts"]["cross_origin_isolated"] == 1
    assert {urlsplit(address).netloc for address in asked} == {urlsplit(made.url).netloc}
    assert wide == 390


@pytest.mark.soak
def test_over_https_on_the_network_the_page_is_isolated(chromium, convolutions, monkeypatch):
    if not lan_addresses():
        pytest.skip("this computer is on no network")
    artifacts, values, _ = convolutions
    box, invited = {}, threading.Event()

    def go():
        box["result"] = measure_in_browser(
            artifacts[:1], values, invite=lambda one: (box.update(to=one), invited.set())
        )

    thread = threading.Thread(target=go, daemon=True)
    thread.start()
    assert invited.wait(20)
    assert box["to"].url.startswith("https://")
    begin(chromium, box["to"].url)
    shown(chromium, "done")
    thread.join(20)
    facts = box["result"]["facts"]
    assert (facts["cross_origin_isolated"], facts["clock_tick_us"] < 50) == (1, True)


@pytest.mark.soak
def test_without_litert_js_the_others_are_measured(chromium, convolutions, monkeypatch, tmp_path):
    web = tmp_path / "without"
    shutil.copytree(WEB, web, ignore=shutil.ignore_patterns("litert"))
    monkeypatch.setattr(browser_job, "_WEB", web)
    artifacts, values, _ = convolutions
    with measuring(artifacts, values) as made:
        assert "LiteRT.js is not in" in begin(chromium, made.url)
        shown(chromium, "done")
        result = made.finished()
    assert list(result["artifacts"]) == ["float32 onnx", "dynamic_int8 onnx"]
    assert set(result["failed"]) == {"float32 tflite", "dynamic_int8 tflite"}


@pytest.mark.soak
def test_a_page_that_is_closed_and_opened_again_says_that_its_link_is_used(chromium, convolutions):
    artifacts, values, _ = convolutions
    with measuring(artifacts, values, mode="full") as made:
        begin(chromium, made.url)
        deadline_s = time.monotonic() + 40.0
        while not any("interleaved" in line for line in made.said) and time.monotonic() < deadline_s:
            time.sleep(0.1)
        other = chromium.current_window_handle
        chromium.switch_to.new_window("tab")
        chromium.get(made.url)
        assert "This link has been used" in shown(chromium, "failed")[0]
        chromium.switch_to.window(other)
        time.sleep(2.0)
        chromium.get("about:blank")
        result = made.finished()
    assert "incomplete" in result["artifacts"]["float32 onnx"]["flags"]
    assert result["artifacts"]["float32 onnx"]["p50_us"] is not None
    assert result["failed"]["float32 tflite"] == "not measured: the page was closed"


@pytest.mark.soak
def test_without_webassembly_page_and_result_say_so(chromium, convolutions):
    artifacts, values, _ = convolutions
    off = "Object.defineProperty(self, 'WebAssembly', { value: undefined })"
    chromium.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": off})
    with measuring(artifacts, values) as made:
        chromium.get(made.url)
        assert "no WebAssembly" in shown(chromium, "failed")[0]
        result = made.finished()
    assert set(result["failed"].values()) == {"not measured: this browser has no WebAssembly with SIMD"}


@pytest.mark.soak
@pytest.mark.parametrize(
    ("parting_s", "said"),
    [(5.0, "The computer has ended the measurement\nIt was interrupted there."), (0.0, "The computer does not answer")],
)
def test_a_computer_that_goes_away_is_said_on_the_page_at_once(chromium, convolutions, monkeypatch, parting_s, said):
    monkeypatch.setattr(browser, "_PARTING_S", parting_s)  # without one it is gone as if it had been switched off
    artifacts, values, _ = convolutions
    enough = threading.Event()

    def check():
        if enough.is_set():
            raise ConnectionAbortedError("interrupted")

    with measuring(artifacts, values, mode="full", check=check) as made:
        begin(chromium, made.url)
        deadline_s = time.monotonic() + 40.0
        while not any("interleaved" in line for line in made.said) and time.monotonic() < deadline_s:
            time.sleep(0.1)
        enough.set()
        if not parting_s:
            made.thread.join(20)
            while "It does not answer. Trying again" not in shown(chromium, "running", limit_s=4.0)[0]:
                time.sleep(0.1)
        assert said in shown(chromium, "failed", limit_s=8.0)[0]
        assert chromium.find_element("id", "running").get_attribute("hidden") is not None
        with pytest.raises(ConnectionAbortedError):
            made.finished()


@pytest.mark.soak
def test_table_and_chart_of_the_page_write_the_same_medians_and_flags_have_words(chromium, convolutions):
    artifacts, values, expected = convolutions
    labels = expected.argmax(axis=1)
    with measuring(artifacts, values, evaluation=Evaluation(inputs=values, labels=labels)) as made:
        begin(chromium, made.url)
        shown(chromium, "done")
        result = made.finished()
    rows = chromium.find_elements("css selector", "#done-tables tbody tr")
    assert len(rows) == 4
    medians = [row.find_element("css selector", "td").text.split("\n")[0] for row in rows]
    assert [one.text for one in chromium.find_elements("css selector", "#latency .value")] == medians
    heads = {one.get_attribute("textContent") for one in chromium.find_elements("css selector", "thead th")}
    assert heads == {"Model", "Median", "p90", "Ratio", "Accuracy"}
    flags = {flag for entry in result["artifacts"].values() for flag in entry["flags"]}
    assert {one.text for one in chromium.find_elements("css selector", "#done-tables th .flag")} == flags
    words = [one.text for one in chromium.find_elements("css selector", ".flags li")]
    assert {line.split(" ")[0] for line in words} == flags
    assert all(len(line.split(" ")) > 4 for line in words)
