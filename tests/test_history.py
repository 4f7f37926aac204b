"""What was measured before: a change is told where it is greater than the spread, and not where it is not."""

import sqlite3

import numpy as np
import pytest

from tacit.edge.history import History


def result(p50_us, *, width=0.01, name="small", sha256="ab", device="local", cpu="one", mode="quick"):
    entry = {
        "p50_us": p50_us,
        "ci": {"p50_us": [p50_us * (1 - width), p50_us * (1 + width)]},
        "runtime": "litert",
        "sha256": sha256,
    }
    return {"device": device, "mode": mode, "facts": {"cpu": cpu}, "artifacts": {name: entry}}


@pytest.fixture
def history(tmp_path):
    return History(tmp_path / "home")


def verdicts(history, found, task="digits"):
    return [change.verdict for change in history.changes(found, task=task)]


def test_a_first_measurement_has_nothing_beside_it(history):
    assert verdicts(history, result(10.0)) == []


def test_with_one_earlier_session_the_usual_spread_decides(history):
    history.add(result(10.0), task="digits")
    assert verdicts(history, result(10.5)) == ["no difference"]
    assert verdicts(history, result(11.5)) == ["slower"]
    assert verdicts(history, result(8.7)) == ["faster"]


def test_three_sessions_that_lie_close_together_by_chance_make_no_news_of_little(history):
    for p50_us in (10.0, 10.001, 10.002):
        history.add(result(p50_us), task="digits")
    assert verdicts(history, result(10.1, width=0.001)) == ["no difference"]
    assert verdicts(history, result(10.7, width=0.001)) == ["slower"]


def test_many_quiet_sessions_make_a_small_change_known(history):
    for step in range(20):
        history.add(result(10 + 0.01 * (step % 3)), task="digits")
    assert verdicts(history, result(10.35, width=0.001)) == ["slower"]


def test_two_phones_with_one_kind_of_browser_are_two(history):
    slow, fast = result(20.0, device="browser: Chrome 156"), result(10.0, device="browser: Chrome 156")
    slow["artifacts"]["small"]["phone"], fast["artifacts"]["small"]["phone"] = "8 cores", "6 cores"
    history.add(slow, task="digits")
    assert verdicts(history, fast) == []
    assert verdicts(history, slow) == ["no difference"]


def test_with_three_sessions_their_spread_decides(history):
    for p50_us in (10.0, 12.0, 8.5):
        history.add(result(p50_us), task="digits")
    assert verdicts(history, result(13.0)) == ["no difference"]
    assert verdicts(history, result(40.0)) == ["slower"]
    assert verdicts(history, result(2.0)) == ["faster"]


def test_a_wide_interval_of_the_new_median_is_no_change(history):
    for p50_us in (10.0, 10.01, 9.99):
        history.add(result(p50_us), task="digits")
    assert verdicts(history, result(11.0)) == ["slower"]
    assert verdicts(history, result(11.0, width=0.3)) == ["no difference"]


def test_sessions_of_the_same_spread_are_rarely_called_a_change(tmp_path):
    generator, alarms = np.random.default_rng(0), 0
    for trial in range(120):
        history = History(tmp_path / str(trial))
        for value in generator.lognormal(2.0, 0.1, 5):
            history.add(result(float(value), width=0.001), task="digits")
        alarms += verdicts(history, result(float(generator.lognormal(2.0, 0.1)), width=0.001)) != ["no difference"]
    assert alarms <= 16  # 6 expected; more than 16 by chance in one of 10,000 runs


@pytest.mark.parametrize(
    "other",
    [{"name": "other"}, {"device": "ssh:a@b"}, {"cpu": "another"}, {"mode": "full"}],
    ids=lambda o: next(iter(o)),
)
def test_what_is_not_the_same_is_not_compared(history, other):
    history.add(result(10.0), task="digits")
    assert verdicts(history, result(20.0, **other)) == []
    assert verdicts(history, result(20.0), task="writers") == []


def test_other_bytes_are_told_apart(history):
    history.add(result(10.0, sha256="ab"), task="digits")
    (same,) = history.changes(result(20.0, sha256="ab"), task="digits")
    (other,) = history.changes(result(20.0, sha256="cd"), task="digits")
    assert "of the same file" in same.words()
    assert "of other bytes" in other.words()


def test_without_a_median_or_its_interval_nothing_is_kept(history):
    for entry in ({"p50_us": None, "ci": {}}, {"p50_us": 5.0, "ci": {"p50_us": None}}):
        found = result(10.0)
        found["artifacts"]["small"] |= entry
        history.add(found, task="digits")
    assert verdicts(history, result(10.0)) == []


def test_nobody_else_may_read_it_and_a_file_that_is_none_is_an_error(tmp_path):
    history = History(tmp_path / "home")
    assert history.path.stat().st_mode & 0o077 == 0
    history.path.write_bytes(b"<html>not a table</html>" * 100)
    with pytest.raises(sqlite3.DatabaseError):
        History(tmp_path / "home")
