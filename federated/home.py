"""Where an owner's ledgers outlive a run: `$TACIT_HOME/ledgers/OWNER/SOURCE.jsonl`, and what an owner declares there.

Beside them lies `key`, 32 random bytes for fingerprints, made once. Folders are for their user alone (0700), files too
(0600). TACIT_HOME is `~/.tacit` where it is not set; it moves ledgers and changes no result.
"""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path

from tacit.devices.durable import FileDamaged, sync_folder
from tacit.federated.chain import Chain
from tacit.federated.ledger import Ledger
from tacit.federated.outbox import Outbox
from tacit.federated.tally import Account, tally

__all__ = [
    "check_reason",
    "declare_new_cohort",
    "fingerprint_key",
    "home_folder",
    "home_ledger",
    "open_home_ledger",
    "owner_folder",
]

_KEY_BYTES = 32
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_LONGEST_REASON = 500


def home_folder() -> Path:
    """`$TACIT_HOME`, or `~/.tacit`."""
    return Path(os.environ.get("TACIT_HOME") or "~/.tacit").expanduser()


def home_ledger(home: Path, owner: str, source: str) -> Path:
    """Where the ledger of an owner's source lies.

    Raises:
        ValueError: names that are not letters, digits, '_', '.' and '-', which keeps them from being paths.

    >>> home_ledger(Path("home"), "anna", "digits").as_posix()
    'home/ledgers/anna/digits.jsonl'
    >>> home_ledger(Path("home"), "../anna", "digits")
    Traceback (most recent call last):
        ...
    ValueError: expected a name of letters, digits, '_', '.' and '-', at most 64, got owner='../anna'
    """
    for kind, name in (("owner", owner), ("source", source)):
        if not _NAME.fullmatch(name):
            raise ValueError(f"expected a name of letters, digits, '_', '.' and '-', at most 64, got {kind}={name!r}")
    return home / "ledgers" / owner / f"{source}.jsonl"


def owner_folder(home: Path, owner: str) -> Path:
    """Makes, if need be, the folder of an owner's ledgers, which nobody else may open.

    Raises:
        PermissionError: it is there, and others may open it.
    """
    folder = home_ledger(home, owner, "any").parent
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    for path in (folder.parent, folder):
        path.mkdir(exist_ok=True, mode=0o700)
    _expect_private(folder, 0o700)
    return folder


def open_home_ledger(
    home: Path, owner: str, source: str, *, data: str | None, outbox: Outbox, epsilon: float, delta: float
) -> Ledger:
    """Opens the ledger of one owner's private source, for a process that holds no other's.

    Args:
        home: of `home_folder`.
        owner: whose records.
        source: which data set.
        data: their fingerprint; None for the server's ledger at client level.
        outbox: where payloads wait.
        epsilon: the budget, of this run and of all others together.
        delta: its δ.

    Raises:
        ChainHeld: another process has it open.
        ChainDamaged: the chain does not hold.
        ValueError: names that could be paths.
    """
    path = home_ledger(home, owner, source)
    owner_folder(home, owner)
    fingerprints = {} if data is None else {owner: data}
    return Ledger(path, outbox, epsilon=epsilon, delta=delta, status="private", data=fingerprints)


def fingerprint_key(home: Path, owner: str) -> bytes:
    """The key of an owner's fingerprints, 32 bytes; made by the first who asks.

    Raises:
        PrivacyRefused: the key is gone and ledgers are there: with another one, no data could be recognised.
        FileDamaged: a key of another length.
        PermissionError: others may read it.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as home:
    ...     key = fingerprint_key(Path(home), "anna")
    ...     len(key), fingerprint_key(Path(home), "anna") == key
    (32, True)
    """
    path = owner_folder(home, owner) / "key"
    if not path.exists():
        if any(ledger.stat().st_size for ledger in path.parent.glob("*.jsonl")):
            from tacit.federated.mechanism import PrivacyRefused

            raise PrivacyRefused(f"expected {path} beside the ledgers, got none; restore it")
        _make_key(path)
    _expect_private(path, 0o600)
    key = path.read_bytes()
    if len(key) != _KEY_BYTES:
        raise FileDamaged(f"expected {_KEY_BYTES} bytes in {path}, got {len(key)}; restore it")
    return key


def declare_new_cohort(home: Path, owner: str, source: str, reason: str) -> Account:
    """Writes down that an owner's source holds other records from now on, which have not been charged yet.

    The account starts from nothing; what was charged stays readable, and the card repeats the reason. It is the owner's
    word, and bound to this: data with a fingerprint that was charged before are refused from then on, for ever.

    Args:
        home: of `home_folder`.
        owner: whose.
        source: which data set.
        reason: one line of text, for whoever reads the card.

    Returns:
        The account as it was.

    Raises:
        FileNotFoundError: there is no such ledger.
        ValueError: no reason, or more than a line.
        PrivacyRefused: nothing was charged since the last declaration, or nothing says which data were.
        ChainHeld: a run is using the ledger.
        ChainDamaged: the chain does not hold.
    """
    path = home_ledger(home, owner, source)
    check_reason(reason)
    if not path.is_file():
        raise FileNotFoundError(2, "No such ledger", str(path))
    chain = Chain(path)
    try:
        account = Account(owner, source)
        for entry in chain.entries:
            tally(account, entry)
        _expect_charged(account, path)
        chain.append([{"kind": "new-cohort", "owner": owner, "source": source, "reason": reason.strip()}])
    finally:
        chain.close()
    return account


def check_reason(reason: str) -> None:
    """Checks that a reason is one printable line.

    Raises:
        ValueError: it is not.

    >>> check_reason("the study began anew with other patients")
    """
    if not (0 < len(reason.strip()) <= _LONGEST_REASON and reason.isprintable()):
        raise ValueError(f"expected a reason of one line, at most {_LONGEST_REASON} characters, got reason={reason!r}")


def _expect_charged(account: Account, path: Path) -> None:
    from tacit.federated.mechanism import PrivacyRefused

    if not account.reserved:
        raise PrivacyRefused(f"expected charges to leave behind in {path}, got none since the last new cohort")
    if set(account.data.values()) <= account.retired:
        raise PrivacyRefused(
            f"expected charges that state their data in {path}, got none; without them the same data could be charged "
            "from nothing again"
        )


def _make_key(path: Path) -> None:
    """Makes a key that another process, making one at the same time, does not replace."""
    temporary = path.with_name(f".key.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(os.urandom(_KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        path.hardlink_to(temporary)
    except FileExistsError:
        pass  # theirs is as good
    finally:
        temporary.unlink()
    sync_folder(path.parent)


def _expect_private(path: Path, mode: int) -> None:
    found = path.stat().st_mode & 0o777
    if found & ~mode:
        raise PermissionError(1, f"expected mode {mode:o}, got {found:o}; chmod {mode:o} it", str(path))
