"""What fits where, judged by published figures and by files whose work is known."""

import json
import math
import struct

import pytest
import torch
from torch import nn

from tacit.compression.export import export
from tacit.devices.estimate import _CYCLES_PER_MAC, NOTHING_WAS_RUN, Work, estimate, work_of
from tacit.devices.fit import ArtifactFacts, MicroNeeds, Room, facts_of, fit, fit_table
from tacit.devices.micro_code import code_bytes
from tacit.devices.profile import Profile, Source, load_profile, profiles
from tacit.devices.sandbox import ArtifactRefused
from tacit.devices.tflite_work import Tensor, count, macs_of

# MLPerf Tiny's models (mlcommons/tiny, 1afd2c98): multiply-accumulates, elements, operators; the int8 files.
MODELS = {
    "ad": (264_192, 0, 10),
    "ic": (12_501_632, 28_746, 16),
    "kws": (2_656_768, 76, 13),
    "vww": (7_489_664, 258, 31),
}
# MLPerf Tiny, closed division, performance/results.txt: milliseconds of the median throughput.
PUBLISHED = [
    # round, submitter and system, processor, MHz, number, {model: ms}
    ("v0.5 reference L4R5ZI", "armv7em", 120, "int8", {"ad": 10.052, "ic": 704.225, "kws": 181.917, "vww": 600.601}),
    ("v1.0 OctoML cmsis_nn L4R5ZI", "armv7em", 120, "int8", {"ad": 8.605, "ic": 389.56, "kws": 99.81, "vww": 301.205}),
    ("v1.1 Plumerai NUCLEO-L4R5ZI", "armv7em", 120, "int8", {"ad": 4.052, "ic": 167.757, "kws": 47.781, "vww": 98.756}),
    ("v1.3 ST NUCLEO_L4R5ZI-P", "armv7em", 120, "int8", {"ad": 4.794, "ic": 165.675, "kws": 43.419, "vww": 89.434}),
    ("v1.1 Krai NRF5340-DK", "armv7em", 128, "int8", {"ad": 6.289, "ic": 317.864, "kws": 76.488, "vww": 233.318}),
    ("v1.2 ST NUCLEO_U575ZI_Q", "armv7em", 160, "int8", {"ad": 3.429, "ic": 111.074, "kws": 29.056, "vww": 59.277}),
    ("v1.1 ST NUCLEO_H7A3ZI_Q", "armv7em-m7", 280, "int8", {"ad": 1.818, "ic": 51.948, "kws": 15.353, "vww": 29.629}),
    ("v1.2 ST NUCLEO_H7A3ZI_Q", "armv7em-m7", 280, "int8", {"ad": 1.225, "ic": 40.845, "kws": 11.318, "vww": 23.804}),
    ("v1.1 Bosch NUCLEO_G0B1RE", "armv6m", 64, "int8", {"ad": 46.546, "ic": 1669.449, "kws": 679.348, "vww": 1869.159}),
    ("v1.2 Bosch NUCLEO_G0B1RE", "armv6m", 64, "int8", {"ad": 40.893, "ic": 1522.07, "kws": 474.608, "vww": 1414.427}),
    ("v1.2 Bosch CY8CPROTO_062_4343W float", "armv7em", 150, "float32", {"ad": 16.775, "ic": 479.846, "vww": 360.62}),
    ("v1.2 Bosch NUCLEO_H7A3ZI float", "armv7em-m7", 280, "float32", {"ad": 5.23, "ic": 124.224, "vww": 81.42}),
]  # fmt: skip
CASES = [
    pytest.param(isa, mhz, number, model, ms, id=f"{system} {model}")
    for system, isa, mhz, number, times in PUBLISHED
    for model, ms in times.items()
]


def board(isa, mhz, **others):
    source = Source(what="test", section="test", url="https://example.org")
    memory = {"ram_bytes": 1 << 20, "arena_bytes": 1 << 20, "flash_bytes": 1 << 21, "kind": "mcu", **others}
    return Profile(name="b", title="B", cpu="b", cores=1, clock_mhz=mhz, isa=isa, sources=(source,), **memory)


def work(model, number):
    macs, elements, operators = MODELS[model]
    return Work(macs={number: macs}, elements=elements, operators=operators, whole=True)


@pytest.mark.parametrize(("isa", "mhz", "number", "model", "ms"), CASES)
def test_what_mlperf_tiny_published_falls_into_the_estimate(isa, mhz, number, model, ms):
    found = estimate(work(model, number), board(isa, mhz))
    assert found.low_ms <= ms <= found.high_ms


def test_the_estimates_tell_processors_apart():
    """A control: with another processor's range, published figures fall outside."""
    outside = [
        (isa, other, ms)
        for _, isa, mhz, number, times in PUBLISHED
        for model, ms in times.items()
        for other in ("armv6m", "armv7em-m7", "neon")
        if other != isa
        and not (found := estimate(work(model, number), board(other, mhz))).low_ms <= ms <= found.high_ms
    ]
    assert {(isa, other) for isa, other, _ in outside} >= {
        ("armv6m", "armv7em-m7"), ("armv7em", "armv6m"), ("armv7em-m7", "armv6m"), ("armv7em-m7", "neon"),
    }  # fmt: skip


@pytest.mark.parametrize("profile", [p for p in profiles() if p.anchors], ids=lambda profile: profile.name)
def test_a_boards_own_published_figures_fall_into_its_estimate(profile):
    """On several cores: between a perfect division of the work and none."""
    for anchor in profile.anchors:
        known = Work(macs={anchor.number: anchor.macs}, elements=0, operators=0, whole=True)
        found = estimate(known, profile)
        assert found.low_ms / anchor.threads <= anchor.ms <= found.high_ms, anchor


def test_no_estimate_is_a_single_number_or_goes_without_its_label():
    for profile in profiles():
        for number in ("int8", "float32"):
            found = estimate(work("ic", number), profile)
            assert found.high_ms > 2 * found.low_ms
            assert str(found).endswith(f"({NOTHING_WAS_RUN})")
            assert " to " in str(found)
    assert all(low < high for rates in _CYCLES_PER_MAC.values() for low, high in rates.values())


def test_what_cannot_be_counted_is_not_estimated():
    known = Work(macs={"int8": 10}, elements=0, operators=1, whole=False)
    assert estimate(known, load_profile("rp2040")) is None
    hybrid = Work(macs={"hybrid": 10}, elements=0, operators=1, whole=True)
    assert estimate(hybrid, load_profile("rp2040")) is None  # no microcontroller runs it
    assert estimate(hybrid, load_profile("pi-5")) is not None


def test_a_browser_is_slower_than_its_phone():
    phone = load_profile("iphone-15")
    native = Profile(**{**{n: getattr(phone, n) for n in phone.__dataclass_fields__}, "runs": "native"})
    assert estimate(work("ic", "int8"), phone).low_ms == pytest.approx(3 * estimate(work("ic", "int8"), native).low_ms)


# Work


class Counted(nn.Module):
    """Each kind of operator with multiply-accumulates; the sums are in the test below."""

    def __init__(self):
        super().__init__()
        self.first, self.apart = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=8)
        self.wide, self.leave = nn.Conv2d(8, 16, 1, stride=2), nn.Linear(16 * 9, 5)

    def forward(self, image):
        return self.leave(torch.relu(self.wide(self.apart(self.first(image)))).flatten(1))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit")
    calibration = (torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0)).numpy(),)
    made = {}
    for form in ("float32", "dynamic_int8", "full_int8"):
        made[form] = folder / f"{form}.tflite"
        export(Counted().eval(), (torch.zeros(1, 3, 8, 8),), made[form], form=form, calibration=calibration)
    return made


def test_work_is_what_one_counts_by_hand(files):
    by_hand = 8 * 8 * 8 * 27 + 6 * 6 * 8 * 9 + 3 * 3 * 16 * 8 + 144 * 5
    assert sum(work_of(files["float32"]).macs.values()) == by_hand
    assert work_of(files["float32"]).macs.keys() == {"float32"}
    assert work_of(files["full_int8"]).macs == {"int8": by_hand}
    hybrid = work_of(files["dynamic_int8"])
    assert sum(hybrid.macs.values()) == by_hand
    assert "hybrid" in hybrid.macs
    assert all(work_of(path).whole for path in files.values())


@pytest.mark.parametrize(
    ("code", "inputs", "output", "wanted"),
    [
        (3, [(1, 8, 8, 4), (6, 3, 3, 2)], (1, 8, 8, 6), 64 * 6 * 18),  # grouped: the weights have fewer channels
        (4, [(1, 8, 8, 4), (1, 3, 3, 4)], (1, 4, 4, 4), 16 * 36),
        (9, [(3, 20), (7, 20)], (3, 7), 3 * 140),
        (67, [(4,), (5, 2, 2, 3), (1, 4, 4, 3)], (1, 8, 8, 5), 16 * 60),
        (126, [(2, 3, 4), (2, 4, 5)], (2, 3, 5), 2 * 3 * 4 * 5),
        (126, [(2, 4, 3), (2, 4, 5)], (2, 3, 5), 2 * 3 * 4 * 5),  # the first one turned round
        (132, [(1, 4, 4, 4, 2), (3, 3, 3, 2, 6)], (1, 2, 2, 2, 6), 8 * 27 * 12),
        (44, [(1, 10, 3), *[(8, 3)] * 4, *[(8, 8)] * 4], (1, 10, 8), 10 * (4 * 24 + 4 * 64)),
    ],
)
def test_each_kind_of_operator_is_counted_by_the_book(code, inputs, output, wanted):
    found = macs_of(code, [Tensor(shape, 9) for shape in inputs], [Tensor(output, 9)])
    assert found == wanted


def test_additions_have_no_multiply_accumulates():
    assert macs_of(0, [Tensor((4,), 0), Tensor((4,), 0)], [Tensor((4,), 0)]) is None


def counted_or_refused(content):
    """Nothing else may happen: no other error, nothing that is no plain data."""
    try:
        return json.dumps(count(content))
    except ValueError as error:
        return "expected offsets inside the file" in str(error)


def test_a_damaged_file_is_refused_wherever_it_is_cut(files, tmp_path):
    content = files["full_int8"].read_bytes()
    for length in range(8, len(content), max(1, len(content) // 40)):
        assert counted_or_refused(content[:length])
    path = tmp_path / "cut.tflite"
    path.write_bytes(content[: len(content) // 3])
    with pytest.raises(ArtifactRefused):
        work_of(path)


@pytest.mark.parametrize("value", [0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0])
def test_no_number_in_a_file_is_followed_out_of_it(files, value):
    content = files["full_int8"].read_bytes()
    for place in range(0, 400, 4):
        damaged = bytearray(content)
        struct.pack_into("<I", damaged, place, value)
        assert counted_or_refused(bytes(damaged))


def test_sizes_that_no_model_has_are_refused(files, tmp_path):
    """A shape of many huge axes multiplies to more than any device computes."""
    content = bytearray(files["full_int8"].read_bytes())
    at = content.find(struct.pack("<Iiiii", 4, 8, 3, 3, 3))
    assert at > 0
    struct.pack_into("<iiii", content, at + 4, *[2**31 - 1] * 4)
    path = tmp_path / "huge.tflite"
    path.write_bytes(content)
    with pytest.raises(ArtifactRefused, match="sizes that a model can have"):
        work_of(path)


# Fit


def known(**others):
    needs = MicroNeeds(arena_bytes=56_000, head_bytes=49_000, persistent_bytes=7_000, operators=("CONV_2D", "ADD"))
    return ArtifactFacts(**{"name": "ic", "runtime": "litert", "bytes": 98_496, "micro": needs, **others})


def test_a_model_fits_where_there_is_room_and_says_how_much():
    found = fit(known(), load_profile("nrf52840"))
    code = code_bytes(("CONV_2D", "ADD"))
    assert found.verdict == "fits"
    assert found.flash.low_bytes == 98_496 + code[0]
    assert found.memory.high_bytes >= 56_000
    assert found.memory.low_bytes >= 49_000 + 3_500
    assert "to spare" in found.why


# The same file's arena as a program for 32-bit Arm (Cortex-M4, GCC 12.2, tflite-micro 90b983c2, run under qemu-arm).
@pytest.mark.parametrize(
    ("head", "persistent", "on_32_bits"),
    [
        (5136, 4880, 8164), (9232, 5040, 12384), (12304, 4336, 14960), (16000, 8272, 22772), (768, 3216, 2260),
        (49152, 6832, 54340), (73728, 29952, 100660),
    ],
)  # fmt: skip
def test_the_arena_of_a_32_bit_program_lies_within_the_range(head, persistent, on_32_bits):
    needs = MicroNeeds(arena_bytes=head + persistent, head_bytes=head, persistent_bytes=persistent, operators=())
    room = fit(known(micro=needs), load_profile("stm32h743")).memory
    assert room.low_bytes - (2 << 10) <= on_32_bits <= room.high_bytes - (16 << 10)


def test_a_model_that_needs_one_byte_too_much_does_not_fit():
    room = fit(known(), load_profile("nrf52840")).memory
    exact = board("armv7em", 64, arena_bytes=room.high_bytes)
    assert fit(known(), exact).verdict == "fits"
    tight = board("armv7em", 64, arena_bytes=room.high_bytes - 1)
    assert fit(known(), tight).verdict == "unknown"
    small = board("armv7em", 64, arena_bytes=room.low_bytes - 1)
    assert fit(known(), small).verdict == "does not fit"
    assert "too much" in fit(known(), small).why
    flash = fit(known(), load_profile("nrf52840")).flash
    assert fit(known(), board("armv7em", 64, flash_bytes=flash.low_bytes - 1)).verdict == "does not fit"


def test_what_does_not_fit_gets_no_latency():
    found = fit(known(work=work("ic", "int8")), board("armv7em", 64, arena_bytes=2048))
    assert (found.verdict, found.latency) == ("does not fit", None)


def test_what_microcontrollers_do_not_run_says_why():
    refused = known(micro=None, micro_refused="Hybrid models are not supported")
    assert fit(refused, load_profile("rp2040")).verdict == "does not run"
    assert "Hybrid" in fit(refused, load_profile("rp2040")).why
    onnx = ArtifactFacts(name="a", runtime="onnxruntime", bytes=1000)
    assert fit(onnx, load_profile("rp2040")).verdict == "does not run"
    program = ArtifactFacts(name="a", runtime="executorch", bytes=1000, peak_memory_bytes=1)
    assert fit(program, load_profile("iphone-15")).verdict == "does not run"
    assert fit(program, load_profile("pixel-8")).verdict == "fits"


def test_what_was_not_measured_is_unknown_and_never_zero():
    assert fit(known(micro=None), load_profile("rp2040")).verdict == "unknown"
    found = fit(known(), load_profile("pi-5"))
    assert (found.verdict, found.memory) == ("unknown", None)
    assert "not measured" in found.why
    assert fit(known(bytes=3 << 30), load_profile("pi-5")).verdict == "does not fit"


@pytest.mark.parametrize(("peak", "verdict"), [(1 << 20, "fits"), (200 << 20, "unknown"), (1 << 30, "does not fit")])
def test_a_linux_board_leaves_half_of_its_memory(peak, verdict):
    assert fit(known(peak_memory_bytes=peak), load_profile("pi-zero-2w")).verdict == verdict


def test_the_table_has_a_row_for_each_pair_and_is_plain_data():
    rows = fit_table([known(work=work("ic", "int8")), known(name="other", micro=None)], profiles())
    assert len(rows) == 2 * len(profiles())
    assert json.loads(json.dumps(rows)) == rows
    assert {row["latency"].split("(")[-1] for row in rows} <= {f"{NOTHING_WAS_RUN})", "not estimated"}
    assert all(row["latency_ms"] is None or row["latency_ms"][0] < row["latency_ms"][1] for row in rows)
    assert rows[0]["flash_bytes"][0] < rows[0]["flash_bytes"][2]


def test_room_is_judged_at_both_ends():
    assert Room(low_bytes=5, high_bytes=5, have_bytes=5).verdict == "fits"
    assert Room(low_bytes=6, high_bytes=6, have_bytes=5).verdict == "does not fit"


@pytest.mark.parametrize(
    ("operators", "plain", "cmsis_nn"),
    [
        ("CONV_2D DEPTHWISE_CONV_2D FULLY_CONNECTED RESHAPE SOFTMAX AVERAGE_POOL_2D", 59_804, 99_664),
        (
            "ADD CONV_2D DEPTHWISE_CONV_2D DEQUANTIZE FULLY_CONNECTED MAX_POOL_2D MEAN MUL QUANTIZE RESHAPE RSQRT SUB "
            "TRANSPOSE",
            82_916,
            125_556,
        ),
    ],
)
def test_what_was_linked_lies_within_the_range_of_the_code(operators, plain, cmsis_nn):
    """As linked for a Cortex-M4; the range is made of operators that were linked one by one."""
    low, high = code_bytes(operators.split())
    assert low <= plain < cmsis_nn <= high
    assert plain - low < 5_000


def test_code_grows_with_the_operators_and_unknown_ones_count_as_the_largest():
    few, more = code_bytes(("CONV_2D",)), code_bytes(("CONV_2D", "SOFTMAX"))
    assert 16 << 10 < few[0] < few[1] < 256 << 10
    assert few[0] < more[0]
    assert few[1] < more[1]
    assert code_bytes(("CONV_2D", "NEWER"))[1] >= more[1]


def test_facts_come_from_the_file_itself(files):
    facts = facts_of(files["full_int8"], name="small")
    assert (facts.name, facts.bytes) == ("small", files["full_int8"].stat().st_size)
    assert facts.micro.arena_bytes >= facts.micro.head_bytes > 0
    assert "CONV_2D" in facts.micro.operators
    assert math.isclose(sum(facts.work.macs.values()), sum(work_of(files["float32"]).macs.values()))
    assert fit(facts, load_profile("rp2040")).verdict == "fits"
    hybrid = facts_of(files["dynamic_int8"])
    assert hybrid.micro is None
    assert fit(hybrid, load_profile("rp2040")).verdict == "does not run"


def test_a_file_that_is_no_model_has_no_facts(tmp_path):
    (tmp_path / "m.tflite").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ArtifactRefused, match="Git LFS"):
        facts_of(tmp_path / "m.tflite")
    with pytest.raises(FileNotFoundError):
        facts_of(tmp_path / "none.tflite")
