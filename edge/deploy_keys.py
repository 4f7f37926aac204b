"""Certificates and keys of a deployment: a CA, a server certificate, a P-384 key a node. None is ever replaced."""

from __future__ import annotations

import ipaddress
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

__all__ = ["KeyPresent", "make_certificates", "make_node_key", "write_private", "write_public"]

_MADE_EARLIER = timedelta(minutes=5)  # a certificate is valid a little before it was made: clocks differ


class KeyPresent(ValueError):
    """A key or certificate that is there already: replacing it would shut somebody out."""


def make_certificates(folder: Path, host: str, *, ca_key: Path, days: int) -> None:
    """Makes `ca.crt`, `server.pem` and `server.key` in a folder; the CA's key, of no use to a server, elsewhere.

    Args:
        folder: made if need be.
        host: name or address that nodes will call; `localhost` and 127.0.0.1 are always valid beside it.
        ca_key: of the CA.
        days: for which all are valid.

    Raises:
        KeyPresent: one of them is there.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as root:
    ...     folder = Path(root, "certificates")
    ...     make_certificates(folder, "fl.example.org", ca_key=Path(root, "ca.key"), days=30)
    ...     sorted(path.name for path in folder.iterdir())
    ['ca.crt', 'server.key', 'server.pem']
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for path in (ca_key, *(folder / name for name in ("ca.crt", "server.pem", "server.key"))):
        _expect_absent(path)
    authority, server = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Tacit deployment of {host}"[:64])])
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host[:64])])
    ca = (
        _certificate(issuer, issuer, authority.public_key(), days=days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(authority, hashes.SHA384())
    )
    own = (
        _certificate(subject, issuer, server.public_key(), days=days)
        .add_extension(x509.SubjectAlternativeName(_names(host)), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()), critical=False)
        .sign(authority, hashes.SHA384())
    )
    for path, key in ((ca_key, authority), (folder / "server.key", server)):
        write_private(path, _private_bytes(key, serialization.PrivateFormat.PKCS8))
    for name, certificate in (("ca.crt", ca), ("server.pem", own)):
        write_public(folder / name, certificate.public_bytes(serialization.Encoding.PEM))


def make_node_key(path: Path, *, comment: str) -> None:
    """Makes a node's key and, with `.pub`, its public half, in the OpenSSH form that SuperNodes and `flwr` read.

    Args:
        path: of the private half.
        comment: at the end of the public half.

    Raises:
        KeyPresent: one of them is there.
    """
    public = path.with_name(path.name + ".pub")
    for one in (path, public):
        _expect_absent(one)
    key = ec.generate_private_key(ec.SECP384R1())
    half = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    write_private(path, _private_bytes(key, serialization.PrivateFormat.OpenSSH))
    write_public(public, half + f" {comment}\n".encode())


def write_private(path: Path, content: bytes) -> None:
    """Writes a new file that only its user may open, from its first byte on.

    Raises:
        KeyPresent: it is there.
    """
    _write_new(path, content, 0o600)


def write_public(path: Path, content: bytes) -> None:
    """Writes a new file that everybody may read.

    Raises:
        KeyPresent: it is there.
    """
    _write_new(path, content, 0o644)


def _write_new(path: Path, content: bytes, mode: int) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError:
        _expect_absent(path)
        raise
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)


def _expect_absent(path: Path) -> None:
    if path.exists() or path.is_symlink():
        raise KeyPresent(f"expected no {path}, got one; it is never replaced: name another folder, or move it away")


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, *, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _MADE_EARLIER)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _names(host: str) -> list[x509.GeneralName]:
    """What the server may be called by; each name once."""
    given: list[x509.GeneralName] = []
    for name in dict.fromkeys((host, "localhost", "127.0.0.1")):
        try:
            given.append(x509.IPAddress(ipaddress.ip_address(name)))
        except ValueError:
            given.append(x509.DNSName(name))
    return given


def _private_bytes(key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
