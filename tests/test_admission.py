"""The front door: what is not as the server's own model says is set aside with a reason, and the round goes on."""

import io
import pickle

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from tacit.federated.admission import FrontDoor, Roster, Sent, admit, is_number, refusal_reason, schema
from tacit.federated.averaging import from_record, to_record
from tacit.federated.evaluation import reply_metrics
from tacit.federated.grid import InProcessGrid

OWNERS, ROUND = 4, 3
MODEL = {
    "conv": np.arange(6, dtype=np.float32).reshape(2, 3),
    "bias": np.zeros(3, np.float32),
    "scale": np.zeros((), np.float32),
    "nothing": np.zeros((0, 2), np.float32),
}
DOOR = FrontDoor.of_training(schema(MODEL), owners=OWNERS, unit="client", loss=True)
NODES = {index + 10: index for index in range(OWNERS)}
GRID = InProcessGrid(ClientApp(), {})
SECRETS = st.sampled_from(
    [0, 1, -1, 2**62, -(2**62), 0.0, 1.0, -0.0, float("nan"), float("inf"), 1e308, [], [1], [1.0]]
)


def ask(node=10, name="m"):
    message = GRID.create_message(RecordDict(), "train", node, "1")
    message.metadata.__dict__["_message_id"] = f"{name}{node}"
    return message


def metrics_of(index=0, **changes):
    fields = {"num-examples": 1, "owner": index, "server-round": ROUND, "unclipped": 1, "loss": 0.5}
    return {name: value for name, value in {**fields, **changes}.items() if value is not None}


def content(arrays=None, metrics=None, **more):
    record = arrays if isinstance(arrays, ArrayRecord) else to_record(MODEL if arrays is None else arrays)
    return RecordDict({"arrays": record, "metrics": MetricRecord(metrics or metrics_of()), **more})


def judge(*replies, roster=None, door=DOOR, questions=None):
    sent = Sent.of([ask(node) for node in NODES] if questions is None else questions, ROUND)
    return admit(replies, sent, roster or Roster(dict(NODES), closed=True), door)


def verdict(hostile, **settings):
    """Why a hostile content from node 10 is set aside; the honest reply behind it must come through."""
    honest = Message(content(metrics=metrics_of(1)), reply_to=ask(11))
    result = judge(Message(hostile, reply_to=ask()), honest, **settings)
    assert result.replies[-1:] == [honest]
    assert (len(result.replies) == 2) == (result.aside == {})
    return result.aside.get(10)


def replaced(name, array):
    """The model with one array as it came over the wire."""
    record = to_record(MODEL)
    record[name] = array
    return content(record)


def npy(array, version=(1, 0)):
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version=version, allow_pickle=False)
    return file.getvalue()


def wire(data, *, dtype="float32", shape=(2, 3), stype="numpy.ndarray"):
    return Array(dtype, shape, stype, data)


def test_an_honest_reply_is_admitted_unchanged():
    reply = Message(content(), reply_to=ask())
    result = judge(reply)
    assert result.replies == [reply]
    assert result.aside == {}


GOOD = npy(MODEL["conv"])
START = len(GOOD) - 24
HOSTILE_ARRAYS = {
    "float64": Array(MODEL["conv"].astype(np.float64)),
    "float64 said to be float32": wire(npy(MODEL["conv"].astype(np.float64))),
    "float16 said to be float32": wire(npy(MODEL["conv"].astype(np.float16))),
    "integers of the same size": wire(npy(MODEL["conv"].astype(np.int32))),
    "complex": Array(MODEL["conv"].astype(np.complex64)),
    "big-endian": Array(MODEL["conv"].astype(">f4")),
    "big-endian said to be float32": wire(npy(MODEL["conv"].astype(">f4"))),
    "Fortran order": Array(np.asfortranarray(MODEL["conv"])),
    "no dimension": Array(np.float32([1.0]).reshape(())),
    "one number to broadcast": Array(np.float32([1.0])),
    "one number said to be the model's shape": wire(npy(np.float32([1.0]))),
    "a column to broadcast": Array(np.zeros((2, 1), np.float32)),
    "one more dimension": Array(np.zeros((5, 2, 3), np.float32)),
    "transposed": Array(MODEL["conv"].T.copy()),
    "as long, of another shape": wire(npy(np.zeros((3, 2), np.float32))),
    "empty": wire(b""),
    "cut": wire(GOOD[:-1]),
    "cut within the header": wire(GOOD[:40]),
    "one byte more": wire(GOOD + b"\0"),
    "a header that lies about its length": wire(GOOD[:8] + b"\xff\xff" + GOOD[10:]),
    "a header's length of zero": wire(GOOD[:8] + b"\0\0" + GOOD[10:]),
    "a header of 60 KB of spaces, which NumPy refuses": wire(
        GOOD[:8] + (60_000).to_bytes(2, "little") + GOOD[10 : START - 1].ljust(59_999) + b"\n" + GOOD[START:]
    ),
    "format 2.0": wire(npy(MODEL["conv"], version=(2, 0))),
    "a pickle": wire(pickle.dumps(MODEL["conv"])),
    "a pickle in .npy": wire(GOOD.replace(b"'<f4'", b"'|O' ")),
    "a ZIP archive": wire(b"PK\x05\x06" + bytes(18)),
    "a broken ZIP archive": wire(b"PK\x03\x04junk"),
    "a nested literal that exhausts the parser": wire(b"\x93NUMPY\x01\x00\x10\x20" + b"-" * 0x2010),
    "code instead of a header": wire(GOOD.replace(b"{'descr'", b"(exit())")),
    "padding with something else": wire(GOOD[: START - 3] + b"x \n" + GOOD[START:]),
    "another serialisation": wire(GOOD, stype="torch"),
    "a dtype of 10 MB": wire(GOOD, dtype="f" * 10_000_000),
    "a shape of a million dimensions": wire(GOOD, shape=(1,) * 1_000_000),
    "a negative shape": wire(GOOD, shape=(-2, -3)),
    "NaN": Array(np.where(MODEL["conv"] == 5, np.float32("nan"), MODEL["conv"])),
    "infinity": Array(np.where(MODEL["conv"] == 5, np.float32("inf"), MODEL["conv"])),
    "minus infinity": Array(np.where(MODEL["conv"] == 5, -np.float32("inf"), MODEL["conv"])),
    "a finite number whose square is not": Array(np.where(MODEL["conv"] == 5, np.float32(-3e38), MODEL["conv"])),
}


@pytest.mark.parametrize("case", HOSTILE_ARRAYS)
def test_a_hostile_array_is_set_aside_and_the_others_go_on(case):
    reason = verdict(replaced("conv", HOSTILE_ARRAYS[case]))
    assert reason is not None
    assert "'conv'" in reason


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_the_same_holds_for_an_array_of_no_dimension(value):
    assert verdict(replaced("scale", Array(np.asarray(value, np.float32)))) is not None


REORDERED = {name: MODEL[name] for name in reversed(MODEL)}
HOSTILE_CONTENTS = {
    "a missing array": content({name: MODEL[name] for name in list(MODEL)[1:]}),
    "one array more": content({**MODEL, "poison": MODEL["conv"]}),
    "another name": content({("x" if name == "conv" else name): array for name, array in MODEL.items()}),
    "a name of 10 MB": content({("\x1b[2J" * 2_500_000 if n == "conv" else n): a for n, a in MODEL.items()}),
    "reordered arrays": content(REORDERED),
    "no arrays": RecordDict({"metrics": MetricRecord(metrics_of())}),
    "no metrics": RecordDict({"arrays": to_record(MODEL)}),
    "nothing": RecordDict(),
    "two records of arrays": content(more=to_record(MODEL)),
    "two records of metrics": content(more=MetricRecord(metrics_of())),
    "a configuration": content(config=ConfigRecord({"run": "mine"})),
    "the records' names exchanged": RecordDict({"metrics": to_record(MODEL), "arrays": MetricRecord(metrics_of())}),
    "metrics for arrays": RecordDict({"arrays": MetricRecord(), "metrics": MetricRecord(metrics_of())}),
    **{
        f"{name} = {value}": content(metrics=metrics_of(**{name: value}))
        for name, values in {
            "num-examples": (None, 0, -1, 2, 10**12, 1.0, float("nan"), [1], []),
            "owner": (None, -1, OWNERS, 10**12, 0.0, float("nan"), [0]),
            "server-round": (None, ROUND - 1, ROUND + 1, float(ROUND), [ROUND]),
            "unclipped": (None, 2, -1, 1.0, [1]),
            "loss": (None, -0.5, float("nan"), float("inf"), 1e300, 1, [0.5]),
            "extra": (1, 0.5, [0.0] * 1000),
        }.items()
        for value in values
    },
}


@pytest.mark.parametrize("case", [case[:60] for case in HOSTILE_CONTENTS])
def test_a_hostile_content_is_set_aside_and_the_others_go_on(case):
    (hostile,) = (value for name, value in HOSTILE_CONTENTS.items() if name[:60] == case)
    reason = verdict(hostile)
    assert reason is not None
    assert reason.isprintable()
    assert len(reason) < 200


def test_a_false_count_buys_no_weight_where_sizes_are_declared():
    sizes = {0: 64, 1: 1}
    door = FrontDoor(expected=schema(MODEL), owners=2, sample_count=sizes.__getitem__)
    for count, admitted in ((64, True), (1, False), (65, False)):
        reply = Message(content(metrics={"owner": 0, "num-examples": count}), reply_to=ask())
        assert (judge(reply, door=door).aside == {}) == admitted


def test_a_reply_to_no_message_of_this_round_is_set_aside():
    stale = Message(content(), reply_to=ask(name="last-round"))
    assert judge(stale).aside == {10: "answers no message of this round"}


@pytest.mark.parametrize(
    ("first", "admitted"), [(content(), 1), (Error(4, "refused"), 1), (content(metrics=metrics_of(owner=-1)), 0)]
)
def test_a_second_reply_is_set_aside_whatever_the_first_was(first, admitted):
    replies = [Message(what, reply_to=ask()) for what in (first, content())]
    result = judge(*replies)
    assert result.replies == replies[:admitted]
    assert set(result.aside) == {10}


def test_the_answered_questions_stay_answered_over_several_calls():
    sent, roster, reply = Sent.of([ask()], ROUND), Roster(), Message(content(), reply_to=ask())
    assert len(admit([reply], sent, roster, DOOR).replies) == 1
    assert admit([reply], sent, roster, DOOR).aside == {10: "answers a message a second time"}


def test_a_node_that_answers_for_another_neither_counts_nor_keeps_the_other_out():
    stolen = ask(11)
    stolen.metadata.__dict__["_dst_node_id"] = 10
    honest = Message(content(metrics=metrics_of(1)), reply_to=ask(11))
    result = judge(Message(content(metrics=metrics_of(1)), reply_to=stolen), honest)
    assert result.replies == [honest]
    assert result.aside == {10: "answers a message that another node was sent"}


def test_a_message_that_was_never_sent_opens_no_question():
    unsent = GRID.create_message(RecordDict(), "train", 10, "1")
    assert judge(Message(content(), reply_to=unsent), questions=[unsent]).aside == {
        10: "answers no message of this round"
    }


def test_errors_pass_through_as_they_are():
    errors = [Message(Error(4, "exhausted"), reply_to=ask(node)) for node in NODES]
    assert judge(*errors).replies == errors
    assert judge(Message(Error(4, "exhausted"), reply_to=ask(name="other"))).replies == []


def test_what_is_neither_or_both_is_set_aside():
    neither, both = (Message(content(), reply_to=ask(node)) for node in (10, 11))
    neither.__dict__["_content"] = None
    both.__dict__["_error"] = Error(4, "refused")
    assert judge(neither, both).aside == dict.fromkeys((10, 11), "holds neither records nor an error")


def test_nothing_of_a_hostile_error_moves_a_cursor_or_fills_a_log():
    reason = refusal_reason(Message(Error(4, "\x1b[2J\u202e\n" * 10**6), reply_to=ask()))
    assert reason.isprintable()
    assert len(reason) <= 160


def test_an_open_roster_binds_a_node_at_its_first_admitted_reply_only():
    roster = Roster()
    bad = Message(content(metrics=metrics_of(2, unclipped=7)), reply_to=ask(10))
    assert judge(bad, roster=roster).aside
    assert roster.state() == {}
    assert judge(Message(content(), reply_to=ask(10)), roster=roster).aside == {}
    assert roster.state() == {10: 0}
    changed = Message(content(metrics=metrics_of(1)), reply_to=ask(10))
    stolen = Message(content(metrics=metrics_of(0)), reply_to=ask(11))
    assert judge(changed, stolen, roster=roster).aside == {
        10: "speaks for another owner than before",
        11: "speaks for an owner that another node speaks for",
    }
    assert roster.state() == {10: 0}


def test_a_closed_roster_lets_nobody_else_in_and_survives_a_checkpoint():
    roster = Roster({10: 0}, closed=True)
    assert judge(Message(content(metrics=metrics_of(1)), reply_to=ask(11)), roster=roster).aside == {
        11: "is not on the roster"
    }
    again = Roster(closed=True)
    again.restore({str(node): index for node, index in roster.state().items()})
    assert again == roster
    with pytest.raises(ValueError, match="one node for each owner"):
        again.restore({10: 0, 11: 0})


def test_without_a_roster_any_owners_index_will_do():
    replies = [Message(content(metrics=metrics_of(1)), reply_to=ask(node)) for node in (10, 11)]
    assert admit(replies, Sent.of([ask(10), ask(11)], ROUND), None, DOOR).replies == replies
    for index in (-1, OWNERS):
        nobody = Message(content(metrics=metrics_of(index)), reply_to=ask())
        assert admit([nobody], Sent.of([ask()], ROUND), None, DOOR).aside == {10: "metric 'owner' is no owner's index"}


def test_evaluations_have_a_door_of_their_own():
    door = FrontDoor.of_evaluation(owners=OWNERS)
    counts = reply_metrics(0, {"counts": np.float32([30.5, -2.0])})
    assert verdict_of_metrics(counts, door) is None
    for changes in ({"right": float("nan")}, {"right": 1e300}, {"wrong": 1}, {"more": 1.0}, {"owner": 1}):
        assert verdict_of_metrics(MetricRecord({**counts, **changes}), door) is not None
    arrays = RecordDict({"metrics": counts, "arrays": to_record(MODEL)})
    assert judge(Message(arrays, reply_to=ask()), door=door).aside != {}


def verdict_of_metrics(metrics, door):
    return judge(Message(RecordDict({"metrics": metrics}), reply_to=ask()), door=door).aside.get(10)


def test_what_a_codec_cannot_decode_is_set_aside():
    wires = {"indices": np.int32([0, 2]), "values": np.float32([1.0, 2.0])}

    def decode(arrays):
        if arrays["indices"].max() >= 3:
            raise ValueError("expected an index below 3")
        update = np.zeros(3, np.float32)
        update[arrays["indices"]] = arrays["values"] * np.float32(1e10)
        return {"w": update}

    door = FrontDoor.of_training(schema(wires), owners=OWNERS, unit="client", loss=True, decode=decode)
    cases = {(0, 2, 1.0): None, (0, 3, 1.0): "arrays that the codec cannot decode"}
    cases[(0, 2, 1e7)] = "array 'w' holds values above 1e+15"
    for (first, second, value), reason in cases.items():
        arrays = {"indices": np.int32([first, second]), "values": np.float32([value, 0.0])}
        assert judge(Message(content(arrays), reply_to=ask()), door=door).aside.get(10) == reason


@pytest.mark.parametrize(
    "changes",
    [
        {"owners": 0},
        {"largest": float("nan")},
        {"metrics": {"owner": is_number}},
        {"expected": {"w": (">f4", (1,))}},
        {"expected": {"w": ("object", (1,))}},
    ],
)
def test_a_door_that_makes_no_sense_is_refused(changes):
    with pytest.raises(ValueError, match="expected"):
        FrontDoor(**{"expected": {}, "owners": 1, **changes})


ARRAYS = npst.arrays(
    st.sampled_from(["<f4", ">f4", "<f8", "<f2", "<i4", "<c8", "|b1", "|u1"]),
    npst.array_shapes(min_dims=0, max_dims=3, max_side=3),
)
WIRES = st.one_of(
    st.builds(lambda array: wire(npy(array)), ARRAYS),
    st.builds(Array, ARRAYS),
    st.builds(wire, st.binary(max_size=200)),
    st.builds(
        lambda at, byte: wire(GOOD[:at] + bytes([byte]) + GOOD[at + 1 :]), st.integers(0, 151), st.integers(0, 255)
    ),
)
RECORDS = st.one_of(
    st.builds(ArrayRecord, st.dictionaries(st.sampled_from([*MODEL, "x", "\x1b"]), WIRES, max_size=5)),
    st.builds(MetricRecord, st.dictionaries(st.sampled_from([*metrics_of(), "x"]), SECRETS, max_size=7)),
    st.just(ConfigRecord({"run": "x"})),
    st.just(MetricRecord(metrics_of())),
    st.builds(lambda name, array: replaced(name, array)["arrays"], st.sampled_from(list(MODEL)), WIRES),
)
CONTENTS = st.dictionaries(st.sampled_from(["arrays", "metrics", "more"]), RECORDS, max_size=3).map(RecordDict)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.lists(st.tuples(CONTENTS, st.sampled_from([9, 10, 11]), st.sampled_from(["m", "n"])), max_size=4))
def test_whatever_replies_hold_the_door_raises_nothing_and_admits_only_what_the_server_can_use(replies):
    """The oracle decodes with NumPy and looks at the result."""
    result = judge(*(Message(what, reply_to=ask(node, name)) for what, node, name in replies))
    for reply in result.replies:
        arrays = from_record(reply.content.array_records["arrays"])
        assert [(n, a.dtype, a.shape) for n, a in arrays.items()] == [(n, a.dtype, a.shape) for n, a in MODEL.items()]
        assert all(np.isfinite(array).all() for array in arrays.values())
        assert reply.content.metric_records["metrics"]["num-examples"] == 1
    assert all(reason.isprintable() and len(reason) < 200 for reason in result.aside.values())
    assert len({reply.metadata.src_node_id for reply in result.replies}) == len(result.replies)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(WIRES)
def test_no_array_is_admitted_that_numpy_reads_as_something_else(array):
    try:
        read = np.load(io.BytesIO(array.data), allow_pickle=False)
        usable = isinstance(read, np.ndarray) and (read.dtype, read.shape) == (np.float32, (2, 3))
        usable = usable and bool(np.isfinite(read).all()) and bool((np.abs(read) <= 1e15).all())
    except Exception:  # noqa: BLE001  # NumPy raises six kinds of exception here, MemoryError among them
        usable = False
    admitted = verdict(replaced("conv", array)) is None
    assert usable or not admitted


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    npst.arrays(
        "<f4",
        npst.array_shapes(min_dims=0, max_dims=4, max_side=3, min_side=0),
        elements=st.floats(-1e6, 1e6, width=32),
    )
)
def test_every_honest_array_is_admitted_whatever_its_shape(array):
    door = FrontDoor(expected=schema({"w": array}), owners=1)
    reply = content({"w": array}, {"owner": 0, "num-examples": 1})
    assert judge(Message(reply, reply_to=ask()), door=door).aside == {}


def test_headers_of_older_numpy_versions_are_read_too():
    text = b"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }"
    for width in (16, 64):
        spaces = -(10 + len(text) + 1) % width
        header = text + b" " * spaces + b"\n"
        data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + MODEL["conv"].tobytes()
        assert verdict(replaced("conv", wire(data))) is None
