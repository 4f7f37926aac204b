"""What was measured already: what of it stands, and what is kept where a device is lost."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tacit.edge.fleet import Access, Work, file_of
from tacit.edge.run_folder import RunFolder

if TYPE_CHECKING:
    from tacit.devices.protocol import Artifact, Mode

__all__ = ["Result", "beside", "fit_is_old", "held_result", "incomplete", "joined", "nothing", "peaks_of", "standing"]

Result = dict[str, Any]
_ABOUT = ("facts", "conditions", "latency", "fit")


def held_result(folder: RunFolder, device: str, artifacts: Sequence[Artifact]) -> Result:
    """What is known of a device, as far as it is of exactly these bytes; empty when it was never measured."""
    content = folder.read_json("measure", file_of(device)) or {}
    known = content.get("artifacts")
    if not isinstance(known, dict) or not isinstance(content.get("failed"), dict):
        return {}
    digests = {a.name: hashlib.sha256(a.path.read_bytes()).hexdigest() for a in artifacts if a.name in known}
    entries = {name: known[name] for name in digests if isinstance(known[name], dict)}
    alike = {name: entry for name, entry in entries.items() if entry.get("sha256") == digests[name]}
    return {**content, "artifacts": alike}


def standing(held: Mapping[str, Any], mode: Mode | None, access: Access, artifacts: Sequence[Artifact]) -> Result:
    """Entries of these that hold all that is asked for: the mode, where one was named, and what else is measured."""
    names = {artifact.name for artifact in artifacts}
    entries = {name: entry for name, entry in held.get("artifacts", {}).items() if name in names}
    if held.get("mode") == "parity" or not held:
        return entries
    return {name: entry for name, entry in entries.items() if _is_of(entry, mode) and _has_all(entry, access)}


def _is_of(entry: Mapping[str, Any], mode: Mode | None) -> bool:
    key = entry.get("key")
    return isinstance(key, str) and (mode is None or f"-{mode}-" in key)


def _has_all(entry: Mapping[str, Any], access: Access) -> bool:
    """One that could not be had will not be had another time; a sustained run must have been asked to be as long."""
    seconds, run = access.sustained_s, entry.get("sustained") or {}
    if seconds is not None and not (_was_tried(entry, "sustained") and run.get("asked_s", seconds) >= seconds):
        return False
    return not access.profile or _was_tried(entry, "profile")


def _was_tried(entry: Mapping[str, Any], part: str) -> bool:
    return entry.get(part) is not None or part in (entry.get("not_measured") or {})


def fit_is_old(held: Mapping[str, Any], peaks: Collection[str]) -> bool:
    """Whether a fit was left open for want of a figure that there is by now."""
    open_rows = [row for row in held.get("fit") or [] if row["verdict"] == "unknown" and row["memory_bytes"] is None]
    return any(row["kind"] != "mcu" and row["artifact"] in peaks for row in open_rows)


def peaks_of(folder: RunFolder) -> dict[str, int]:
    """Bytes that artifacts added to a process on this computer, as far as that was measured."""
    local = (folder.read_json("measure", file_of("local")) or {}).get("artifacts")
    found = {name: entry.get("peak_memory_bytes") for name, entry in local.items()} if isinstance(local, dict) else {}
    return {name: peak for name, peak in found.items() if isinstance(peak, int)}


def joined(held: Mapping[str, Any], result: Result) -> Result:
    """An incomplete result beside what was known of the device: nothing that is known gets lost.

    Example:
        >>> held = {"mode": "quick", "facts": {"cpu": "x"}, "artifacts": {"a": {"p50_us": 1.0}}}
        >>> lost = {"mode": "quick", "facts": {}, "artifacts": {}, "failed": {"a": "gone", "b": "gone"}}
        >>> joined(held, lost)["artifacts"], joined(held, lost)["failed"]
        ({'a': {'p50_us': 1.0}}, {'b': 'gone'})
    """
    # A page is opened by whatever phone there is; what another one showed is not of this result.
    phones = {entry.get("phone") for entry in result["artifacts"].values()}
    earlier = held.get("artifacts", {})
    kept_entries = {name: entry for name, entry in earlier.items() if not phones or entry.get("phone") in phones}
    both = {**kept_entries, **result["artifacts"]}
    about = (*_ABOUT, "mode") if held.get("mode") == "parity" else _ABOUT
    kept = {key: held[key] for key in about if key in held and (kept_entries or not earlier)}
    failed = {name: reason for name, reason in result["failed"].items() if name not in both}
    return {**result, **kept, "artifacts": both, "failed": failed}


def beside(held: Mapping[str, Any], result: Result, asked: Collection[str]) -> Result:
    """A complete result, with what is known of artifacts that it was not about: a phone has two ways to be measured.

    Example:
        >>> held = {"conditions": {"benchmark_model": {}}, "artifacts": {"lite": {"n": 1}, "onnx": {"n": 2}}}
        >>> new = {"conditions": {"onnxruntime": {}}, "artifacts": {"onnx": {"n": 3}}}
        >>> both = beside(held, new, ["onnx"])
        >>> both["artifacts"], list(both["conditions"])
        ({'lite': {'n': 1}, 'onnx': {'n': 3}}, ['benchmark_model', 'onnxruntime'])
    """
    phones = {entry.get("phone") for entry in result["artifacts"].values()}
    others = {
        name: entry
        for name, entry in held.get("artifacts", {}).items()
        if name not in asked and (not phones or entry.get("phone") in phones)
    }
    if not others:
        return result
    conditions = {**held.get("conditions", {}), **result.get("conditions", {})}
    return {**result, "conditions": conditions, "artifacts": {**others, **result["artifacts"]}}


def nothing(name: str) -> Result:
    """The result of a device that can hold none of the artifacts."""
    return {"device": name, "artifacts": {}, "failed": {}}


def incomplete(name: str, work: Work, partial_result: Result | None, why: Exception) -> Result:
    """What is kept of a device that was lost: an artifact without a figure was not measured."""
    kept = {} if partial_result is None else partial_result["artifacts"]
    reason = " ".join(str(why).split())
    return {
        "schema_version": 1,
        "device": name,
        "mode": work.mode,
        "facts": {},
        "conditions": {},
        "artifacts": kept,
        "failed": {artifact.name: reason for artifact in work.artifacts[name] if artifact.name not in kept},
        "complete": False,
        "lost": reason,
        "was_reached": partial_result is not None,
    }
