"""Asks a deployment's server, or who listens in its place: port, certificate, clock, registration. Changes nothing."""

from __future__ import annotations

import http.client
import socket
import ssl
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Literal

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

__all__ = ["Finding", "find_listener", "probe_clock", "probe_registration", "probe_server"]

_PATIENCE_S = 5.0
_CLOCK_S = 300.0  # Flower refuses a signature that is older, or 5 s from the future
_AHEAD_S = 5.0
_WORDS = {  # OpenSSL's X509_V_ERR_*
    9: ("the certificate is not valid yet", "set this machine's clock: sudo timedatectl set-ntp true"),
    10: ("the certificate has expired", "the server needs new certificates: tacit deploy into a new folder"),
    62: ("the certificate is for another name", "use the --host that the deployment was written for, or write it anew"),
    64: (
        "the certificate is for another address",
        "use the --host that the deployment was written for, or write it anew",
    ),
}
_WRONG_CA = (
    "the certificate is not signed by this deployment's CA",
    "copy ca.crt again from where the server's comes from",
)


@dataclass(frozen=True)
class Finding:
    """What was looked at, how it stands, what was found, and what to do (empty if ok).

    Attributes:
        resource: whether the trouble is this machine's own (code 7) rather than the federation's (code 5).
    """

    name: str
    status: Literal["ok", "warn", "fail"]
    found: str
    hint: str = ""
    resource: bool = False


def find_listener(port: int) -> Finding:
    """Whether a server could listen on a port of this machine: "warn" where somebody does already.

    >>> with socket.socket() as taken:
    ...     taken.bind(("127.0.0.1", 0))
    ...     taken.listen()
    ...     find_listener(taken.getsockname()[1]).status
    'warn'
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was closed a moment ago is free
        try:
            probe.bind(("", port))
        except PermissionError:
            hint = "choose a port above 1023: deploy into a new folder with --host NAME:PORT"
            return Finding("port", "fail", f"this user may not listen on {port}", hint, resource=True)
        except OSError:
            return Finding("port", "warn", f"{port} is in use; the line below says by whom", "")
    return Finding("port", "ok", f"{port} is free; no server runs on this machine")


def probe_server(host: str, port: int, ca: Path, *, listening: bool = False) -> list[Finding]:
    """Name, port and certificate of a server, step by step until one fails.

    Args:
        host: its name or address.
        port: its port.
        ca: certificate of the CA that it must be signed by.
        listening: whether somebody listens for certain, on this machine.
    """
    try:
        context = ssl.create_default_context(cafile=str(ca))
    except (OSError, ssl.SSLError):
        return [Finding("server", "fail", f"{ca} is no certificate to check it by", "copy ca.crt again")]
    where = f"{host}:{port}"
    try:
        with socket.create_connection((host, port), _PATIENCE_S) as raw, context.wrap_socket(raw, server_hostname=host):
            return [Finding("server", "ok", f"{where} answers with this deployment's certificate")]
    except socket.gaierror:
        return [Finding("server", "fail", f"no machine of the name {host} is known", "correct DNS, or /etc/hosts")]
    except ssl.SSLCertVerificationError as error:
        found, hint = _WORDS.get(error.verify_code, _WRONG_CA)
        return [Finding("server", "fail", f"{where}: {found}", hint)]
    except (ssl.SSLError, ConnectionResetError):
        hint = "stop that program, or deploy into a new folder with another port" if listening else "correct the port"
        return [Finding("server", "fail", f"{where}: something listens there that does not speak TLS", hint)]
    except TimeoutError:
        return [
            Finding("server", "fail", f"{where} does not answer within {_PATIENCE_S:g} s", f"open {port} in firewalls")
        ]
    except OSError as error:
        hint = "start it: server/superlink.sh; or open the port in its firewall"
        return [Finding("server", "fail", f"{where} cannot be reached: {(error.strerror or str(error)).lower()}", hint)]


def probe_clock(host: str, port: int, ca: Path) -> Finding:
    """How far this clock is from the server's, by the date of an answer: signatures carry the time."""
    connection = http.client.HTTPSConnection(
        host, port, timeout=_PATIENCE_S, context=ssl.create_default_context(cafile=str(ca))
    )
    try:
        connection.request("GET", "/")
        stated = connection.getresponse().getheader("date")
        ahead_s = time.time() - parsedate_to_datetime(stated or "").timestamp()
    except (OSError, http.client.HTTPException, ValueError, TypeError):
        return Finding("clock", "warn", "the server does not say what time it is", "compare: date -u, on both machines")
    finally:
        connection.close()
    found = f"{abs(ahead_s):.0f} s {'ahead of' if ahead_s > 0 else 'behind'} the server's"
    # The date has whole seconds, and the way takes some time.
    if ahead_s > _AHEAD_S + 1.0 or ahead_s < -_CLOCK_S:
        return Finding("clock", "fail", f"{found}; it refuses what this node signs", "sudo timedatectl set-ntp true")
    return Finding("clock", "ok", found)


def probe_registration(host: str, port: int, ca: Path, key: Path) -> Finding:
    """Whether the server knows a node's key.

    Flower has no question for that. An activation with a heartbeat that cannot be is refused in either case, but for
    different reasons, and changes nothing.
    """
    from flwr.proto.fleet_pb2 import ActivateNodeRequest
    from flwr.supercore.error import ApiErrorCode, FlowerError
    from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes
    from flwr.supernode.fleet_http_client import FleetHttpClient
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
    from httpx import HTTPError, HTTPStatusError

    ask = "on the server: server/register.sh; who is registered: server/flwr.sh supernode list tacit"
    try:
        private = serialization.load_ssh_private_key(key.read_bytes(), None)
    except (OSError, ValueError):
        return Finding("registration", "warn", "not asked: node.key cannot be read", ask)
    if not isinstance(private, ec.EllipticCurvePrivateKey):
        return Finding("registration", "warn", "not asked: node.key is of another kind", ask)
    public = private.public_key()
    signing = (RuntimeVersionHttpInterceptor(component_name="SuperNode"), NodeAuthHttpInterceptor(private, public))
    try:
        with FleetHttpClient.from_server_address(
            f"{host}:{port}", False, ca.read_bytes(), interceptors=signing
        ) as client:
            client.ActivateNode(ActivateNodeRequest(public_key=public_key_to_bytes(public), heartbeat_interval=-1.0))
    except HTTPStatusError as error:
        refused = FlowerError.from_json(error.response.text)
        code = None if refused is None else refused.code
        if code == ApiErrorCode.FLEET_INVALID_HEARTBEAT_INTERVAL:
            return Finding("registration", "ok", "the server knows this node's key")
        if code == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED:
            return Finding("registration", "fail", "the server does not know this node's key", ask)
        found = f"the server answers {error.response.status_code} to what this node signs, its error {code or 'none'}"
        return Finding("registration", "fail", found, "compare the clocks, and the versions of flwr on both machines")
    except HTTPError as error:
        return Finding("registration", "warn", f"not answered: {type(error).__name__}", ask)
    return Finding("registration", "ok", "the server knows this node's key")
