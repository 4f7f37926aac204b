"""Boards and phones as data: what is shipped is whole, and what a user adds is checked."""

import tomllib

import pytest

from tacit.devices.profile import _FOLDER, load_profile, profile_names, profiles

GOOD = """
title = "My board"
kind = "mcu"
cpu = "RP2040"
cores = 2
clock_mhz = 133
isa = "armv6m"
ram_bytes = 270_336
arena_bytes = 262_144
flash_bytes = 2_097_152
[[sources]]
what = "data sheet"
section = "1"
url = "https://example.org"
"""


def write(folder, text):
    path = folder / "mine.toml"
    path.write_text(text)
    return path


def test_the_boards_and_phones_that_people_have_are_there():
    assert set(profile_names()) >= {
        "pi-3b-plus", "pi-4b", "pi-5", "pi-zero-2w", "jetson-nano", "jetson-orin-nano", "pixel-8", "galaxy-s23",
        "galaxy-a14", "iphone-15", "esp32-s3", "esp32-s3-psram", "nrf52840", "stm32f746", "stm32h743", "rp2040",
        "rp2350",
    }  # fmt: skip


@pytest.mark.parametrize("profile", profiles(), ids=lambda profile: profile.name)
def test_every_profile_says_where_its_figures_come_from(profile):
    assert all(source.url.startswith("https://") and source.what and source.section for source in profile.sources)
    assert (profile.kind == "mcu") == (profile.flash_bytes is not None) == (profile.arena_bytes is not None)
    assert all(anchor.source for anchor in profile.anchors)


def test_sizes_are_those_of_the_data_sheets():
    """Written down here a second time, from the same documents."""
    kib = 1024
    assert {p.name: (p.ram_bytes // kib, p.flash_bytes // kib, p.clock_mhz) for p in profiles() if p.kind == "mcu"} == {
        "esp32-s3": (512, 1024, 240),
        "esp32-s3-psram": (512 + 8192, 1024, 240),
        "nrf52840": (256, 1024, 64),
        "rp2040": (264, 2048, 133),
        "rp2350": (520, 4096, 150),
        "stm32f746": (320, 1024, 216),
        "stm32h743": (1024, 2048, 480),
    }
    assert load_profile("stm32h743").arena_bytes == 512 * kib  # the memory is not in one piece
    assert load_profile("pi-zero-2w").ram_bytes == 512 << 20


def test_a_file_of_ones_own_is_read_and_named_by_its_file(tmp_path):
    assert load_profile(write(tmp_path, GOOD)).name == "mine"
    assert load_profile(str(write(tmp_path, GOOD))).clock_mhz == 133


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("clock_mhz", "clock_mzh", r"expected a known key, got 'clock_mzh'; did you mean 'clock_mhz'\?"),
        ("what =", "wat =", r"sources: expected a known key, got 'wat'; did you mean 'what'\?"),
        ("cores = 2", "", "expected the key 'cores', got none"),
        ('"mcu"', '"toaster"', "expected kind mcu, sbc, phone, got kind='toaster'"),
        ('"armv6m"', '["armv6m"]', "expected isa armv6m"),
        ("133", "0", "expected clock_mhz from 1 to 20000, got clock_mhz=0"),
        ("133", "nan", "expected clock_mhz"),
        ("133", "133.5", "expected clock_mhz"),
        ("133", "true", "expected clock_mhz"),
        ("270_336", "-1", "expected ram_bytes"),
        ("270_336", "1" + "0" * 30, "expected ram_bytes"),
        ("262_144", "300_000", "expected arena_bytes <= ram_bytes"),
        ("flash_bytes = 2_097_152", "", "expected arena_bytes and flash_bytes of a microcontroller"),
        ('"My board"', '"\\u001b[2J"', "expected a line of text"),
        ('"My board"', "7", "expected a line of text"),
        ('"My board"', '"' + "x" * 600 + '"', "expected a line of text"),
        ("[[sources]]", "[sources]", "expected a list of tables"),
        ("[[sources]]", "sources = [1]\n[[other]]", "expected a known key, got 'other'|expected a list of tables"),
        ("133", "133 MHz", "expected TOML, got a syntax error"),
    ],
)
def test_what_is_wrong_in_a_file_is_one_line_that_names_the_key(tmp_path, old, new, said):
    assert GOOD.count(old) >= 1
    with pytest.raises(ValueError, match=said) as seen:
        load_profile(write(tmp_path, GOOD.replace(old, new, 1)))
    assert "mine.toml" in str(seen.value)
    assert "\n" not in str(seen.value)
    assert str(seen.value).isprintable()


def test_a_file_without_sources_is_refused(tmp_path):
    table = GOOD.split("[[sources]]")[0]
    with pytest.raises(ValueError, match="at least one source"):
        load_profile(write(tmp_path, table + "sources = []\n"))


def test_files_that_are_no_profiles_are_refused(tmp_path):
    for content in (b"\xff\xfe", b"\x00" * 100, b"x" * 100_000):
        path = tmp_path / "bad.toml"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.toml: expected"):
            load_profile(path)
    with pytest.raises(FileNotFoundError, match="check the path"):
        load_profile(tmp_path / "none.toml")
    with pytest.raises(FileNotFoundError, match=r"did you mean 'pi-5'\?"):
        load_profile("pi5")
    with pytest.raises(FileNotFoundError, match="expected a profile"):
        load_profile("../../../etc/passwd")


def test_shipped_files_hold_no_key_that_the_reader_fills_in():
    for path in _FOLDER.glob("*.toml"):
        assert "name" not in tomllib.loads(path.read_text(encoding="utf-8"))
