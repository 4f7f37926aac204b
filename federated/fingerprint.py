"""Telling whether an owner's data are still the same, without saying anything about them.

A fingerprint is HMAC-SHA-256 over dtype, shape and bytes of inputs and labels, under 32 random bytes that never leave
the owner's disk (`home.fingerprint_key`). A plain hash would be an oracle: who guesses the data could confirm it.
Without the key the value looks random, also to whoever sees a ledger's head, a hash over it. Extracts leave it out.

**Where it stands.** In each `reserve`, not in an entry of its own: whether old charges count depends on the data
(changed data inherit them, data after a `new-cohort` do not), so charge and data are one decision and one line.

**Why it may be computed before the charge**, though records may be read only afterwards. That rule is there so that
nothing that depends on records leaves uncharged. What leaves here is one bit: granted, or "refused" when the data of a
run have changed. For data that stay as they are the bit is the same whatever they are (but for a collision of HMAC,
2⁻²⁵⁶), so for a record that is there from the beginning of a run to its end, or never, the guarantee is untouched. What
a refusal does tell is that the owner edited its data in the middle of a run, or declared a new cohort without changing
them. That is about when an owner edits, which no unit protects, and a refusal, which is asked for, cannot hide it.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Mapping

import numpy as np

from tacit.federated.task import DataProblem, Records

__all__ = ["DataChanged", "fingerprint", "fingerprint_of_all", "unchanged"]


class DataChanged(DataProblem):
    """Data that are not those a run has been charged for."""


def fingerprint(records: Records, key: bytes) -> str:
    """HMAC-SHA-256 of an owner's records, in hexadecimal; their order counts.

    Args:
        records: all of one owner's source.
        key: of `home.fingerprint_key`.

    Raises:
        DataProblem: arrays of Python objects, whose bytes are only addresses.

    >>> one, two = (Records(np.zeros((n, 1), np.float32), np.zeros(n, np.int64)) for n in (1, 2))
    >>> [fingerprint(one, bytes(32)) == fingerprint(other, bytes(32)) for other in (one, two)]
    [True, False]
    """
    digest = hmac.new(key, b"tacit records 1\n", hashlib.sha256)
    for name, array in (("inputs", records.inputs), ("labels", records.labels)):
        if array.dtype.hasobject:
            raise DataProblem(f"expected {name} as numbers, got dtype={array.dtype}; convert them")
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data if array.size else b"")
    return digest.hexdigest()


def fingerprint_of_all(fingerprints: Mapping[str, str], key: bytes) -> str:
    """One fingerprint for many owners' data: what the server's ledger states at client level in a simulation.

    Args:
        fingerprints: by owner.
        key: the server's.

    >>> first, second = (fingerprint_of_all({"anna": value}, bytes(32)) for value in ("a", "b"))
    >>> first == second
    False
    """
    digest = hmac.new(key, b"tacit owners 1\n", hashlib.sha256)
    for owner in sorted(fingerprints):
        digest.update(f"{owner} {fingerprints[owner]}\n".encode())
    return digest.hexdigest()


def unchanged(read: Callable[[], Records], key: bytes, expected: str) -> Callable[[], Records]:
    """Reads as `read` does, and refuses records that are not those of a fingerprint.

    For data that are read anew each round: what was fingerprinted when the run began may not be what is there now.

    Args:
        read: an owner's reader.
        key: of `home.fingerprint_key`.
        expected: the fingerprint that the charge states.

    Returns:
        A reader that raises `DataChanged`.

    >>> records = Records(np.zeros((1, 1), np.float32), np.zeros(1, np.int64))
    >>> len(unchanged(lambda: records, bytes(32), fingerprint(records, bytes(32)))())
    1
    """

    def reader() -> Records:
        records = read()
        if not hmac.compare_digest(fingerprint(records, key), expected):
            raise DataChanged("expected the records that were charged, got others; restore them or begin a new run")
        return records

    return reader
