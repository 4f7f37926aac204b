"""Connects to a device by SSH: keys only, to a host whose key is known, or one line that says what to do."""

from __future__ import annotations

import errno
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tacit.devices.answers import DeviceUnreachable, printable

if TYPE_CHECKING:
    import asyncssh

__all__ = ["HostKeyRefused", "Target", "connect", "parse_target"]

_TARGET = re.compile(
    r"(?:ssh:)?(?:(?P<user>[^\s:/@\[\];-][^\s:/\[\];]*)@)?"
    r"(?:(?P<host>[A-Za-z0-9_][A-Za-z0-9._-]*)|\[(?P<address>[0-9A-Za-z:.%]+)\])(?::(?P<port>[0-9]{1,5}))?"
)
_SSH_PORT = 22
_KEEPALIVE_S = 15  # a peer that is silent for three of these is gone
_SHOWN_KEYS = 3
# After those of the known keys: a host that has none of these kinds any more is asked for the key that it has instead.
_FURTHER_KINDS = "+ssh-ed25519,ecdsa-sha2-nistp256,ecdsa-sha2-nistp384,ecdsa-sha2-nistp521,rsa-sha2-512,rsa-sha2-256"


class HostKeyRefused(DeviceUnreachable):
    """A host's key is not known, not the known one, or revoked."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where to connect; what is None, the user's own SSH configuration decides, or else their name and port 22."""

    host: str
    user: str | None = None
    port: int | None = None

    @property
    def name(self) -> str:
        """The target as a person writes it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return "ssh:" + (f"{self.user}@" if self.user else "") + host + (f":{self.port}" if self.port else "")


def parse_target(text: str) -> Target:
    """Read ``ssh:user@host[:port]``; the prefix and the user may be left out, an IPv6 address has brackets.

    Raises:
        ValueError: It is none.

    >>> parse_target("ssh:pi@raspberrypi.local:2222")
    Target(host='raspberrypi.local', user='pi', port=2222)
    >>> parse_target("pi@[fe80::1]").name
    'ssh:pi@[fe80::1]'
    """
    found = _TARGET.fullmatch(text)
    port = int(found["port"]) if found and found["port"] else None
    if found is None or (port is not None and not 0 < port < 1 << 16):
        raise ValueError(f"expected ssh:user@host[:port], got device={printable(text)!r}; name one host")
    return Target(host=found["host"] or found["address"], user=found["user"], port=port)


async def connect(
    target: Target, *, known_hosts: Path | None, key: Path | None, timeout_s: float
) -> asyncssh.SSHClientConnection:
    """Open a connection.

    *Guarantees.* Nothing is sent to a host before its key has been found among the known ones, whatever
    ``~/.ssh/config`` says (of which host names, users, ports, keys and jump hosts are honoured). No password is asked.

    Args:
        target: Where to.
        known_hosts: The file of known hosts; by default the user's and the system's.
        key: A private key without a passphrase; by default those of the SSH agent and of ``~/.ssh``.
        timeout_s: Seconds for name resolution, connection and login together.

    Raises:
        HostKeyRefused: The host's key is unknown, changed or revoked.
        DeviceUnreachable: There is no connection for another reason.
        FileNotFoundError: A given file is not there.
        ModuleNotFoundError: asyncssh is not installed.
    """
    ssh = _import_asyncssh()
    files = _known_hosts_files(known_hosts)
    known = _read_known_hosts(files)
    arguments = _arguments(target, key)
    seen: list[tuple[str, int, Any]] = []

    class Client(ssh.SSHClient):  # type: ignore[misc,name-defined]  # of a module that may be absent
        def validate_host_public_key(self, host: str, addr: str, port: int, key: Any) -> bool:
            del addr
            seen.append((host, port, key))
            return False

    try:
        connection: asyncssh.SSHClientConnection = await ssh.connect(
            target.host,
            **arguments,
            client_factory=Client,
            known_hosts=known,
            server_host_key_algs=_FURTHER_KINDS,
            x509_trusted_certs=None,
            connect_timeout=timeout_s,
        )
    except ssh.HostKeyNotVerifiable as error:
        host, port, offered = seen[-1] if seen else (target.host, target.port or _SSH_PORT, None)
        _refuse_key(known, files, host=host, port=port, offered=offered, why=error.reason)
    except (OSError, ValueError, ssh.Error) as error:
        raise DeviceUnreachable(_failed(target, error, timeout_s)) from error
    return connection


def _import_asyncssh() -> Any:
    try:
        import asyncssh
    except ModuleNotFoundError:
        raise ModuleNotFoundError("expected asyncssh for a device over SSH; pip install 'tacit[devices]'") from None
    return asyncssh


def _arguments(target: Target, key: Path | None) -> dict[str, Any]:
    """What is the same for every connection; nothing but keys, and none of the ways around them."""
    if key is not None and not key.is_file():
        raise FileNotFoundError(f"expected a private key, got key={str(key)!r}, which is no file; name another")
    return {
        **({} if target.port is None else {"port": target.port}),
        **({} if target.user is None else {"username": target.user}),
        **({} if key is None else {"client_keys": [str(key)], "agent_path": None}),
        "preferred_auth": "publickey",
        "password_auth": False,
        "kbdint_auth": False,
        "host_based_auth": False,
        "gss_host": None,
        "agent_forwarding": False,
        "x11_forwarding": False,
        "compression_algs": None,
        "keepalive_interval": _KEEPALIVE_S,
    }


def _known_hosts_files(given: Path | None) -> list[Path]:
    if given is None:
        return [Path.home() / ".ssh" / "known_hosts", Path("/etc/ssh/ssh_known_hosts")]
    if not given.is_file():
        raise FileNotFoundError(
            f"expected a known_hosts file, got known_hosts={str(given)!r}; make it with ssh-keyscan"
        )
    return [given]


def _read_known_hosts(files: Sequence[Path]) -> asyncssh.SSHKnownHosts:
    asyncssh = _import_asyncssh()
    try:
        return asyncssh.read_known_hosts([str(path) for path in files if path.is_file()])  # type: ignore[no-any-return]
    except (OSError, ValueError) as error:
        names = " and ".join(map(str, files))
        raise HostKeyRefused(
            f"expected a readable known_hosts file, got {names}: {printable(str(error))}; mend that line"
        ) from error


def _refuse_key(
    known: asyncssh.SSHKnownHosts, files: Sequence[Path], *, host: str, port: int, offered: Any, why: str
) -> NoReturn:
    """Say which of three things is wrong with a host's key, as ``ssh-keygen`` shows keys."""
    place, flag = (host, "") if port == _SSH_PORT else (f"[{host}]:{port}", f"-p {port} ")
    where = files[0]
    if offered is None or "revoked" in why:
        reason = printable(why)
        raise HostKeyRefused(f"expected the known host key of {place}, got: {reason}; see {where}, and do not go on")
    got = f"{printable(offered.get_algorithm())} {offered.get_fingerprint()}"
    keys = known.match(host, "", None if port == _SSH_PORT else port)[0]
    if keys:
        old = ", ".join(one.get_fingerprint() for one in keys[:_SHOWN_KEYS])
        raise HostKeyRefused(
            f"expected the host key of {place} that {where} has ({old}), got another, {got}; somebody may be in "
            f"between: only if you know why it changed, ssh-keygen -f {where} -R '{place}' and add the new one"
        )
    made = "" if Path(where).parent.is_dir() else f"mkdir -p {Path(where).parent} && "
    raise HostKeyRefused(
        f"expected the host key of {place} in {where}, got one that is not there, {got}; if `cat "
        "/etc/ssh/ssh_host_*_key.pub | ssh-keygen -lf -` shows it on the device itself: "
        f"{made}ssh-keyscan {flag}{host} >> {where}"
    )


def _failed(target: Target, error: Exception, timeout_s: float) -> str:
    asyncssh = _import_asyncssh()
    code = error.errno if isinstance(error, OSError) else None
    text = printable(str(getattr(error, "reason", "") or error)) or type(error).__name__
    expected = f"expected a connection to {target.name}, got: "
    if isinstance(error, asyncssh.PermissionDenied):
        who = f"user {target.user}" if target.user else "you"
        return f"{expected}{who} and key refused; ssh-copy-id there, load the key by ssh-add, or name another"
    if isinstance(error, asyncssh.KeyImportError | asyncssh.KeyEncryptionError):
        return f"{expected}{text}; load a key with a passphrase by ssh-add, and name none"
    if isinstance(error, socket.gaierror):
        return f"{expected}no address for the name {target.host}; check its spelling, or give the address"
    if isinstance(error, TimeoutError):
        return f"{expected}no answer within {timeout_s:g} s; is it on, and in this network?"
    # Where a name has several addresses, asyncio puts their errors into one text.
    if code == errno.ECONNREFUSED or f"[Errno {errno.ECONNREFUSED}]" in text:
        return f"{expected}nobody listens there; start its SSH server, or give its port"
    return f"{expected}{text}; try `ssh` itself"
