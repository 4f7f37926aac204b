"""`tacit deploy check`: what is wrong with a deployment on this machine, in plain words, and what mends it."""

from __future__ import annotations

import shutil
import stat
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tacit.edge.deploy import Deployment, read_deployment
from tacit.edge.deploy_probe import Finding, find_listener, probe_clock, probe_registration, probe_server
from tacit.edge.recipe import RecipeInvalid, RecipeRefused, load_recipe
from tacit.edge.run_folder import FolderMismatch

__all__ = ["Finding", "check_owner", "check_server", "examine"]

_PACKAGES = ("tacit", "flwr", "torch", "opacus", "dp-accounting", "cryptography")
_SOON = timedelta(days=14)
_PRIVATE = stat.S_IRWXG | stat.S_IRWXO


def examine(folder: Path, owner: str | None = None) -> list[Finding]:
    """Looks at a deployment's folder, the server's part of it or an owner's, whichever is there.

    Args:
        folder: DIR, DIR/server, or the folder of an owner.
        owner: whose node to look at; None for the server.

    Raises:
        FolderMismatch: not a deployment, or neither part of it.
        RecipeInvalid: an owner that the deployment does not know.
    """
    made = read_deployment(folder)
    if owner is None:
        for server in (folder / "server", folder):
            if (server / "superlink.sh").is_file():
                return check_server(server, made)
        raise FolderMismatch(
            f"expected the server's part in {folder}, got none; add --owner NAME on an owner's machine"
        )
    if owner not in made.owners:
        raise RecipeInvalid(f"expected one of {', '.join(made.owners)}, got {owner!r}", "--owner")
    for own in (folder / "owners" / owner, folder):
        if (own / "supernode.sh").is_file():
            return check_owner(own, made, owner)
    raise FolderMismatch(f"expected the part of {owner} in {folder}, got none; copy it here from where it was written")


def check_server(folder: Path, made: Deployment) -> list[Finding]:
    """Certificates, keys, port, recipe and owners' keys of a server.

    Args:
        folder: the server's part.
        made: of which deployment.
    """
    certificates = folder / "certificates"
    findings = [*_packages("flower-superlink"), *_certificates(certificates, made.host)]
    findings += [_private_file(certificates / "server.key"), _matching_key(certificates)]
    findings += [_recipe(folder, made), *_node_keys(folder, made)]
    listener = find_listener(made.port)
    findings.append(listener)
    if listener.status == "warn":  # somebody listens: ours, or another's
        findings += probe_server("localhost", made.port, certificates / "ca.crt", listening=True)
    return findings


def check_owner(folder: Path, made: Deployment, owner: str) -> list[Finding]:
    """Keys, policy, data, home and the way to the server of an owner's node.

    Args:
        folder: the owner's part.
        made: of which deployment.
        owner: whose.
    """
    findings = [*_packages("flower-supernode"), _private_file(folder / "node.key"), _node_key(folder)]
    authority, found = _certificate(folder / "ca.crt", "CA certificate")
    findings.append(found)
    if authority is not None:
        findings.append(_dates("CA certificate", authority))
    findings += [_recipe(folder, made), *_owner_side(made, owner)]
    reached = probe_server(made.host, made.port, folder / "ca.crt")
    findings += reached
    if all(one.status == "ok" for one in reached):
        findings += [probe_clock(made.host, made.port, folder / "ca.crt")]
        findings += [probe_registration(made.host, made.port, folder / "ca.crt", folder / "node.key")]
    return findings


def _packages(command: str) -> Iterator[Finding]:
    missing = []
    for name in _PACKAGES:
        try:
            version(name)
        except PackageNotFoundError:
            missing.append(name)
    hint = "pip install 'tacit[federated]' into the environment that VENV names"
    if missing:
        yield Finding("packages", "fail", f"missing: {', '.join(missing)}", hint, resource=True)
    else:
        yield Finding("packages", "ok", ", ".join(f"{name} {version(name)}" for name in ("tacit", "flwr", "torch")))
    if shutil.which(command) is None and not Path(sys.executable).with_name(command).is_file():
        yield Finding("command", "fail", f"{command} is not in PATH", hint, resource=True)


def _certificate(path: Path, name: str) -> tuple[x509.Certificate | None, Finding]:
    hint = f"copy {path.name} again from where the deployment was written"
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
    except FileNotFoundError:
        return None, Finding(name, "fail", f"no {path}", hint)
    except (OSError, ValueError) as error:
        return None, Finding(name, "fail", f"{path} cannot be read: {_line(error)}", hint)
    return certificate, Finding(name, "ok", certificate.subject.rfc4514_string())


def _certificates(folder: Path, host: str) -> Iterator[Finding]:
    """Chain, dates and name of the server's certificate."""
    anew = "deploy into a new folder: keys and certificates are never replaced in place"
    authority, found = _certificate(folder / "ca.crt", "CA certificate")
    yield found
    server, found = _certificate(folder / "server.pem", "server certificate")
    yield found
    for name, one in (("CA certificate", authority), ("server certificate", server)):
        if one is not None:
            yield _dates(name, one)
    if server is None or authority is None:
        return
    try:
        server.verify_directly_issued_by(authority)
        yield Finding("certificate chain", "ok", "the server's certificate is signed by this CA")
    except (InvalidSignature, ValueError, TypeError):
        yield Finding("certificate chain", "fail", "the server's certificate is not signed by this CA", anew)
    if host in _names(server):
        yield Finding("host name", "ok", f"the certificate names {host}")
    else:
        yield Finding("host name", "fail", f"the certificate names {', '.join(_names(server))}, not {host}", anew)


def _names(certificate: x509.Certificate) -> list[str]:
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [*found.get_values_for_type(x509.DNSName), *map(str, found.get_values_for_type(x509.IPAddress))]


def _dates(name: str, certificate: x509.Certificate) -> Finding:
    now, first, last = datetime.now(UTC), certificate.not_valid_before_utc, certificate.not_valid_after_utc
    what = f"{name}, dates"
    if now < first:
        found = f"valid only from {first:%Y-%m-%d %H:%M} UTC; this clock says {now:%Y-%m-%d %H:%M} UTC"
        return Finding(what, "fail", found, "set this machine's clock: sudo timedatectl set-ntp true")
    if now > last:
        hint = "deploy into a new folder for new certificates; if the date is wrong: sudo timedatectl set-ntp true"
        return Finding(what, "fail", f"expired on {last:%Y-%m-%d}; this clock says {now:%Y-%m-%d}", hint)
    if last - now < _SOON:
        return Finding(what, "warn", f"expires on {last:%Y-%m-%d}", "deploy into a new folder before that day")
    return Finding(what, "ok", f"until {last:%Y-%m-%d}")


def _private_file(path: Path) -> Finding:
    name = f"{path.name}, permissions"
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return Finding(name, "fail", f"no {path}", "copy it from where the deployment was written")
    if mode & _PRIVATE:
        found = f"others may open {path} ({stat.filemode(mode)})"
        return Finding(name, "fail", found, f"chmod 600 {path}", resource=True)
    return Finding(name, "ok", "its user's alone")


def _matching_key(folder: Path) -> Finding:
    name, hint = "server.key", "copy server.pem and server.key together from where the deployment was written"
    try:
        key = serialization.load_pem_private_key((folder / "server.key").read_bytes(), None)
        certificate = x509.load_pem_x509_certificate((folder / "server.pem").read_bytes())
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        return Finding(name, "fail", f"cannot be read: {_line(error)}", hint)
    if key.public_key() != certificate.public_key():
        return Finding(name, "fail", "is not the key of server.pem", hint)
    return Finding(name, "ok", "is the key of server.pem")


def _node_key(folder: Path) -> Finding:
    hint = "copy node.key and node.key.pub together from where the deployment was written"
    try:
        key = serialization.load_ssh_private_key((folder / "node.key").read_bytes(), None)
        public = serialization.load_ssh_public_key((folder / "node.key.pub").read_bytes())
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        return Finding("node.key", "fail", f"cannot be read: {_line(error)}", hint)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != public:
        return Finding("node.key", "fail", "is not the key of node.key.pub", hint)
    return Finding("node.key", "ok", "is the key of node.key.pub")


def _node_keys(folder: Path, made: Deployment) -> Iterator[Finding]:
    missing = [owner for owner in made.owners if not (folder / "nodes" / f"{owner}.pub").is_file()]
    if missing:
        hint = "copy nodes/ again from where the deployment was written"
        yield Finding("owners' public keys", "fail", f"missing: {', '.join(missing)}", hint)
    else:
        yield Finding("owners' public keys", "ok", ", ".join(made.owners))


def _recipe(folder: Path, made: Deployment) -> Finding:
    hint = "copy recipe.toml again from where the deployment was written"
    try:
        found = load_recipe(folder / "recipe.toml").digest()
    except (RecipeInvalid, RecipeRefused) as error:
        return Finding("recipe", "fail", _line(error), hint)
    if found != made.recipe:
        return Finding("recipe", "fail", f"its digest is {found[:16]}…, the deployment's {made.recipe[:16]}…", hint)
    return Finding("recipe", "ok", found)


def _owner_side(made: Deployment, owner: str) -> Iterator[Finding]:
    """The policy, the data it names, and the folder of ledgers."""
    from tacit.federated.home import home_folder, owner_folder
    from tacit.federated.policy import PolicyInvalid, load_policy

    home = home_folder()
    try:
        policy = load_policy(home / "owner.toml")
    except FileNotFoundError:
        hint = f"export TACIT_HOME=FOLDER, the one with owner.toml; it is {home} now"
        yield Finding("owner.toml", "fail", f"no {home / 'owner.toml'}", hint)
        return
    except PolicyInvalid as error:
        yield Finding("owner.toml", "fail", f"{error.where}: {error}", "correct that line")
        return
    if policy.owner != owner:
        yield Finding("owner.toml", "fail", f"is {policy.owner}'s, not {owner}'s", "set TACIT_HOME to the right folder")
    terms = policy.terms_of(made.task)
    if terms.recipes is not None and made.recipe not in terms.recipes:
        found = f"does not accept the recipe {made.recipe[:16]}…"
        yield Finding("owner.toml", "fail", found, f'add "{made.recipe}" to recipes, if you accept it')
    else:
        yield Finding("owner.toml", "ok", f"accepts the recipe, up to epsilon {terms.epsilon:g}")
    yield _data(policy.data, made)
    try:
        folder = owner_folder(home, owner)
        (folder / ".check").write_bytes(b"")
        (folder / ".check").unlink()
        yield Finding("home", "ok", str(home.resolve()))
    except OSError as error:
        hint = f"give this user the folder: chown -R $USER {home} && chmod -R go-rwx {home}"
        yield Finding("home", "fail", f"cannot be written: {_line(error)}", hint, resource=True)


def _data(path: Path | None, made: Deployment) -> Finding:
    if not made.described:
        if path is None:
            return Finding("data", "ok", f"the task {made.task!r} finds them itself")
        return Finding("data", "fail", f"the task {made.task!r} takes no [data]", "take [data] out of owner.toml")
    if path is None:
        return Finding("data", "fail", "owner.toml names no file", 'add:  [data]  path = "FILE"')
    try:
        if path.is_dir():
            next(path.iterdir(), None)
        else:
            path.open("rb").close()
    except OSError as error:
        return Finding(
            "data", "fail", f"{path}: {_line(error)}", "put your file there, or correct path in [data]", True
        )
    return Finding("data", "ok", str(path))


def _line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
