"""What a device's files say: as a Raspberry Pi, a laptop and a virtual machine have them."""

import math

import pytest

from tacit.devices.conditions import (
    believe_readings,
    interpret,
    is_hotter,
    is_throttled,
    steal_share,
    waiting_share,
    watch,
)

PI = {
    "/sys/class/thermal/thermal_zone0/temp": "61342",
    "/sys/devices/platform/soc/soc:firmware/get_throttled": "0",
    "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "ondemand",
    "/sys/devices/system/cpu/cpu3/cpufreq/scaling_governor": "ondemand",
    "/sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "600000",
    "/sys/devices/system/cpu/cpu3/cpufreq/scaling_cur_freq": "1800000",
    "/proc/loadavg": "0.21 0.30 0.10 1/120 4242",
}
LAPTOP = {
    "/sys/class/thermal/thermal_zone0/temp": "-274000",
    "/sys/class/thermal/thermal_zone1/temp": "55000",
    "/sys/class/thermal/thermal_zone7/temp": "71000",
    "/sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count": "4",
    "/sys/devices/system/cpu/cpu1/thermal_throttle/core_throttle_count": "5",
    "/sys/class/power_supply/AC/status": "",
    "/sys/class/power_supply/BAT0/status": "Discharging",
    "/sys/class/power_supply/BAT0/capacity": "83",
}


def test_a_pi_is_understood():
    found = interpret(PI)
    assert found["temperature_c"] == 61.342
    assert found["governor"] == "ondemand"
    assert found["cur_freq_khz"] == 1_800_000  # of the core that works
    assert found["throttle_flags"] == 0
    assert found["load_1m"] == 0.21
    assert found["power"] is None


def test_a_laptop_is_understood_and_a_sensor_that_is_none_is_left_out():
    found = interpret(LAPTOP)
    assert (found["temperature_c"], found["throttle_count"]) == (71.0, 9)
    assert (found["power"], found["battery_percent"]) == ("battery", 83)


def test_what_is_not_said_is_none_and_never_zero():
    assert set(interpret({}).values()) == {None}


@pytest.mark.parametrize("text", ["", "hot", "1e5", "nan", "-", "9" * 30, "0x10", "٤٨٢٥٠"])
def test_what_is_no_number_is_not_measured(text):
    assert interpret({"/sys/class/thermal/thermal_zone0/temp": text})["temperature_c"] is None


@pytest.mark.parametrize(
    ("before", "after", "throttled"),
    [
        ({}, {}, False),
        ({"throttle_count": 3}, {"throttle_count": 4}, True),
        ({"throttle_count": 3}, {"throttle_count": 3}, False),
        ({"cur_freq_khz": 1_800_000}, {"cur_freq_khz": 1_500_000}, True),
        ({"cur_freq_khz": 1_500_000}, {"cur_freq_khz": 1_800_000}, False),
        ({"cur_freq_khz": 1_800_000}, {}, False),
        ({"throttle_flags": 0x50000}, {"throttle_flags": 0x50000}, False),  # once, since the start of the Pi
        ({"throttle_flags": 0}, {"throttle_flags": 0x4}, True),
        ({"throttle_flags": 0x1}, {"throttle_flags": 0}, True),
    ],
)
def test_throttling_is_what_a_device_says_or_a_clock_that_fell(before, after, throttled):
    assert is_throttled(before, after) is throttled


def test_two_degrees_more_are_hotter():
    assert is_hotter({"temperature_c": 50.0}, {"temperature_c": 52.0})
    assert not is_hotter({"temperature_c": 50.0}, {"temperature_c": 51.5})
    assert not is_hotter({"temperature_c": None}, {"temperature_c": 90.0})


def test_the_battery_of_a_mouse_is_not_the_devices():
    mouse, own = "/sys/class/power_supply/hidpp_battery_0/", "/sys/class/power_supply/BAT0/"
    readings = {f"{mouse}scope": "Device", f"{mouse}status": "Discharging", f"{mouse}capacity": "5"}
    assert interpret(readings)["battery_percent"] is interpret(readings)["power"] is None
    found = interpret({**readings, f"{own}scope": "System", f"{own}status": "Full", f"{own}capacity": "99"})
    assert (found["battery_percent"], found["power"]) == (99, "mains")


def test_shares_of_time_need_counters_that_go_forward():
    assert steal_share({"/proc/stat": "cpu 0 0 0 0 0 0 0 5"}, {"/proc/stat": "cpu 9 0 0 0 0 0 0 4"}) is None
    assert steal_share({}, {}) is None
    assert waiting_share({"/proc/self/schedstat": "5 5 1"}, {"/proc/self/schedstat": "4 9 1"}) is None
    assert waiting_share({"/proc/self/schedstat": "5"}, {"/proc/self/schedstat": "9 9"}) is None


def test_readings_of_a_device_are_bounded_and_clean():
    hostile = {"/a": "x" * 10**6, "b": "not a path", "/c": 5, 7: "seven", "/d": None, "/e": " 1\n"}
    assert believe_readings(hostile) == {"/a": "x" * 200, "/e": "1"}
    assert len(believe_readings({f"/{number}": "1" for number in range(10_000)})) == 256
    assert believe_readings([1]) == {}
    assert interpret(believe_readings({"/proc/loadavg": "9" * 300}))["load_1m"] is None


def test_a_governor_of_control_characters_is_cleaned():
    path = "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"
    assert str(interpret({path: "perf\x1b[2J"})["governor"]).isprintable()


@pytest.mark.parametrize("affinity", [None, 5, "", "0;rm -rf /", "../../etc", "0,1,", math.nan])
def test_an_affinity_that_is_none_makes_no_path(affinity):
    clocks = [pattern for pattern in watch(affinity) if "cpufreq" in pattern]
    assert clocks == [
        f"/sys/devices/system/cpu/cpu*/cpufreq/{name}" for name in ("scaling_governor", "scaling_cur_freq")
    ]


def test_only_the_cores_that_we_may_use_are_watched():
    assert sum("cpufreq" in pattern for pattern in watch("2,3")) == 4
