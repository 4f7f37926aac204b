"""Energy of an inference: what counters say, within what they can say, against simulated devices of known power."""

import numpy as np
import pytest

from tacit.devices.energy import energy_of, package_uj, rest_s, state_of
from tacit.devices.phone_battery import BatteryLog, battery_readings
from tacit.devices.side_answers import Bucket

BATTERY = "/sys/class/power_supply/BAT0/"
IDLE_W, RUN_J, RUNS = 2.0, 0.03, 100  # a second


def buckets_of(*, rest: int, load: int) -> list[Bucket]:
    """Seconds of rest, and of 100 runs a second."""
    made = [Bucket(start_s=s, spent_s=1.0, runs=0, median_us=None) for s in range(rest)]
    return made + [Bucket(start_s=rest + s, spent_s=1.0, runs=RUNS, median_us=1e4) for s in range(load)]


def power_of(bucket: Bucket) -> float:
    return IDLE_W + RUN_J * bucket.runs


def _zone(number: str, name: str, uj: int | str, end: int | str = 262_143_328_850) -> dict[str, str]:
    zone = f"/sys/class/powercap/intel-rapl:{number}/"
    return {f"{zone}name": name, f"{zone}energy_uj": str(uj), f"{zone}max_energy_range_uj": str(end)}


def test_energy_is_that_of_the_packages_alone_each_counted_once():
    before = {**_zone("0", "package-0", 1000), **_zone("1", "package-1", 500), **_zone("0:0", "core", 10)}
    before |= _zone("2", "psys", 90)
    after = {**_zone("0", "package-0", 3000), **_zone("1", "package-1", 900), **_zone("0:0", "core", 1010)}
    after |= _zone("2", "psys", 9090)
    assert package_uj(before, after) == 2400


def test_a_counter_of_energy_that_began_again_is_counted_on():
    end = 262_143_328_850
    assert package_uj(_zone("0", "package-0", end - 600), _zone("0", "package-0", 400)) == 1000


@pytest.mark.parametrize("uj", ["", "-5", "secret", "1.5"])
def test_a_counter_that_may_not_be_read_is_not_measured(uj):
    assert package_uj(_zone("0", "package-0", uj), _zone("0", "package-0", 400)) is None
    assert package_uj(_zone("0", "package-0", 5, end=0), _zone("0", "package-0", 400)) is None
    assert package_uj({}, {}) is None


def packages(buckets: list[Bucket], *, noise_j: float = 0.05) -> list[dict[str, str]]:
    rng = np.random.default_rng(0)
    uj = np.cumsum([0.0, *(1e6 * (power_of(bucket) + rng.normal(0, noise_j)) for bucket in buckets)])
    return [_zone("0", "package-0", int(one)) for one in uj]


def test_energy_is_what_exceeds_rest_and_its_interval_holds_the_truth():
    buckets = buckets_of(rest=20, load=60)
    entry, _ = energy_of(buckets, packages(buckets))
    assert entry["low"] < RUN_J < entry["high"]
    assert entry["high"] - entry["low"] < 0.002
    assert entry["idle_w"] == pytest.approx(2, abs=0.05)
    assert entry["busy_w"] == pytest.approx(5, abs=0.05)
    assert "RAPL" in entry["source"]


@pytest.mark.parametrize(("rest", "load"), [(0, 60), (20, 3)])
def test_packages_need_rest_and_load_enough_for_an_interval(rest, load):
    buckets = buckets_of(rest=rest, load=load)
    assert energy_of(buckets, packages(buckets)) == (
        None,
        "rest or load were too short for an interval: measure for longer",
    )


def test_without_counters_there_is_no_energy_and_the_reason_is_said():
    buckets = buckets_of(rest=20, load=60)
    assert energy_of(buckets, [{}] * 81) == (None, "the device does not say what energy it takes")


# Batteries.


def battery(**told: str) -> dict[str, str]:
    return {f"{BATTERY}{name}": text for name, text in {"type": "Battery", "status": "Discharging", **told}.items()}


def staircase(
    buckets: list[Bucket], *, step_uah: float, every_s: int, start_uah: float, volts: float
) -> list[dict[str, str]]:
    """What a counter shows that knows whole steps, and is looked at by its driver every so many seconds."""
    used_j, shown, rows = 0.0, start_uah, []
    for second in range(len(buckets) + 1):
        true_uah = start_uah - used_j / volts / 3.6e-3
        if second % every_s == 0:
            shown = np.ceil(true_uah / step_uah) * step_uah
        rows.append(battery(charge_now=str(int(shown)), voltage_now=str(int(volts * 1e6))))
        used_j += power_of(buckets[second]) if second < len(buckets) else 0.0
    return rows


@pytest.mark.parametrize("step_uah", [1.0, 300.0, 1000.0, 4000.0])
@pytest.mark.parametrize("every_s", [1, 10, 31])
@pytest.mark.parametrize("rest", [600, 20, 6000])
def test_bounds_of_a_battery_hold_the_truth_wherever_its_steps_fall(step_uah, every_s, rest):
    """Also after a rest in which the counter hardly moved, and one that tells all of rest."""
    buckets, widths = buckets_of(rest=rest, load=600), []
    for seed in range(25 if rest <= 600 else 10):
        start_uah = 3_000_000 + np.random.default_rng(seed).uniform(0, 2 * step_uah)
        rows = staircase(buckets, step_uah=step_uah, every_s=every_s, start_uah=start_uah, volts=3.9)
        entry, why = energy_of(buckets, rows)
        assert entry is not None, why
        assert entry["low"] <= RUN_J <= entry["high"], (seed, entry)
        assert entry["low"] <= entry["j_per_inference"] <= entry["high"]
        widths.append(entry["high"] - entry["low"])
    # Two steps of either phase, of 3.9 V, or what the driver has not looked at.
    step_j = max(step_uah * 3.6e-3 * 3.9, 5.0 * every_s) + 5.0
    assert max(widths) <= (2 + 4 * 600 / rest) * step_j / (600 * RUNS)


def test_a_battery_that_counts_energy_needs_no_volts():
    buckets = buckets_of(rest=100, load=100)
    used_j = np.cumsum([0.0, *(power_of(bucket) for bucket in buckets)])
    rows = [battery(energy_now=str(int(5e7 - one / 3.6e-3))) for one in used_j]
    entry, _ = energy_of(buckets, rows)
    assert entry["j_per_inference"] == pytest.approx(RUN_J, rel=0.01)
    assert (entry["idle_w"], entry["busy_w"]) == (pytest.approx(2, rel=0.01), pytest.approx(5, rel=0.01))
    assert "battery" in entry["source"]


def test_a_voltage_that_falls_under_load_is_no_energy():
    """A battery of 3 Ah holds 10.8 kC: a tenth of a volt of them is no loss."""
    buckets = buckets_of(rest=100, load=100)
    rows = staircase(buckets, step_uah=1.0, every_s=1, start_uah=3e6, volts=3.9)
    sagging = [
        row | {f"{BATTERY}voltage_now": "3800000" if second > 100 else "3900000"} for second, row in enumerate(rows)
    ]
    entry, _ = energy_of(buckets, sagging)
    assert entry["j_per_inference"] == pytest.approx(RUN_J, rel=0.06)


def test_a_counter_that_hardly_moves_is_not_measured():
    buckets = buckets_of(rest=30, load=30)
    rows = staircase(buckets, step_uah=10_000, every_s=1, start_uah=3e6, volts=3.9)
    entry, why = energy_of(buckets, rows)
    assert entry is None
    assert why == "its battery's counter moved 1 times in 30 s of load, and bounds take 3: measure for longer"


def test_without_rest_a_battery_tells_nothing_of_a_model():
    buckets = buckets_of(rest=0, load=600)
    rows = staircase(buckets, step_uah=100, every_s=1, start_uah=3e6, volts=3.9)
    assert energy_of(buckets, rows)[0] is None


def test_a_battery_that_is_charged_for_a_while_is_not_measured():
    buckets = buckets_of(rest=100, load=100)
    rows = staircase(buckets, step_uah=1.0, every_s=1, start_uah=3e6, volts=3.9)
    rows[150] = rows[150] | {f"{BATTERY}status": "Charging"}
    entry, why = energy_of(buckets, rows)
    assert entry is None
    assert "unplug it" in why


def test_a_counter_that_goes_up_is_not_believed():
    buckets = buckets_of(rest=100, load=100)
    rows = staircase(buckets, step_uah=1.0, every_s=1, start_uah=3e6, volts=3.9)
    rows[150] = rows[0]
    entry, why = energy_of(buckets, rows)
    assert entry is None
    assert "went up" in why


@pytest.mark.parametrize(
    "told",
    [
        {"type": "Mains"},
        {"scope": "Device", "charge_now": "1000", "voltage_now": "3900000"},
        {"charge_now": "1000"},
        {"charge_now": "1000", "voltage_now": "13"},
        {"charge_now": "0", "voltage_now": "3900000"},
        {"charge_now": "-5", "voltage_now": "3900000"},
        {"charge_now": "secret", "voltage_now": "3900000"},
        {"energy_now": "0"},
    ],
)
def test_a_battery_without_a_counter_is_none(told):
    assert state_of(battery(**told)) is None


def test_two_batteries_are_added_and_one_that_charges_spoils_both():
    other = {path.replace("BAT0", "BAT1"): text for path, text in battery(energy_now="1000000").items()}
    both = state_of(battery(energy_now="2000000") | other)
    assert both.is_discharging
    assert len(both.held) == 2
    assert not state_of(battery(energy_now="2000000") | other | {f"{BATTERY}status": "Charging"}).is_discharging


def test_a_battery_takes_as_long_a_rest_as_the_load():
    counting = battery(energy_now="2000000")
    assert rest_s({}, 300.0) == 0
    assert rest_s(counting, 300.0) == 300
    assert rest_s(counting | {f"{BATTERY}status": "Charging"}, 300.0) == 0
    assert rest_s(counting | _zone("0", "package-0", 5), 300.0) == 20


# What a phone's shell says.

DUMPSYS = (
    "Current Battery Service state:\n  USB powered: false\n  Charge counter: 3210000\n  status: 3\n  voltage: 3912\n"
)


def test_a_phones_own_words_are_those_files():
    state = state_of(battery_readings(DUMPSYS))
    assert state.is_discharging
    assert list(state.held.values()) == [(pytest.approx(11556.0), pytest.approx(3.912))]
    assert not state_of(battery_readings(DUMPSYS.replace("status: 3", "status: 2"))).is_discharging


@pytest.mark.parametrize(
    "said",
    [
        "",
        DUMPSYS.replace("Charge counter", "Max charging current"),
        DUMPSYS.replace("3912", "-3912"),
        DUMPSYS + "  (UPDATES STOPPED -- use 'reset' to restart)\n",
    ],
)
def test_a_phone_that_does_not_say_has_no_battery(said):
    assert battery_readings(said) == {}


def test_a_log_tells_what_was_known_at_a_moment(monkeypatch):
    monkeypatch.setattr("tacit.devices.phone_battery._EVERY_S", 0.01)
    asked = []

    def ask() -> dict[str, str]:
        asked.append(str(len(asked)))
        return {"n": asked[-1]}

    with BatteryLog(ask) as log:
        while len(asked) < 5:
            pass
    moments = [when_s for when_s, _ in log._told]
    assert [log.at(when_s)["n"] for when_s in moments] == asked[: len(moments)]
    assert log.at(moments[0] - 100)["n"] == "0"
    assert log.at(moments[2] + (moments[3] - moments[2]) / 2)["n"] == "2"
