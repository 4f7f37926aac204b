import base64
import copy
import doctest
import hashlib
import itertools
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tacit.devices import protocol
from tacit.edge import charts, device_charts, report, svg, timings, wording
from tacit.edge.report import write_report

ADVERSARY = "honest-but-curious server and everyone who receives models"
CORPUS = [
    "<script>alert(1)</script>",
    "</title></style></svg><script>alert(1)</script>",
    "\"><img src=x onerror=alert(1)>' onmouseover='alert(1)",
    "<svg/onload=alert(1)><foreignObject><iframe srcdoc='<script>alert(1)</script>'>",
    "]]></text><script xlink:href='//evil.test/x.js'/><!--",
    "javascript:alert(1)//`;}</style><style>@import 'https://evil.test/x.css';*{background:url(//evil.test)}",
    "{{ 7 * 7 }}{% raw %}${7*7}#{7*7}",
    r"$\frac{1}{$ \input{/etc/passwd} $x^2$ _hidden %s {0}",
    "\u202egnp.exe\u2066 \x00\x08\x1b[31m \ud800 \ufffe & &lt; &#x3c;script&#x3e;",
]


def _latency(
    p50_us: float, p90_us: float, *, memory_bytes: int, runtime: str, flags: tuple[str, ...] = ()
) -> dict[str, Any]:
    interval = {"p50_us": [p50_us * 0.985, p50_us * 1.02], "p90_us": [p90_us * 0.97, p90_us * 1.04]}
    timing = {"p50_us": p50_us, "p90_us": p90_us, "n": 4000, "ci": interval, "peak_memory_bytes": memory_bytes}
    return {"local": {**timing, "flags": list(flags), "runtime": runtime}}


def _passes(label: str, *, small: bool) -> list[dict[str, Any]]:
    names = ["prune", "distill"] * small
    names += {"float32": [], "dynamic-range int8": ["dynamic_int8"]}.get(label, ["static_int8"])
    return [{"name": name, "parameters": {}, "data_use": "none"} for name in names]


def _variants() -> list[dict[str, Any]]:
    ort, litert = "onnxruntime 1.32.0", "ai-edge-litert 2.3.0"
    small, full = "static int8 (float I/O)", "full-integer int8"
    rows = [
        ("onnx-float32", "float32", 42440, 0.94, (1.0, 1e-6, 1.0), (20.1, 22.0, 61_234_567, ort)),
        ("onnx-dynamic", "dynamic-range int8", 14812, 0.9389, (0.997, 0.081, 0.99987), (31.4, 36.2, 60_112_000, ort)),
        ("onnx-small", small, 9120, 0.931, (0.983, 0.37, 0.99791), (14.2, 15.9, 58_900_000, ort)),
        ("tflite-float32", "float32", 43012, 0.94, (1.0, 2e-6, 1.0), (11.9, 12.6, 34_234_567, litert)),
        (
            "tflite-dynamic",
            "dynamic-range int8",
            15260,
            0.9361,
            (0.994, 0.092, 0.9998),
            (12.8, 14.0, 33_000_000, litert),
        ),
        ("tflite-small", full, 8744, 0.9278, (0.978, 0.41, 0.9971), (6.3, 7.1, 31_500_000, litert)),
    ]
    return [
        {
            "name": name,
            "format": name.partition("-")[0],
            "label": label,
            "bytes": size_bytes,
            "accuracy": accuracy,
            "pruned": 0.5 if "small" in name else 0.0,
            "parameters": 10026,
            "passes": _passes(label, small="small" in name),
            "parity": dict(zip(("top1_agreement", "max_abs", "cosine"), parity, strict=True)),
            "data_use": "public" if "small" in name else "none",
            "latency": _latency(p50, p90, memory_bytes=memory, runtime=runtime, flags=("noisy",) * (p50 > 30)),
        }
        for name, label, size_bytes, accuracy, parity, (p50, p90, memory, runtime) in rows
    ]


def _demo() -> dict[str, Any]:
    ends, twin_ends = math.exp(-100 / 16), math.exp(-100 / 9)
    return {
        "schema_version": 1,
        "task": "digits",
        "title": "Handwritten digits",
        "created": "2026-11-22T14:00:00Z",
        "accuracy": 0.94,
        "accuracy_without_privacy": 0.967,
        "test_examples": 360,
        "privacy": {
            "unit": "record",
            "relation": "add/remove",
            "adversary": ADVERSARY,
            "epsilon": 7.98,
            "delta": 1e-5,
            "accountant": "PLD (dp-accounting 0.6.0)",
            "epsilon_rdp": 8.9,
            "epsilon_prv": 7.99,
            "epsilon_by_owner": {f"owner-{i:02d}": 7.98 - 0.35 * (i % 4 == 3) - 0.9 * (i == 6) for i in range(10)},
            "noise_multiplier": 3.11,
            "max_grad_norm": 1.0,
            "sample_rate": 0.5,
            "rounds": 100,
            "steps_per_round": 1,
            "participations_planned": 100,
            "scope": "simulated",
            "engine": "in-process sequential",
            "server_adversary": "by design only",
            "noise": "not hardened",
            "data_status": "public-benchmark",
            "ledger_head": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
            "reopened": 0,
            "channels": ["model update (noised)"],
            "statement": "Simulated: one process held every owner's data. Noise not hardened.",
        },
        "training": {
            "owners": 10,
            "parameters": 10026,
            "model": "cnn",
            "rounds": [
                {
                    "round": r,
                    "accuracy": None if r % 2 else 0.94 - 0.84 * (math.exp(-r / 16) - ends),
                    "epsilon": 7.98 * math.sqrt(r / 100),
                }
                for r in range(1, 101)
            ],
            "twin": [{"round": r, "accuracy": 0.967 - 0.85 * (math.exp(-r / 9) - twin_ends)} for r in range(2, 101, 2)],
        },
        "variants": _variants(),
        "failed": [{"stage": "compress", "name": "tflite-static", "reason": "the converter refused an operator"}],
        "devices": {"local": {"cpu": "AMD EPYC 9R14", "cores": 2, "os": "Linux 6.18", "governor": None}},
        "versions": {"tacit": "0.1.0", "python": "3.11.7", "torch": "2.13.0"},
        "wall_s": {"train": 20.1, "compress": 12.0, "measure": 9.0, "report": 1.0},
        "recipe": '[task]\nname = "digits"\n\n[privacy]\nepsilon = 8.0\n',
    }


def _client_level() -> dict[str, Any]:
    """Two thousand clients of one ε, which the server's ledger keeps; ε was computed after some rounds only."""
    summary = _demo()
    summary["privacy"] |= {
        "unit": "client",
        "adversary": "everyone who receives models and reports, not the server or the network",
        "server_adversary": "none",
        "epsilon_by_owner": {},
    }
    summary["training"]["owners"] = 2000
    for entry in summary["training"]["rounds"]:
        entry["epsilon"] = entry["epsilon"] if entry["round"] in (1, 40, 100) else None
    return summary


def _local_level() -> dict[str, Any]:
    summary = _demo()
    summary["privacy"] |= {"unit": "local", "relation": "replace-one", "sample_rate": 1.0}
    return summary


def _one_owner() -> dict[str, Any]:
    summary = _demo()
    summary["privacy"]["epsilon_by_owner"] = {"owner-00": 7.98}
    summary["training"]["owners"] = 1
    return summary


def _two_float32() -> dict[str, Any]:
    """A pruned file in float32 follows the plain one of its format, and one stands before any plain one."""
    summary = _demo()
    onnx, pruned = summary["variants"][0], [{"name": "prune", "parameters": {"ratio": 0.5}, "data_use": "none"}]
    summary["variants"] = [
        {**onnx, "name": "early", "bytes": 30_000, "passes": pruned, "pruned": 0.3},
        {**onnx, "name": "plain", "bytes": 40_000},
        {**onnx, "name": "again", "bytes": 50_000},
        {**onnx, "name": "late", "bytes": 10_000, "passes": pruned, "pruned": 0.5},
        {**onnx, "name": "alone", "format": "tflite", "bytes": 10_000, "passes": pruned, "pruned": 0.5},
    ]
    return summary


def _audited(**changed: Any) -> dict[str, Any]:
    """A summary with an audit: the float model and one artifact were asked about their members."""
    common = {"confidence": 0.95, "verdict": "pass", "reason": "", "seconds": 1.0}
    bound = {"statistic": 0.309, "interval": [0.309, None], "delta": 1e-5}
    details = {"members": 1347, "others": 360, "false_rate": 10 / 360, "hit_rate": 0.04, "hit_interval": [0.03, 0.06]}
    details |= {"advantage": 0.05, "chance": 0.073, "shadows": 8, "allowed_hit_rate": 1.0}
    curve = [[0.0, 0.001], [0.0028, 0.008], [0.05, 0.06], [1.0, 1.0]]
    asked = {
        "name": "membership",
        "method": "offline LiRA with 8 shadow models (Carlini et al. 2022)",
        "n": 1707,
        "statistic": 0.512,
        "interval": [0.478, 0.546],
        "claim": None,
        "delta": None,
        "details": {**details, "curve": curve},
    }
    summary = _demo()
    summary["audit"] = {
        "schema_version": 1,
        "created": "2026-11-23T09:00:00+00:00",
        "verdict": "pass",
        "statement": "An audit can show a violation; it never proves privacy.",
        "tests": [
            {
                "name": "mechanism",
                "method": "Clopper-Pearson",
                "n": 4000,
                "claim": 1.224,
                **common,
                **bound,
                "details": {},
            },
            {
                "name": "noise",
                "method": "shape",
                "n": 200_000,
                "statistic": 0.27,
                "interval": None,
                "claim": 1e-10,
                **common,
                "details": {"standard_deviation_over_claimed": 0.9987},
            },
            {
                "name": "canaries",
                "method": "guesses",
                "n": 2000,
                "claim": 7.98,
                **common,
                **bound,
                "statistic": 1.749,
                "details": {"rounds": 100},
            },
            {**common, **asked, "verdict": "informs", "artifact": "float model", "sha256": "a"},
            {**common, **asked, "verdict": "informs", "artifact": "onnx-small", "sha256": "b"},
        ],
        "skipped": [],
        **changed,
    }
    return summary


class _Page(HTMLParser):
    """What a browser would see: elements with their attributes, and the text outside of the style element."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self._open = ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open = tag
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self._open, []).append(data)
        if self._open != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def _write(summary: dict[str, Any], folder: Path) -> str:
    path = folder / "report.html"
    write_report(summary, path)
    return path.read_text(encoding="utf-8")


def _page(summary: dict[str, Any], folder: Path) -> _Page:
    return _Page(_write(summary, folder))


def _poisoned(value: Any, payload: str, *, numbers: bool) -> Any:
    """Return the summary with every string in it, and at will every number, replaced by the payload."""
    if isinstance(value, dict):
        free = {
            "local",
            "cpu",
            "cores",
            "os",
            "governor",
            "tacit",
            "python",
            "torch",
            "train",
            "compress",
            "measure",
            "report",
        }
        return {
            (f"{key}{payload}" if key in free or key.startswith("owner-") else key): item
            if key in ("schema_version", "noise", "unit", "format")
            else _poisoned(item, payload, numbers=numbers)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_poisoned(item, payload, numbers=numbers) for item in value]
    return payload if numbers or isinstance(value, str) else value


@pytest.fixture(scope="module")
def demo_source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return _write(_demo(), tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def demo(demo_source: str) -> _Page:
    return _Page(demo_source)


def test_the_headline_is_for_a_layperson(demo: _Page) -> None:
    assert "This model reads handwritten digits with 94 % accuracy." in demo.text
    assert "Ten owners, simulated on one machine, trained it together" in demo.text
    assert "ε = 7.98 at δ = 1e-5." in demo.text


def test_owners_that_really_kept_their_records_are_said_to_have(tmp_path: Path) -> None:
    summary = _demo()
    summary["privacy"]["scope"] = "deployment"
    text = _page(summary, tmp_path).text
    assert "Ten owners trained it together without showing anyone a record; ε = 7.98 at δ = 1e-5." in text
    assert "on one machine" not in text


def test_the_same_summary_gives_the_same_bytes_whatever_the_user_set_in_matplotlib(
    demo_source: str, tmp_path: Path
) -> None:
    with mpl.rc_context({"axes.labelsize": 31, "font.weight": "bold", "svg.fonttype": "path"}):
        assert _write(_demo(), tmp_path) == demo_source
        assert mpl.rcParams["axes.labelsize"] == 31


def test_the_page_is_small_and_has_all_five_charts(demo_source: str, demo: _Page) -> None:
    assert len(demo_source.encode()) < 200_000
    charts = [attributes for tag, attributes in demo.elements if tag == "svg" and attributes.get("role") == "img"]
    assert [c["aria-labelledby"] for c in charts] == [
        f"{name}-title" for name in ("accuracy", "budget", "front-0", "latency-0", "owners")
    ]
    identifiers = [attributes["id"] for _, attributes in demo.elements if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    assert {c["aria-labelledby"] for c in charts} <= set(identifiers)


def test_every_reference_inside_a_chart_resolves(demo: _Page) -> None:
    identifiers = {attributes.get("id") for _, attributes in demo.elements}
    references = [a["href"] for _, a in demo.elements if a.get("href")]
    references += [a["clip-path"][4:-1] for _, a in demo.elements if a.get("clip-path")]
    assert references
    assert {reference[1:] for reference in references if reference} <= identifiers


def test_the_policy_forbids_scripts_and_network_and_allows_only_this_style(demo_source: str, demo: _Page) -> None:
    policy = next(a["content"] for tag, a in demo.elements if tag == "meta" and a.get("http-equiv"))
    style = re.search(r"<style>(.*?)</style>", demo_source, re.DOTALL)
    assert policy is not None
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert policy.split("; ")[:3] == ["default-src 'none'", "script-src 'none'", f"style-src 'sha256-{digest}'"]
    assert not [tag for tag, a in demo.elements if "style" in a or tag in ("script", "link", "img", "iframe", "object")]
    assert "http://" not in demo_source
    assert "https://" not in demo_source
    assert "url(" not in style[1]


def test_table_headers_have_a_scope(demo: _Page) -> None:
    headers = [attributes for tag, attributes in demo.elements if tag == "th"]
    assert len(headers) > 10
    assert all(attributes.get("scope") in ("row", "col") for attributes in headers)


def test_the_table_names_each_variant_with_its_honest_label_and_figures(demo: _Page) -> None:
    for fact in (
        "onnx · static int8 (float I/O)",
        "21.5 % of the unpruned float32",
        "\N{MINUS SIGN}0.9 pt to the float model",
        "50 % pruned",
    ):
        assert fact in demo.text
    for fact in (
        "99.7 % same answer",
        "max. difference 1e-6",
        "cosine 0.99987",
        "6.21 µs \N{EN DASH} 6.43 µs",
        "61.2 MB",
        "noisy",
    ):
        assert fact in demo.text
    assert "the converter refused an operator" in demo.text


def test_the_privacy_card_shows_every_field(demo: _Page) -> None:
    privacy = _demo()["privacy"]
    for key in (
        "adversary",
        "accountant",
        "scope",
        "engine",
        "server_adversary",
        "noise",
        "data_status",
        "ledger_head",
        "statement",
    ):
        assert privacy[key] in demo.text
    for fact in (
        "8.90 at δ = 1e-5 (an upper bound, looser)",
        "7.99 at δ = 1e-5 (its error margin of 0.01 is added on top)",
        "noise multiplier 3.11",
        "clipping norm 1",
        "model update (noised)",
    ):
        assert fact in demo.text


def test_no_epsilon_stands_without_delta_and_the_rest_of_the_guarantee(demo: _Page) -> None:
    stated = re.findall(r"ε = \d", demo.text)
    assert len(stated) >= 3
    assert len(re.findall(r"ε = [\d.]+ at δ = 1e-5", demo.text)) == len(stated)
    card = demo.text[demo.text.index("Privacy, the highest owner") :]
    said = f"ε = 7.98 at δ = 1e-5 · unit: record · neighbours: add/remove · adversary: {ADVERSARY} · accountant: PLD"
    assert said in card[:300]


def test_owners_are_a_maximum_and_a_distribution_never_a_mean(demo: _Page) -> None:
    assert "Highest 7.98, median 7.98, lowest 7.08, 10 owners" in demo.text
    assert not re.search(r"\b(mean|average|total|sum)\b", demo.text)
    mean = sum(_demo()["privacy"]["epsilon_by_owner"].values()) / 10
    assert f"{mean:.2f}" not in demo.text


def test_five_thousand_owners_and_rounds_stay_under_a_megabyte(tmp_path: Path) -> None:
    summary = _demo()
    summary["privacy"]["epsilon_by_owner"] = {f"owner-{i}": 1 + i / 1000 for i in range(5000)}
    summary["training"]["rounds"] = [{"round": r, "accuracy": r % 7 / 7, "epsilon": r / 900} for r in range(1, 5001)]
    source = _write(summary, tmp_path)
    assert len(source.encode()) < 1_000_000
    text = _Page(source).text
    assert "owner-4999: 6.00" in text
    assert "and 4,800 lower ones" in text
    assert "5,000 owners; ε at" in text


def _row(page: _Page, name: str) -> str:
    """Return what the table says of a variant."""
    table = page.text[page.text.index("Data use Latency p50") :]
    return table[table.index(f"{name} ") :].partition(" pt to the float model")[0]


def test_agreement_is_said_to_be_with_the_model_that_the_file_was_made_from(demo: _Page) -> None:
    label = "Agreement with its own PyTorch model"
    assert demo.texts["th"].count(label) == 1
    assert [a["data-label"] for tag, a in demo.elements if tag == "td"].count(label) == 6
    assert "float model" not in demo.text.replace("pt to the float model", "")
    assert "One training, 6 forms: some are pruned, distilled or quantised." in demo.text


@pytest.mark.parametrize(
    ("picked", "said"),
    [
        ([0], "One training, one form, as it was trained."),
        ([0, 3], "One training, 2 forms."),
        ([0, 1], "One training, 2 forms: some are quantised."),
        ([2], "One training, one form, pruned, distilled and quantised."),
    ],
)
def test_the_forms_are_told_by_what_was_done_to_them(picked: list[int], said: str, tmp_path: Path) -> None:
    variants = _variants()
    assert said in _page(_demo() | {"variants": [variants[i] for i in picked]}, tmp_path).text


def test_sizes_are_relative_to_the_first_float32_file_of_the_format_without_passes(tmp_path: Path) -> None:
    page = _page(_two_float32(), tmp_path)
    for name, share in (("early", "75"), ("plain", "100"), ("again", "125"), ("late", "25")):
        assert f"{share} % of the unpruned float32" in _row(page, name)
    assert "no float32 baseline" in _row(page, "alone")


@pytest.mark.parametrize(
    ("twin", "said"),
    [
        (0.967, "one run each, 2.7 pt apart, higher without noise"),
        (0.898, "one run each, 4.2 pt apart, higher with noise"),
        (0.9401, "one run each, less than 0.1 pt apart"),
    ],
)
def test_the_twin_is_one_run_and_which_of_the_two_is_higher_is_said(twin: float, said: str, tmp_path: Path) -> None:
    text = _page(_demo() | {"accuracy_without_privacy": twin}, tmp_path).text
    assert f"Same recipe, clipping kept, no noise; {said} Privacy" in text
    assert "makes a difference" not in text


def test_flags_stand_with_the_latency_and_are_explained_below_the_table(tmp_path: Path) -> None:
    summary, every = _demo(), ("noisy", "drift", "averaged", "few-samples", "steal")
    summary["variants"][0]["latency"]["local"]["flags"] = list(every)
    source = _write(summary, tmp_path)
    cells = re.findall(r'<td data-label="(.*?)">(.*?)</td>', source, re.DOTALL)
    assert {label for label, cell in cells if "badge" in cell} == {"Latency p50 (interval)"}
    legend = re.search(r'</table>\s*</div>\s*<p class="small legend">(.*?)</p>', source, re.DOTALL)
    assert legend is not None
    assert re.findall(r'class="badge">(.*?)</span> \w', legend[1]) == list(every)


def test_the_report_explains_exactly_the_flags_that_a_measurement_can_carry() -> None:
    described = protocol.Latency.__doc__ or ""
    in_a_browser, elsewhere = {"incomplete", "slowed"}, {"departs"}
    told = set(re.findall(r"``([\w-]+)`` \(", described)) | in_a_browser | elsewhere
    assert told == set(report._FLAGS)
    browser = (Path(protocol.__file__).with_name("browser.py")).read_text(encoding="utf-8")
    assert all(f'"{flag}"' in browser for flag in in_a_browser)
    assert '"departs"' in (Path(report.__file__).with_name("measurement.py")).read_text(encoding="utf-8")


def test_flags_that_nothing_carries_are_not_explained(demo: _Page, tmp_path: Path) -> None:
    assert "noisy the spread (relative standard deviation) is above 10 %." in demo.text
    assert "clock ticks" not in demo.text
    summary = _demo()
    for variant in summary["variants"]:
        variant["latency"]["local"]["flags"] = []
    assert "legend" not in str(_page(summary, tmp_path).elements)


def test_an_epsilon_by_rdp_is_not_called_looser_than_itself(tmp_path: Path) -> None:
    summary = _demo()
    summary["privacy"] |= {"epsilon": 58.0, "epsilon_rdp": 58.0, "epsilon_prv": None}
    text = _page(summary, tmp_path).text
    assert "ε by RDP 58.00 at δ = 1e-5 (an upper bound) " in text
    assert "error margin" not in text


def test_a_single_owner_trains_alone(tmp_path: Path) -> None:
    text = _page(_one_owner(), tmp_path).text
    assert "One owner, simulated on one machine, trained it by a recipe that shows nobody a record; ε = 7.98" in text
    assert "the owner improves the model on its own data" in text
    assert not re.search("together|owners|highest|median 7", text.partition("How it was made")[0], re.IGNORECASE)


def test_at_client_level_the_model_hides_what_a_client_holds_and_no_owners_chart_is_drawn(tmp_path: Path) -> None:
    page = _page(_client_level(), tmp_path)
    said = "by a recipe that hides what any one of them holds from everybody who receives the model; ε = 7.98 at δ"
    assert f"2,000 owners, simulated on one machine, trained it together {said}" in page.text
    assert "shows nobody a record" not in page.text
    assert "how much any one owner can change" in page.text
    assert "Privacy, every owner ε = 7.98" in page.text
    drawn = [a["aria-labelledby"] for tag, a in page.elements if tag == "svg" and a.get("role") == "img"]
    assert drawn == ["accuracy-title", "budget-title", "front-0-title", "latency-0-title"]
    assert "ε per owner" not in page.text
    assert "private 94 %" in " ".join(page.texts["text"]).replace("\u00a0", " ")


def test_at_local_level_not_even_the_server_is_shown_what_an_owner_holds(tmp_path: Path) -> None:
    text = _page(_local_level(), tmp_path).text
    assert "hides what any one of them holds from everybody, the server included; ε = 7.98" in text
    assert "do not add up, because each is about what that owner holds." in text
    assert "how much any one owner can change" in text


def test_a_sparse_epsilon_curve_ends_at_the_runs_epsilon(tmp_path: Path) -> None:
    page = _page(_client_level(), tmp_path)
    assert "ε 7.98" in page.texts["text"]
    assert charts._trace(_client_level()["training"]["rounds"], "epsilon")[-1] == (100.0, 7.98)


def test_a_run_without_artifacts_still_says_what_failed(tmp_path: Path) -> None:
    page = _page(_demo() | {"variants": []}, tmp_path)
    assert "No artifacts were made in this run." in page.text
    assert "Variants" not in [a.get("aria-label") for _, a in page.elements]
    assert "the converter refused an operator" in page.text


def test_a_long_list_in_the_privacy_card_is_cut(tmp_path: Path) -> None:
    summary = _demo()
    summary["privacy"]["ledger_heads"] = [f"{i:064d}" for i in range(2000)]
    text = _page(summary, tmp_path).text
    assert f"{23:064d} and 1,976 more, in summary.json" in text
    assert f"{24:064d}" not in text


@pytest.mark.parametrize("payload", CORPUS)
def test_no_string_of_the_summary_becomes_markup(payload: str, demo: _Page, tmp_path: Path) -> None:
    page = _page(_poisoned(_demo(), payload, numbers=False), tmp_path)
    assert {tag for tag, _ in page.elements} <= {tag for tag, _ in demo.elements}
    known = {name for _, attributes in demo.elements for name in attributes}
    assert {name for _, attributes in page.elements for name in attributes} <= known
    assert page.texts["pre"][0] == report._UNPRINTABLE.sub("\ufffd", payload)
    drawn = charts._short(report._UNPRINTABLE.sub("\ufffd", payload))
    assert any(text.startswith(drawn) for text in page.texts["text"]), "the name is not drawn as it is"


@pytest.mark.parametrize("payload", CORPUS[:3])
def test_strings_in_the_place_of_numbers_are_not_measured(payload: str, demo: _Page, tmp_path: Path) -> None:
    page = _page(_poisoned(_demo(), payload, numbers=True), tmp_path)
    assert {tag for tag, _ in page.elements} <= {tag for tag, _ in demo.elements}
    assert "Its accuracy is not measured." in page.text


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.text(max_size=12))
def test_any_variant_name_can_be_drawn(name: str, tmp_path: Path) -> None:
    summary = {"schema_version": 1, "variants": [{**_variants()[0], "name": name}]}
    page = _page(summary, tmp_path)
    assert [tag for tag, _ in page.elements].count("svg") == 2


def test_a_summary_of_a_version_alone_reads_not_measured(tmp_path: Path) -> None:
    page = _page({"schema_version": 1}, tmp_path)
    assert "Its accuracy is not measured." in page.text
    assert "No privacy guarantee" in page.text
    assert "No artifacts were made in this run." in page.text
    assert not {"svg", "table"} & {tag for tag, _ in page.elements}
    assert "None" not in page.text


def test_null_measurements_read_not_measured(tmp_path: Path) -> None:
    summary = _demo() | {"accuracy": None, "accuracy_without_privacy": None}
    summary["training"]["twin"] = None
    summary["variants"] = [{**v, "accuracy": None, "parity": None, "latency": {}} for v in summary["variants"]]
    summary["privacy"]["epsilon_prv"] = None
    page = _page(summary, tmp_path)
    assert "Its accuracy is not measured." in page.text
    assert page.text.count("No twin was trained in this run") == 2  # on the card and under the chart
    assert "Latency is not measured." in page.text
    assert "not cross-checked" in page.text
    cells = [t for t in page.texts["td"] if "not measured" in t]
    assert len(cells) == 6 * 5  # accuracy, agreement, p50, p90 and memory of six variants
    assert "None" not in page.text


def test_each_device_has_charts_of_its_own_and_a_line_in_the_table(tmp_path: Path) -> None:
    summary = _demo()
    slow = {"p50_us": 900.0, "p90_us": None, "ci": None, "peak_memory_bytes": None, "flags": [], "runtime": "LiteRT"}
    summary["variants"][0]["latency"]["phone"] = slow
    page = _page(summary, tmp_path)
    assert "Size, latency and accuracy on phone" in page.text
    assert "Latency by runtime on local" in page.text
    assert "on phone 900 µs" in page.text
    assert [tag for tag, a in page.elements if tag == "svg" and a.get("role") == "img"] == ["svg"] * 7


def test_numbers_that_are_not_finite_read_not_measured(tmp_path: Path) -> None:
    summary = _demo() | {"accuracy": math.nan}
    summary["variants"][0] |= {"accuracy": math.inf, "bytes": None}
    text = _page(summary, tmp_path).text
    assert "Its accuracy is not measured." in text
    assert not re.search(r"\b(nan|inf)\b", text)


def test_a_run_without_privacy_says_so_and_shows_no_epsilon(tmp_path: Path) -> None:
    summary = _demo() | {"privacy": {"unit": "none"}}
    for entry in summary["training"]["rounds"]:
        entry["epsilon"] = None
    page = _page(summary, tmp_path)
    assert "trained it together with no privacy guarantee." in page.text
    assert "ε" not in page.text
    assert ("div", {"class": "banner"}) in page.elements


@pytest.mark.parametrize("noise", ["VOID", "VOID (--unsafe-seed 7)"])
def test_a_void_run_shows_an_unmissable_banner_and_claims_nothing(noise: str, tmp_path: Path) -> None:
    summary = _demo()
    summary["privacy"]["noise"] = noise
    page = _page(summary, tmp_path)
    assert ("div", {"class": "banner void", "role": "alert"}) in page.elements
    assert page.text.startswith("Guarantee void: Handwritten digits")
    head = page.text[: page.text.index("How it learned")]
    assert "the privacy guarantee is void" in head
    assert "With secret noise it would be ε = 7.98" in head
    assert head.count("ε = 7.98") == 1


def test_a_run_that_is_not_void_has_no_such_banner(demo: _Page) -> None:
    assert not re.search("void", demo.text, re.IGNORECASE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "expected schema_version 1, got schema_version=2"),
        ({"variants": "six"}, "expected variants as a list of objects, got variants='six'"),
        ({"failed": ["x"]}, "expected failed as a list of objects"),
        ({"privacy": []}, "expected privacy as an object"),
    ],
)
def test_a_summary_of_another_shape_is_refused_before_anything_is_written(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        write_report(_demo() | change, tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


def test_the_summary_is_left_as_it_was(tmp_path: Path) -> None:
    summary = _demo()
    before = copy.deepcopy(summary)
    write_report(summary, tmp_path / "report.html")
    assert summary == before
    assert _write(json.loads(json.dumps(summary)), tmp_path) == (tmp_path / "report.html").read_text(encoding="utf-8")


@given(bound=st.floats(min_value=0, max_value=1e6))
def test_a_printed_epsilon_is_never_below_the_true_one(bound: float) -> None:
    assert bound - 1e-8 <= float(wording.epsilon(bound)) <= bound + 0.010001


@given(share=st.floats(min_value=0, max_value=1))
def test_only_a_perfect_share_reads_a_hundred_percent(share: float) -> None:
    assert (wording.percent(share) == "100\u00a0%") == (share == 1)


@pytest.mark.parametrize(
    ("hits", "examples", "low", "high"),  # Newcombe 1998, Statistics in Medicine 17, table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_interval_of_an_accuracy_is_wilsons(hits: int, examples: int, low: float, high: float) -> None:
    assert report._wilson(hits / examples, examples) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("size_bytes", "text"), [(0, "0 B"), (999, "999 B"), (42440, "42.4 kB"), (999_600, "1 MB")])
def test_sizes_are_decimal_with_three_digits(size_bytes: int, text: str) -> None:
    assert wording.size(size_bytes).replace("\u00a0", " ") == text


@given(heights=st.lists(st.floats(min_value=0, max_value=500), max_size=8))
def test_spread_labels_keep_their_distance_and_order(heights: list[float]) -> None:
    moved = sorted(h + shift for h, shift in zip(heights, charts._spread(heights, gap=14), strict=True))
    assert all(b - a >= 14 - 1e-6 for a, b in itertools.pairwise(moved))


def _themes() -> Iterator[dict[str, str]]:
    css = (Path(report.__file__).with_name("templates") / "report.css").read_text(encoding="utf-8")
    blocks = re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    for block in blocks[:2]:
        yield dict(re.findall(r"--([\w-]+): (#\w{6})", block))


def _contrast(one: str, other: str) -> float:
    def luminance(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", list(_themes()), ids=["light", "dark"])
def test_every_text_colour_has_a_contrast_of_four_and_a_half(theme: dict[str, str]) -> None:
    on_both = ["ink", "muted", "series-0", "series-1", "series-2", "series-3"]
    pairs = [(text, ground) for text in on_both for ground in ("page", "card")]
    for text, ground in [*pairs, ("on-alarm", "alarm"), ("warn-ink", "warn")]:
        assert _contrast(theme[text], theme[ground]) >= 4.5, (text, ground)


def test_the_style_recolours_every_colour_that_the_charts_use(demo_source: str) -> None:
    light = next(_themes())
    assert list(svg.SERIES) == [light[f"series-{i}"] for i in range(4)]
    assert (light["ink"], light["line"]) == (svg.INK, svg.GRID)
    drawn = set(re.findall(r'(?:fill|stroke)="(#\w+)"', demo_source))
    assert drawn <= {svg.INK, svg.GRID, *svg.SERIES}
    for color in (svg.GRID, *svg.SERIES):
        assert f'[fill="{color}"]' in demo_source
        assert f'[stroke="{color}"]' in demo_source


def test_importing_the_report_loads_neither_matplotlib_nor_jinja_and_writing_never_loads_pyplot(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib\n"
        "from tacit.edge.report import write_report\n"
        "assert not {'matplotlib', 'jinja2'} & set(sys.modules)\n"
        "twin = [{'round': 1, 'accuracy': 1}]\n"
        "write_report({'schema_version': 1, 'training': {'twin': twin}}, pathlib.Path('report.html'))\n"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules\n"
    )
    source = Path(report.__file__).parent.parent
    root = next(p for p in [source.parent, source / ".src", *sys.path] if (Path(p) / "tacit" / "__init__.py").exists())
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=tmp_path, env={"PYTHONPATH": str(root)})


def test_the_examples_in_the_docstrings_hold() -> None:
    assert doctest.testmod(wording).failed == 0


# Other metrics, and what happened in the rounds.


def _of_metric(metric: str) -> dict[str, Any]:
    """A run without classes: a number for its metric, and no answers that agree."""
    summary = _demo() | {"metric": metric, "task": "rent", "title": "Rent", "accuracy": 0.8314}
    summary |= {"accuracy_without_privacy": 0.853}
    for entry in summary["training"]["rounds"]:
        entry["accuracy"] = entry["accuracy"] and entry["accuracy"] - 0.1086
    for variant in summary["variants"]:
        parity = {"top1_agreement": None, "max_abs": 0.03, "cosine": 0.9991, "spread": 2.0, "input_source": "test"}
        variant |= {"accuracy": 0.8195, "parity": parity}
    return summary


@pytest.mark.parametrize(
    ("metric", "name", "reached"),
    [
        ("R2", "R²", "an R² of 0.831"),
        ("AUROC", "AUROC", "an AUROC of 0.831"),
        ("hit rate", "hit rate", "0.831 by hit rate"),
    ],
)
def test_a_metric_stands_under_its_own_name_as_a_number(metric: str, name: str, reached: str, tmp_path: Path) -> None:
    page = _page(_of_metric(metric), tmp_path)
    text = page.text.replace("\u00a0", " ")
    for said in (
        f"was trained for the task “Rent” and reaches {reached}.",
        f"{name} without noise 0.853",
        "one run each, 0.022 apart, higher without noise",
        f"tflite-small · full-integer int8 · {name} 0.82",
        "\N{MINUS SIGN}0.012 to the float model",
        "cosine 0.9991 max. difference 0.03 1.5 % of the outputs' spread",
        f"{name} over rounds",
        "private 0.831",
        "onnx-small 0.82",
    ):
        assert said in text
    assert not re.search("accuracy|same answer|95 % interval", text, re.IGNORECASE)
    assert [a["data-label"] for tag, a in page.elements if tag == "td"].count(name) == 6


def test_the_axis_of_an_r_squared_is_cut_where_the_first_rounds_lie_far_below_and_this_is_said(tmp_path: Path) -> None:
    summary = _of_metric("R2")
    summary["training"]["rounds"][1]["accuracy"] = -500.0
    assert "The axis begins at \N{MINUS SIGN}1: the first rounds were below." in _page(summary, tmp_path).text
    assert charts.begins_at(summary | {"metric": "AUROC"}) is None
    summary["training"]["rounds"][-1]["accuracy"] = -3.0  # where it ends must be seen
    assert charts.begins_at(summary) is None


def test_without_a_test_split_no_metric_is_shown_and_the_made_up_inputs_are_named(tmp_path: Path) -> None:
    summary = _of_metric("R2") | {"accuracy": None, "accuracy_without_privacy": None, "test_examples": 0}
    summary["training"] |= {"twin": [], "rounds": [{"round": 1, "accuracy": None, "epsilon": 7.98}]}
    for variant in summary["variants"]:
        variant |= {"accuracy": None, "parity": variant["parity"] | {"input_source": "synthetic"}}
    text = _page(summary, tmp_path).text
    assert "Its R² is not measured." in text
    assert "R² not measured No test split was declared" in text
    assert "R² is not measured, because there is no test split" in text
    assert "No public inputs were declared: agreement and latency were taken on synthetic inputs" in text
    assert "Size and latency Left and low is better. ●" in text


def test_inputs_of_a_public_split_are_not_called_synthetic(tmp_path: Path) -> None:
    assert "synthetic" not in _page(_of_metric("R2"), tmp_path).text


def _with_rounds() -> dict[str, Any]:
    summary = _demo()
    for entry in summary["training"]["rounds"]:
        entry |= {"bytes_down": 12_320, "bytes_up": 9_240 + 3_080 * (entry["round"] % 2), "simulated_s": 1.5}
    summary["training"] |= {
        "refusals": {"late": 4, "dropped": 12, "odd": 1},
        "set_aside": {
            "ben": {"rounds": 2, "reason": "array 'w' holds NaN or infinity"},
            "anna": {"rounds": 7, "reason": "a norm of 40"},
        },
    }
    return summary


def test_what_travelled_who_was_away_and_who_was_set_aside_is_told(tmp_path: Path) -> None:
    text = _page(_with_rounds(), tmp_path).text
    assert "Sent to the owners 12.3 kB a round, 1.23 MB in all" in text
    assert "Sent back by them 9.24 kB to 12.3 kB a round, 1.08 MB in all" in text
    assert "Simulated time 150 s in all, 1.5 s the longest round" in text
    assert "Owners that gave no update dropped 12 times late 4 times odd 1 time " in text
    assert "Owner Rounds Last reason anna 7 a norm of 40 ben 2 array 'w' holds NaN or infinity" in text


def test_at_client_level_nothing_of_the_sort_is_there_to_be_told(tmp_path: Path) -> None:
    summary = _client_level()
    summary["training"] |= {"refusals": {}, "set_aside": {}}
    for entry in summary["training"]["rounds"]:
        entry |= {"bytes_down": None, "bytes_up": None, "simulated_s": None}
    text = _page(summary, tmp_path).text
    assert not re.search("travelled|Simulated time|gave no update|Set aside", text)


def test_the_epsilon_of_a_round_is_called_a_bound_where_nobody_was_there_in_all_of_them(tmp_path: Path) -> None:
    summary = _demo()
    assert "At most:" not in _page(summary, tmp_path).text
    summary["privacy"]["participations_charged"] = 93
    assert "At most: no owner took part in every round." in _page(summary, tmp_path).text


def test_many_owners_set_aside_are_cut(tmp_path: Path) -> None:
    summary = _with_rounds()
    summary["training"]["set_aside"] = {f"o{i:04d}": {"rounds": 1, "reason": "late"} for i in range(1000)}
    assert "o0199 1 late and 800 more in summary.json" in _page(summary, tmp_path).text


@pytest.mark.parametrize("payload", CORPUS)
def test_no_string_of_the_rounds_or_the_metric_becomes_markup(payload: str, demo: _Page, tmp_path: Path) -> None:
    summary = _with_rounds() | {"metric": payload}
    summary["training"] |= {
        "refusals": {payload: 3},
        "set_aside": {payload: {"rounds": 1, "reason": payload}, "odd": payload},
    }
    page = _page(summary, tmp_path)
    assert {tag for tag, _ in page.elements} <= {tag for tag, _ in demo.elements}
    known = {name for _, attributes in demo.elements for name in attributes}
    assert {name for _, attributes in page.elements for name in attributes} <= known


@pytest.mark.parametrize("broken", [None, "text", [], {}, 3, math.nan])
def test_rounds_of_another_shape_are_left_out(broken: Any, tmp_path: Path) -> None:
    summary = _with_rounds() | {"variants": [], "metric": broken}
    summary["training"] |= {"refusals": broken, "set_aside": {"anna": broken}, "rounds": [broken, {"bytes_up": broken}]}
    text = _page(summary, tmp_path).text
    assert "Accuracy over rounds" in text or broken == "text"
    assert not re.search(r"\b(None|nan)\b", text)


# Attacks.


def test_an_audit_stands_in_plain_words_with_what_it_was_held_against(tmp_path: Path) -> None:
    text = _page(_audited(), tmp_path).text.replace("\u00a0", " ")
    assert "Audit: no violation found" in text
    assert "made on 23 November 2026, 09:00 UTC. An audit can show a violation; it never proves privacy." in text
    assert "ε ≥ 0.30 in one step (95 % confidence, 4,000 releases on each of two inputs) ε = 1.23 at δ = 1e-5" in text
    assert "0.999 of the claimed size, smallest p-value 0.27 (200,000 draws) 1; alarm below p = 1e-10" in text
    assert "ε ≥ 1.74 in 100 rounds (95 % confidence, 2,000 canaries) ε = 7.98 at δ = 1e-5" in text
    assert "AUC 0.512 (95 % interval 0.478 to 0.546) 0.5 by chance" in text
    assert "1,347 members and 360 others" in text


def test_the_empirical_bound_stands_next_to_the_epsilon(tmp_path: Path) -> None:
    page = _page(_audited(), tmp_path)
    notes = [note.replace("\u00a0", " ") for note in page.texts["span"]]
    assert any("accountant: PLD" in n and "audit: ε ≥ 1.74 in 100 rounds" in n for n in notes)


def test_every_model_that_was_asked_has_a_row_and_a_curve_and_the_guarantee_has_a_line(tmp_path: Path) -> None:
    page = _page(_audited(), tmp_path)
    charts = [a["aria-labelledby"] for tag, a in page.elements if tag == "svg" and a.get("role") == "img"]
    assert charts[-1] == "membership-title"
    drawn = " ".join(page.texts["text"])
    for name in ("chance", "float model", "onnx-small", "the most that ε = 7.98 allows"):
        assert name in drawn
    assert page.texts["small"].count("by chance up to 7.3\u00a0%") == 2
    assert "the guarantee allows 100\u00a0% there" in " ".join(page.words)


def test_a_file_that_was_rebuilt_after_the_audit_is_marked(tmp_path: Path) -> None:
    summary = _audited()
    for variant in summary["variants"]:
        variant["sha256"] = "c"
    assert _page(summary, tmp_path).texts["small"].count("of an earlier file") == 1  # the float model is no variant


def test_at_client_level_no_line_claims_to_bound_the_membership_of_a_record(tmp_path: Path) -> None:
    summary = _audited()
    summary["privacy"]["unit"] = "client"
    page = _page(summary, tmp_path)
    assert "the most that ε" not in " ".join(page.texts["text"])
    assert "keeps every curve below" not in page.text


def test_a_failed_audit_is_the_first_thing_that_a_reader_sees(tmp_path: Path) -> None:
    summary = _audited(verdict="fail")
    summary["audit"]["tests"][0] |= {"verdict": "fail", "reason": "a record alone: ε ≥ 3.1 at δ = 0.1"}
    source = _write(summary, tmp_path)
    assert source.index("Audit failed") < source.index("<main>")
    assert "mechanism: a record alone: ε ≥ 3.1 at δ = 0.1. Do not release this model." in _Page(source).text
    assert 'class="badge alarm">violation<' in source


def test_tests_that_were_left_out_are_named(tmp_path: Path) -> None:
    summary = _audited(tests=[], skipped=[{"name": "membership", "reason": "left out"}], verdict="informs")
    text = _page(summary, tmp_path).text
    assert "not run: left out" in text
    assert "Members recognised" not in text


def test_a_run_that_was_not_audited_has_no_section(demo: _Page) -> None:
    assert "audit" not in [a.get("id") for _, a in demo.elements]
    assert "audit:" not in demo.text


@pytest.fixture(scope="module")
def clean_audit(tmp_path_factory: pytest.TempPathFactory) -> _Page:
    return _page(_audited(verdict="fail"), tmp_path_factory.mktemp("audit"))


@pytest.mark.parametrize("payload", CORPUS)
def test_no_string_of_an_audit_becomes_markup(payload: str, clean_audit: _Page, tmp_path: Path) -> None:
    summary = _audited(verdict="fail", statement=payload, created=payload)
    summary |= {"training": {}, "variants": []}  # their charts take time and are tried above
    for test in summary["audit"]["tests"]:
        test |= {"artifact": payload, "reason": payload, "method": payload, "verdict": payload, "n": payload}
    page = _page(summary, tmp_path)
    assert {tag for tag, _ in page.elements} <= {tag for tag, _ in clean_audit.elements}
    known = {name for _, attributes in clean_audit.elements for name in attributes}
    assert {name for _, attributes in page.elements for name in attributes} <= known
    assert "membership-title" in [a.get("aria-labelledby") for _, a in page.elements]


@pytest.mark.parametrize("broken", [None, "text", [], {}, 3, math.nan])
def test_an_audit_of_another_shape_reads_not_measured(broken: Any, tmp_path: Path) -> None:
    summary = _audited() | {"training": {}, "variants": []}
    for test in summary["audit"]["tests"]:
        for key in ("statistic", "interval", "claim", "details", "confidence", "verdict"):
            test[key] = broken
    page = _page(summary, tmp_path)
    assert "not measured" in page.text
    assert "membership-title" not in [a.get("aria-labelledby") for _, a in page.elements]


def test_an_audit_that_is_no_object_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected audit as an object"):
        _write(_demo() | {"audit": ["pass"]}, tmp_path)


# Devices.


def _fit_rows() -> list[dict[str, Any]]:
    """Seventeen profiles, as devices/profiles has, and two artifacts, the larger one first."""
    kinds = {"mcu": 7, "sbc": 6, "phone": 4}
    verdicts = ("fits", "does not fit", "unknown", "does not run")
    return [
        {
            "device": f"{kind}-{number}",
            "title": f"Board {kind} {number}",
            "kind": kind,
            "artifact": artifact,
            "verdict": verdicts[number % 4] if artifact == "tflite-float32" else "fits",
            "why": "memory: 223 to 241 KiB to spare; the firmware around it comes on top",
            "flash_bytes": [1, 2, 3],
            "memory_bytes": None,
            "latency": "7.7 to 120 ms (estimate, nothing was run)" if kind == "mcu" else "not estimated",
            "latency_ms": [7.7, 120.0],
            "latency_basis": "309,248 int8 multiply-accumulates",
            "note": "The radio takes more.",
        }
        for kind, count in kinds.items()
        for number in range(count)
        for artifact in ("tflite-float32", "tflite-small")
    ]


def _entry(p50_us: float, relative: dict[str, Any] | None, *, runtime: str, heat: bool = False) -> dict[str, Any]:
    """All that a device can say of a variant."""
    part = {"low": p50_us * 90, "high": p50_us * 110}
    return {
        **_latency(p50_us, p50_us * 1.1, memory_bytes=34_000_000, runtime=runtime)["local"],
        "min_us": 0.95 * p50_us,
        "p99_us": 2 * p50_us,
        "relative": relative,
        "samples_us": [p50_us * (0.95 + 0.001 * i + (i > 200) * 0.2) for i in range(256)],
        "cold": {
            "n": 5,
            "page_cache": "warm",
            "confidence": 0.9375,
            **{f"{name}_us": {"estimate": p50_us * 100, **part} for name in ("import", "load", "first", "total")},
        },
        "sustained": {
            "start_s": [float(second) for second in range(60)],
            "median_us": [p50_us * (1 + 0.005 * second) for second in range(60)],
            "temperature_c": [40.0 + second / 2 if heat else None for second in range(60)],
            "change": 0.251,
            "throttled": heat,
        },
        "energy": {"source": "RAPL", "j_per_inference": 1.2e-5, "low": 1.1e-5, "high": 1.3e-5} if heat else None,
        "profile": {
            "runs": 50,
            "by_type_us": {f"Op{i}": 100.0 / (i + 1) for i in range(13)},
            "us": 318.0,
            "share_of_p50": 7.25,
        },
        "accuracy": {"n": 500, "top1": {"estimate": 0.93, "low": 0.904, "high": 0.95}} if heat else None,
        "not_measured": {} if heat else {"energy": "the device does not say what energy it takes"},
    }


def _with_devices() -> dict[str, Any]:
    """This computer, a board that was lost midway, a browser, a phone that was not there, and two without a clock."""
    summary = _demo()
    firsts: dict[str, str] = {}
    for number, variant in enumerate(summary["variants"]):
        runtime = "onnxruntime" if variant["format"] == "onnx" else "litert"
        first = firsts.setdefault(runtime, variant["name"])
        ratio = {"to": first, "estimate": 0.5 + number / 4, "low": 0.45 + number / 4, "high": 0.55 + number / 4}
        relative = None if first == variant["name"] else ratio
        variant["latency"] = {"local": _entry(20.0 + number, relative, runtime=runtime)}
        variant["latency"]["ssh:pi@pi5"] = _entry(200.0 + 9 * number, relative, runtime=runtime, heat=True)
        if number < 2:
            variant["latency"]["browser"] = _entry(90.0, relative, runtime="onnxruntime-web")
        answers = {"n": 64, "max_abs": 0.14, "scale": 17.0, "top1_agreement": 0.984, "runtime": "micro"}
        arena = {"arena_bytes": 17408, "operators": ["CONV_2D", "ADD"]}
        variant["answers_on"] = {"qemu:aarch64": answers, "micro": answers | arena}
    del summary["variants"][5]["latency"]["ssh:pi@pi5"]
    gone = {variant["name"]: "nobody listens there" for variant in summary["variants"]}
    summary["measured"] = {
        "local": {"mode": "quick", "complete": True, "failed": {}, "changes": ["onnx-small: 20 % slower than in 4"]},
        "ssh:pi@pi5": {
            "mode": "quick",
            "complete": False,
            "failed": {"tflite-small": "unplugged"},
            "lost": "unplugged",
        },
        "browser": {"mode": "quick", "complete": True, "failed": {}},
        "adb": {"mode": "quick", "complete": False, "failed": gone, "lost": "nobody listens there"},
        "micro": {"mode": "parity", "latency": "not measured: a host's time says nothing", "fit": _fit_rows()},
        "qemu:aarch64": {"mode": "parity", "latency": "not measured: emulated", "failed": {"onnx-small": "refused"}},
    }
    summary["devices"] |= {"ssh:pi@pi5": {"cpu": "Cortex-A76"}, "adb": {}}
    summary["failed"] += [{"stage": "measure adb", "name": name, "reason": why} for name, why in gone.items()]
    return summary


@pytest.fixture(scope="module")
def devices_source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return _write(_with_devices(), tmp_path_factory.mktemp("devices"))


@pytest.fixture(scope="module")
def devices(devices_source: str) -> _Page:
    return _Page(devices_source)


def _said(page: _Page) -> str:
    return page.text.replace("\u00a0", " ")


def test_each_device_has_its_charts_and_every_identifier_is_used_once(devices: _Page, devices_source: str) -> None:
    drawn = {a["aria-labelledby"] for tag, a in devices.elements if tag == "svg" and a.get("role") == "img"}
    for name in ("ratio-0-0", "ratio-0-1", "spread-0", "cold-0", "sustained-0", "ratio-1-0", "heat-1", "cold-2"):
        assert f"{name}-title" in drawn
    assert "heat-0-title" not in drawn, "this computer told no temperature"
    identifiers = [attributes["id"] for _, attributes in devices.elements if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    assert len(devices_source.encode()) < 600_000


def test_a_ratio_stands_with_its_interval_and_the_first_of_its_runtime_is_1(devices: _Page) -> None:
    drawn = " ".join(devices.texts["text"])
    assert "0.75× (0.7 to 0.8)" in drawn
    assert "Latency beside onnx-float32, onnxruntime" in devices.text
    assert "Latency beside tflite-float32, litert" in devices.text


def test_throttling_heat_and_energy_are_told_beside_the_curve(devices: _Page) -> None:
    text = _said(devices)
    assert "onnx-float32 throttled 59 s 200 µs 259 µs +25.1 % 40 to 69.5 °C 12 µJ (11 to 13)" in text
    assert "onnx-float32 59 s 20 µs 25.9 µs +25.1 % not known not measured" in text
    assert "Energy of all 6: not measured: the device does not say what energy it takes." in text


def test_a_cold_start_says_what_was_in_the_page_cache(devices: _Page) -> None:
    text = _said(devices)
    assert "Medians of 5 fresh processes. The file was in the page cache (warm)" in text
    assert "import of the runtime" in text
    assert "onnx-float32 2 ms 1.8 ms to 2.2 ms" in text


def test_the_ten_longest_kinds_of_operator_are_shown_with_their_share(devices: _Page) -> None:
    text = _said(devices)
    share = 100 / sum(1 / (i + 1) for i in range(13))
    assert f"Operators of onnx-float32 on local: Op0 {share:.1f} %" in text
    assert "Op9 3.1 % · 10 µs" in text
    assert "Op10" not in text
    assert "3 more " in text
    assert "Profiling slows this model down to 7.25 times its median" in text


def test_devices_without_a_clock_tell_answers_and_never_a_latency(devices: _Page) -> None:
    text = _said(devices)
    section = text[text.index("Runs elsewhere") : text.index("What fits where")]
    assert "qemu:aarch64 emulated: parity only" in section
    assert "onnx-float32 98.4 % 64 inputs 0.14 0.8 % of the largest output 17.4 kB 2 operators not measured" in section
    assert "Latency: not measured: emulated." in section
    assert "µs" not in section


def test_what_fits_is_told_by_kind_and_the_smallest_artifact_first(devices: _Page) -> None:
    text = _said(devices)
    section = text[text.index("What fits where") : text.index("Privacy card")]
    assert [section.index(title) for title in ("Microcontrollers", "Single-board computers", "Phones")] == sorted(
        section.index(title) for title in ("Microcontrollers", "Single-board computers", "Phones")
    )
    assert "tflite-small · 8.74 kB · fits 7 of 7" in section
    assert "tflite-float32 · 43 kB · fits 2 of 7" in section
    assert section.index("tflite-small · ") < section.index("tflite-float32 · ")
    assert "Board mcu 1 does not fit memory: 223 to 241 KiB to spare" in section
    assert section.count("(estimate, nothing was run)") == 14
    assert section.count("The radio takes more.") == 17
    assert [tag for tag, a in devices.elements].count("details") > 6


def test_what_is_lost_reads_not_measured_with_the_reason_and_never_0(devices: _Page) -> None:
    text = _said(devices)
    assert "adb Not measured nobody listens there." in text
    assert "ssh:pi@pi5 Not measured to the end unplugged. The figures of 5 variants" in text
    assert (
        "onnx-float32, onnx-dynamic, onnx-small, tflite-float32, tflite-dynamic, tflite-small measure adb not" in text
    )
    table = text[text.index("Data use Device Latency p50") :]
    assert "on adb not measured" in table
    assert "on ssh:pi@pi5 not measured" in table
    assert not [
        cell for tag in ("td", "div", "small", "span") for cell in devices.texts[tag] if cell.strip() == "0\u00a0µs"
    ]


def test_what_changed_since_earlier_measurements_is_a_notice(devices: _Page) -> None:
    assert "Slower or faster than in earlier measurements onnx-small: 20 % slower than in 4" in devices.text


def test_numbers_from_a_browser_are_labelled(devices: _Page, tmp_path: Path) -> None:
    assert "on browser in-browser" in devices.text
    summary = _demo()
    summary["variants"] = [
        {**variant, "latency": {"browser": variant["latency"]["local"]}} for variant in summary["variants"]
    ]
    assert "on browser in-browser" in _page(summary, tmp_path).text, "also where it is the only device"


def test_accuracy_on_the_device_stands_beside_the_one_here(devices: _Page) -> None:
    text = _said(devices)
    assert "94 % ±0 pt to the float model on ssh:pi@pi5 itself: 93 % (90.4 % to 95 %, 500 inputs)" in text
    assert "on local itself" not in text


def test_a_run_that_was_measured_as_before_has_no_section_for_devices(demo: _Page) -> None:
    headings = {a.get("id") for tag, a in demo.elements if tag == "h2"}
    assert not headings & {"devices", "elsewhere", "fits"}


def _of_runtimes(latency: dict[str, str], **more: Any) -> dict[str, Any]:
    """One variant that was timed on devices, each with a runtime."""
    timed = {device: {"p50_us": 20.0, "p90_us": 28.0, "runtime": name, **more} for device, name in latency.items()}
    return {"name": "small", "format": "onnx", "bytes": 9000, "accuracy": 0.9, "latency": timed}


def test_every_runtime_that_there_is_has_a_mark_of_its_own_and_one_device_s_differ_in_colour() -> None:
    variants = [_of_runtimes({name: name}) for name in timings._KNOWN_RUNTIMES]
    marks = timings.marks_of(timings.timings_of({"variants": variants}))
    assert len({mark.letter for mark in marks.values()}) == len(timings._KNOWN_RUNTIMES) == 8
    assert len({(mark.series, mark.marker, mark.is_filled) for mark in marks.values()}) == 8
    for together in (("onnxruntime", "litert", "executorch", "tflite-runtime"), ("onnxruntime-web", "LiteRT.js")):
        assert len({marks[name].series for name in together}) == len(together)
    alone = timings.marks_of(timings.timings_of({"variants": variants[3:4]}))
    assert alone == {"tflite-runtime": marks["tflite-runtime"]}, "the same in every run"
    many = [_of_runtimes({"local": f"own {number}"}) for number in range(11)]
    assert len({mark.letter for mark in timings.marks_of(timings.timings_of({"variants": many})).values()}) == 8


def test_a_chart_s_key_has_the_runtimes_of_that_chart_alone(tmp_path: Path) -> None:
    variant = _of_runtimes({"local": "onnxruntime", "local:tflite-runtime": "tflite-runtime", "adb": "benchmark_model"})
    source = _write(_demo() | {"variants": [variant]}, tmp_path)
    captions = re.findall(r"<figcaption><h3>(.*?)</h3>(.*?)</figcaption>", source, re.DOTALL)
    keys = {title: re.findall(r'"true">(.)</span> (.*?)</span>', text) for title, text in captions}
    for title in ("Size, latency and accuracy", "Latency by runtime"):
        assert keys[f"{title} on local"] == [("●", "onnxruntime")]
        assert keys[f"{title} on local:tflite-runtime"] == [("■", "tflite-runtime")]
        assert keys[f"{title} on adb"] == [("△", "benchmark_model")]


def test_devices_whose_latency_is_not_drawn_are_named(tmp_path: Path) -> None:
    names = [f"ssh:pi@pi{number}" for number in range(6)]
    summary = _demo() | {"variants": [_of_runtimes(dict.fromkeys(names, "litert"))]}
    text = _page(summary, tmp_path).text
    assert "of the first 4 devices. Without charts of size and latency" in text
    assert "in the table: ssh:pi@pi4, ssh:pi@pi5." in text
    assert "Latency by runtime on ssh:pi@pi3" in text
    assert "Latency by runtime on ssh:pi@pi4" not in text
    four = _demo() | {"variants": [_of_runtimes(dict.fromkeys(names[:4], "litert"))]}
    assert "Without charts" not in _page(four, tmp_path).text
    lost = {name: {"mode": "quick", "lost": "unplugged"} for name in (f"ssh:pi@pi{number}" for number in range(9))}
    text = _page(_demo() | {"measured": lost}, tmp_path).text
    assert text.count("Without charts: this page draws those of the first 8 devices.") == 2  # local is the first


def test_one_far_bound_does_not_squash_a_chart_and_where_it_ends_is_written(tmp_path: Path) -> None:
    summary = _demo()
    summary["variants"][1]["latency"]["local"]["ci"]["p90_us"] = [33.0, 21_656.0]
    page = _page(summary, tmp_path)
    assert "to 21.7\u00a0ms" in page.texts["text"]
    assert not [one for one in page.texts["text"] if one.endswith("ms") and not one.startswith("to ")], "no such tick"
    assert "Rows with an arrow go on beyond the right edge" in page.text
    summary["variants"][1]["latency"]["local"]["p90_us"] = 21_000.0
    assert "p90 at 21\u00a0ms" in _page(summary, tmp_path).texts["text"]
    summary["variants"][1]["latency"]["local"] |= {"p90_us": 36.2, "ci": {"p90_us": [33.0, 90.0]}}
    page = _page(summary, tmp_path)
    assert "Rows with an arrow" not in page.text
    assert not [one for one in page.texts["text"] if one.startswith("to ")]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.floats(0.1, 1e6), st.floats(1.0, 1e4), st.floats(1.0, 1e4)).map(
            lambda row: {"p50_us": row[0], "p90_us": row[0] * row[1], "ci": {"p90_us": [0.0, row[0] * row[1] * row[2]]}}
        ),
        min_size=1,
        max_size=6,
    )
)
def test_no_median_lies_beyond_the_end_of_its_chart(rows: list[dict[str, Any]]) -> None:
    drawn = timings.timings_of({"variants": [{"name": "a", "latency": {"local": row}} for row in rows]})
    limit = timings.latency_limit(drawn)
    if limit is None:
        assert max(map(timings.end_of, drawn)) <= 3 * max(6 * t.p50_us for t in drawn)
    else:
        assert max(t.p50_us for t in drawn) < limit < max(map(timings.end_of, drawn))


def test_what_computes_something_else_is_wrong_and_never_the_fastest(tmp_path: Path) -> None:
    summary = _demo()
    summary["variants"][4]["latency"]["local"] |= {"p50_us": 1.0, "flags": ["departs"]}
    reason = "expected about 95.3 % right, as where it was judged, got 9.4 % there"
    unplugged = {"stage": "measure adb", "name": "onnx-small", "reason": "unplugged"}
    already = {"stage": "measure adb", "name": "tflite-small", "reason": "not measured: the page was closed"}
    failed = [{"stage": "measure local", "name": "tflite-dynamic", "reason": reason}, unplugged, already]
    page = _page(summary | {"failed": failed}, tmp_path)
    assert f"tflite-dynamic measure local wrong: {reason}" in page.text
    assert "onnx-small measure adb not measured: unplugged" in page.text
    assert "tflite-small measure adb not measured: the page was closed" in page.text
    assert re.search(r"Fastest 6\.3\sµs tflite-small", page.text)
    assert "tflite-dynamic wrong here" in page.texts["text"]


def test_one_import_is_drawn_for_all_files_of_a_runtime() -> None:
    def cold(import_us: float, runtime: str) -> dict[str, Any]:
        parts = {"import_us": import_us, "load_us": 5.0, "first_us": 1.0}
        return {"runtime": runtime, "cold": {key: {"estimate": value} for key, value in parts.items()}}

    entries = {"a": cold(50.0, "litert"), "b": cold(20.0, "litert"), "c": cold(30.0, "litert"), "d": cold(7.0, "micro")}
    rows = device_charts._cold_rows(entries)
    assert rows == {"a": [30.0, 5.0, 1.0], "b": [30.0, 5.0, 1.0], "c": [30.0, 5.0, 1.0], "d": [7.0, 5.0, 1.0]}


def test_a_shared_import_is_explained_where_there_is_one(devices: _Page, tmp_path: Path) -> None:
    words = "The import knows nothing of the file, so all files of a runtime are drawn with the median of theirs"
    assert devices.text.count(words) == 3  # local, ssh and browser, each with several files of a runtime
    summary = _with_devices()
    summary["variants"] = summary["variants"][:1]
    assert words not in _page(summary, tmp_path).text


def test_phone_and_days_stand_beside_the_device(devices: _Page, tmp_path: Path) -> None:
    assert "Measured on" not in devices.text
    assert "Measured between" not in devices.text
    summary = _with_devices()
    for number, variant in enumerate(summary["variants"]):
        variant["latency"]["local"]["taken"] = "2026-11-23T09:00:00+00:00"
        if "browser" in variant["latency"]:
            told = {"phone": "Chrome 156, Android; 8 cores", "taken": f"2026-11-2{number}T09:00:00+00:00"}
            variant["latency"]["browser"] |= told
    text = _page(summary, tmp_path).text
    assert "browser in-browser Measured on Chrome 156, Android; 8 cores. Measured between 20 November 2026 and" in text
    assert text.count("Measured between") == 1


def test_a_change_under_load_that_may_be_none_is_called_so(tmp_path: Path) -> None:
    summary = _with_devices()
    told = ({"change_ci": [0.2, 0.3]}, {"change_ci": [-0.02, 0.5], "asked_s": 300.0}, {"change_ci": None})
    for variant, more in zip(summary["variants"], told, strict=False):
        variant["latency"]["local"]["sustained"] |= more
    text = _said(_page(summary, tmp_path))
    minus = "\N{MINUS SIGN}"
    assert "onnx-float32 59 s 20 µs 25.9 µs +25.1 % +20.0 % to +30.0 % not known" in text
    assert f"59 s of 300 s that were asked for 21 µs 27.2 µs no clear change +25.1 %; {minus}2.0 % to +50.0 %" in text
    assert "onnx-small 59 s 22 µs 28.5 µs +25.1 % not known" in text


def test_with_several_devices_each_has_a_row_of_the_table_beside_its_variant(tmp_path: Path) -> None:
    summary = _demo()
    summary["variants"][0]["latency"]["phone"] = {"p50_us": 900.0, "p90_us": None, "runtime": "litert"}
    source = _write(summary, tmp_path)
    table = source[source.index('aria-label="Variants"') :]
    table = table[: table.index("</table>")]
    assert table.count("<tr>") == 1 + 6 + 1
    first = table[table.index("<tbody>") : table.index("</tbody>")]
    assert first.count('rowspan="2"') == 5
    assert re.findall(r'data-label="Device" class="where">(.*?)</td>', first) == ["on local", "on phone"]
    heads = table[: table.index("</thead>")].count("<th ")
    assert first[: first.index("</tr>")].count("<td") + 1 == heads == 9


def test_twenty_variants_on_four_devices_stay_under_a_megabyte(tmp_path: Path) -> None:
    summary = _with_devices()
    variants = [{**v, "name": f"{v['name']}-{i}"} for i in range(4) for v in summary["variants"]]
    rows = [{**row, "artifact": v["name"]} for v in variants for row in _fit_rows()[::2]]
    summary["variants"] = variants
    summary["measured"]["micro"]["fit"] = rows
    assert len(_write(summary, tmp_path).encode()) < 1_000_000


def _swapped(value: Any, at: str, odd: Any) -> Any:
    """The same JSON with another value under each key of that name."""
    if isinstance(value, dict):
        return {key: odd if key == at else _swapped(item, at, odd) for key, item in value.items()}
    return [_swapped(item, at, odd) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("odd", [None, "text", [], [3, "x"], {}, 3, -1.0, math.nan])
def test_parts_of_another_shape_are_left_out(odd: Any, tmp_path: Path) -> None:
    summary = _with_devices() | {"training": {}}
    first, about = summary["variants"][0], dict(summary["measured"]["micro"])
    entry = first["latency"]["ssh:pi@pi5"] | {
        "relative": {"to": "onnx-float32", "estimate": 2.0, "low": 1.9, "high": 2.1}
    }
    outer = (
        "relative",
        "cold",
        "sustained",
        "energy",
        "profile",
        "accuracy",
        "not_measured",
        "samples_us",
        "flags",
        "ci",
    )
    entries = {key: {**entry, key: odd} for key in outer}
    entry["sustained"] |= {"change_ci": [0.1, 0.2], "asked_s": 60.0}
    entry |= {"phone": "a phone", "taken": "2026-11-23T09:00:00+00:00"}
    inner = ("estimate", "median_us", "start_s", "temperature_c", "by_type_us", "import_us", "top1", "change")
    for key in (*inner, "change_ci", "asked_s", "phone", "taken"):
        entries[key] = _swapped(entry, key, odd)
    odd_ones = [{**first, "name": key, "latency": {"local": value}} for key, value in entries.items()]
    answers = [
        {**first, "name": key, "answers_on": {"micro": _swapped(first["answers_on"]["micro"], key, odd)}}
        for key in first["answers_on"]["micro"]
    ]
    summary["variants"] = [first, *odd_ones, *answers]
    summary["measured"] |= {"a": odd, "b": {"fit": odd, "changes": odd, "failed": odd, "lost": odd}}
    summary["measured"] |= {key: {**about, "fit": _swapped(about["fit"][:4], key, odd)} for key in about["fit"][0]}
    text = _page(summary, tmp_path).text
    assert not re.search(r"\b(None|nan|Undefined)\b", text)


@pytest.mark.parametrize("payload", CORPUS)
def test_no_string_of_a_device_becomes_markup(payload: str, devices: _Page, tmp_path: Path) -> None:
    summary = _with_devices()
    summary["variants"] = summary["variants"][:2]
    lists = {"changes": [payload], "lost": payload, "latency": payload, "failed": {payload: payload}}
    summary["measured"] = {key: {**about, **lists} for key, about in summary["measured"].items()}
    summary["measured"][payload] = {"mode": "quick", **lists}
    summary["measured"]["micro"]["fit"] = [
        {key: value if key == "kind" else payload for key, value in row.items()} for row in _fit_rows()[:2]
    ]
    for variant in summary["variants"]:
        entry = _poisoned(variant["latency"]["local"], payload, numbers=False)
        entry["profile"]["by_type_us"] = {payload: 3.0}
        entry["not_measured"] = {payload: payload}
        entry |= {"phone": payload, "taken": payload}
        variant["latency"][payload] = entry
        variant["answers_on"][payload] = {"n": payload, "max_abs": payload, "operators": [payload]}
    page = _page(summary, tmp_path)
    assert {tag for tag, _ in page.elements} <= {tag for tag, _ in devices.elements}
    known = {name for _, attributes in devices.elements for name in attributes}
    assert {name for _, attributes in page.elements for name in attributes} <= known
