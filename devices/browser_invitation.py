"""How a phone finds its way here: an address on the network, a certificate of one day, a link and its QR code."""

import contextlib
import datetime
import io
import ipaddress
import os
import re
import socket
import ssl
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tacit.devices.answers import DeviceUnreachable

_DAYS = 1
_QUIET_ZONE = 2  # modules; the standard's four cost lines, and readers take two
_COLOURS = re.compile("\x1b\\[[0-9;]*m")


@dataclass(frozen=True, kw_only=True)
class Invitation:
    """What a person needs to open the page: the link with its one-time token, and by which certificate to know it.

    ``fingerprint`` is the SHA-256 of the certificate in pairs of digits, None without TLS; ``qr`` the code as lines
    for a terminal, in black and white whatever its colours, None where segno is not installed.
    """

    url: str
    fingerprint: str | None
    qr: str | None

    def lines(self, *, colours: bool | None = None) -> list[str]:
        """What to print, in order; the code, if there is one, comes first.

        Args:
            colours: Whether what shows the lines takes colours; by default whether standard error is a terminal.
                Without them, the code is of blocks alone: right where ink is darker than the page.

        >>> Invitation(url="http://127.0.0.1:8000/t/", fingerprint=None, qr=None).lines()[-1]
        'Open http://127.0.0.1:8000/t/ in a browser on this computer and press start. The link works once.'
        """
        coloured = sys.stderr is not None and sys.stderr.isatty() if colours is None else colours
        code = (self.qr if coloured else _COLOURS.sub("", self.qr)).splitlines() if self.qr else []
        if self.fingerprint is None:
            return [
                *code,
                f"Open {self.url} in a browser on this computer and press start. The link works once.",
            ]
        return [
            *(code or ["For a QR code: pip install 'tacit[devices]'."]),
            f"Open {self.url}",
            "on a phone in the same network (point its camera at the code), and press start. The link works once.",
            "",
            "The phone will warn that the connection is not private: this computer made the certificate itself.",
            "  Chrome, Edge, Samsung: Advanced, then Proceed.   iPhone: Show Details, then visit this website.",
            "  Firefox: Advanced, then Accept the Risk.         Then come back to this link if the page is empty.",
            "To be sure that it is this computer, compare the certificate's SHA-256 fingerprint before you go on:",
            f"  {self.fingerprint[:47]}",
            f"  {self.fingerprint[48:]}",
            "Does it not open? Guest networks and firewalls keep devices apart; try another network, or a hotspot.",
        ]


def lan_addresses() -> tuple[str, ...]:
    """Return this computer's IPv4 addresses on its networks, first the one that leads outside; nothing is sent."""
    found: list[str] = []
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # an address for documentation: only a route is looked up
        found.append(probe.getsockname()[0])
    with contextlib.suppress(OSError):
        found += [str(entry[4][0]) for entry in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)]
    return tuple(address for address in dict.fromkeys(found) if not _is_local(address))


def addresses_of(host: str | None) -> tuple[str, tuple[str, ...]]:
    """Return the address to listen on, and those by which it may be called; the first goes into the link.

    Raises:
        DeviceUnreachable: There is no network that a phone could be on.
        ValueError: ``host`` is no address.

    >>> addresses_of("127.0.0.1")
    ('127.0.0.1', ('127.0.0.1',))
    """
    if host is not None:
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            raise ValueError(f"expected an IP address of this computer, got host={host!r}; leave it out") from None
        if not address.is_unspecified:
            return host, (str(address),)
    found = lan_addresses()
    if not found:
        raise DeviceUnreachable(
            "browser: expected a network that a phone can be on, got none; join a Wi-Fi, or name this computer's "
            "address on it"
        )
    return (found[0], found[:1]) if host is None else (host, found)


def is_loopback(address: str) -> bool:
    """Tell whether only this computer can reach an address.

    >>> is_loopback("127.0.0.1"), is_loopback("192.168.1.4")
    (True, False)
    """
    return ipaddress.ip_address(address).is_loopback


def _is_local(address: str) -> bool:
    known = ipaddress.ip_address(address)
    return known.is_loopback or known.is_unspecified


def certificate(addresses: tuple[str, ...]) -> tuple[ssl.SSLContext, str]:
    """Make a certificate for these addresses, with a key that no file keeps; also its fingerprint.

    Raises:
        ModuleNotFoundError: ``cryptography`` is not installed.
    """
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "expected the package cryptography, got none; pip install 'tacit[devices]', or measure on this "
            "computer alone (host 127.0.0.1)"
        ) from None
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Tacit, this computer, today")])
    now = datetime.datetime.now(datetime.UTC)
    alternatives = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(one)) for one in addresses])
    made = (
        x509.CertificateBuilder(subject_name=name, issuer_name=name, public_key=key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))  # clocks of phones
        .not_valid_after(now + datetime.timedelta(days=_DAYS))
        .add_extension(alternatives, critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = made.public_bytes(serialization.Encoding.PEM) + key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _load(context, pem)
    return context, made.fingerprint(hashes.SHA256()).hex(":").upper()


def _load(context: ssl.SSLContext, pem: bytes) -> None:
    """By a file, which is the only way; only we can read it, and it is gone at once."""
    descriptor, path = tempfile.mkstemp(prefix="tacit-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(pem)
        context.load_cert_chain(path)
    finally:
        Path(path).unlink()


def qr_lines(text: str) -> str | None:
    """Return a QR code for a terminal, black on white by ANSI colours, two modules a letter; None without segno."""
    try:
        import segno
    except ModuleNotFoundError:
        return None
    rows = [list(row) for row in segno.make(text, error="m", micro=False).matrix_iter(border=_QUIET_ZONE)]
    rows += [[0] * len(rows[0])] * (len(rows) % 2)
    letters = {(0, 0): " ", (1, 0): "▀", (0, 1): "▄", (1, 1): "█"}
    out = io.StringIO()
    for upper, lower in zip(rows[::2], rows[1::2], strict=True):
        drawn = "".join(letters[(bool(top), bool(bottom))] for top, bottom in zip(upper, lower, strict=True))
        out.write(f"\x1b[30;107m{drawn}\x1b[0m\n")
    return out.getvalue()
