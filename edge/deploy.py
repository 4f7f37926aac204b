"""`tacit deploy`: a folder with everything that a server and its owners need, and the commands, in order."""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tacit.devices.durable import write_durably
from tacit.edge.deploy_keys import make_certificates, make_node_key
from tacit.edge.recipe import BUILT_IN, Recipe, RecipeInvalid, load_recipe
from tacit.edge.run_folder import FolderMismatch
from tacit.federated.task import DataProblem

if TYPE_CHECKING:
    from tacit.edge.composition import Composition

__all__ = ["Deployment", "deploy", "read_deployment"]

_TEMPLATES = BUILT_IN / "deploy"
_LICENSE = "Apache License 2.0: https://www.apache.org/licenses/LICENSE-2.0\n"
_OWNER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")
_OWN_FILES = ("csv", "parquet", "images")
_RUNTIME_PORT = (
    9094  # of the first owner's node, on its own loopback; the next has the next, so that all fit one machine
)


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """What a deployment folder says about itself.

    Attributes:
        host: name or address of the server, as nodes call it.
        port: of the server.
        owners: names in the order of their indices.
        recipe: SHA-256 of the recipe.
        task: what ledgers call the data.
        described: whether owners' records are in files of their own.
    """

    host: str
    port: int
    owners: tuple[str, ...]
    recipe: str
    task: str
    described: bool


def deploy(
    folder: Path,
    *,
    recipe: str | Path,
    host: str,
    owners: Sequence[str],
    overrides: Sequence[str] = (),
    days: int = 365,
) -> Deployment:
    """Writes a deployment, or adds owners to one; keys, certificates and owners' policies stay as they are.

    Args:
        folder: to write into.
        recipe: as `load_recipe` takes it; `federated.owners` becomes the number of owners.
        host: NAME or NAME:PORT of the server; the port is 8000 when left out.
        owners: names; of an existing deployment those to be added.
        overrides: `table.key=value` on top of the recipe.
        days: for which certificates are valid.

    Returns:
        What was written.

    Raises:
        RecipeInvalid: names, host or days that cannot be.
        FolderMismatch: a folder with other files, or a deployment of another server.
        DataProblem: a task whose records cannot lie with their owners.
        PrivacyRefused: a recipe without a guarantee, or that deployed owners cannot follow.
        KeyPresent: a key that is there and belongs to no deployment.
    """
    name, port = _parse_host(host)
    if not 1 <= days <= 3650:
        raise RecipeInvalid(f"expected 1 to 3650 days, got {days}", "--days")
    present = _present(folder, name, port)
    everybody = _everybody(present.owners if present else (), owners)
    composition = _checked(recipe, [*overrides, f"federated.owners={len(everybody)}"])
    made = Deployment(
        host=name,
        port=port,
        owners=everybody,
        recipe=composition.recipe.digest(),
        task=composition.task.name,
        described=composition.recipe.task.source is not None,
    )
    _write_server(folder / "server", made, composition.recipe, days=days)
    for index in range(len(everybody)):
        _write_owner(folder, made, index, composition)
    _fill("README.md", folder / "README.md", made)
    for place in (folder, folder / "server", *(folder / "owners" / owner for owner in everybody)):
        write_durably(place / "deployment.json", (json.dumps(vars(made), indent=1) + "\n").encode())
    return made


def read_deployment(folder: Path) -> Deployment:
    """What a deployment folder says about itself.

    Raises:
        FolderMismatch: not a deployment, or not as it was written.
    """
    path = folder / "deployment.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Deployment(**{**content, "owners": tuple(content["owners"])})
    except FileNotFoundError:
        raise FolderMismatch(
            f"expected a deployment in {folder}, got none; `tacit deploy {folder}` writes one"
        ) from None
    except (ValueError, TypeError, KeyError) as error:
        raise FolderMismatch(f"expected {path} as tacit wrote it, got another ({error}); restore it") from None


def _parse_host(host: str) -> tuple[str, int]:
    """NAME[:PORT], of a name or an IPv4 address.

    >>> _parse_host("fl.example.org"), _parse_host("10.0.0.7:9000")
    (('fl.example.org', 8000), ('10.0.0.7', 9000))
    """
    name, colon, port = host.partition(":")
    if not _HOST.fullmatch(name) or (colon and not (port.isascii() and port.isdigit() and 0 < int(port) < 65536)):
        raise RecipeInvalid(f"expected NAME or NAME:PORT with a port from 1 to 65535, got {host!r}", "--host")
    return name, int(port) if colon else 8000


def _present(folder: Path, host: str, port: int) -> Deployment | None:
    if not (folder / "deployment.json").is_file():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise FolderMismatch(f"expected a new or empty folder, got other files in {folder}; name another folder")
        return None
    present = read_deployment(folder)
    if (present.host, present.port) != (host, port):
        raise FolderMismatch(
            f"expected the server {present.host}:{present.port} of this deployment, got {host}:{port}; its certificate "
            "names that one: use another folder"
        )
    return present


def _everybody(present: Sequence[str], asked: Sequence[str]) -> tuple[str, ...]:
    for name in asked:
        if not _OWNER.fullmatch(name) or name == "server":
            raise RecipeInvalid(
                f"expected letters, digits, '_', '.' and '-', at most 64, and not 'server', got {name!r}", "--owner"
            )
    if len(set(asked)) < len(asked):
        raise RecipeInvalid(f"expected each owner once, got {', '.join(asked)}", "--owner")
    everybody = tuple(dict.fromkeys((*present, *asked)))
    if not everybody:
        raise RecipeInvalid("expected the name of each owner, got none; add --owner NAME for each", "--owner")
    return everybody


def _checked(source: str | Path, overrides: Sequence[str]) -> Composition:
    """The recipe as it is deployed, composed as the server will: what cannot work is known before a file is written."""
    from tacit.edge.composition import build_model, compose
    from tacit.federated.mechanism import PrivacyRefused

    recipe = load_recipe(source, overrides)
    if recipe.privacy.unit == "none":
        raise PrivacyRefused("expected a guarantee, got privacy.unit='none'; deployed owners answer nobody without one")
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "recipe.toml"
        path.write_text(_at_owners(recipe).to_toml(), encoding="utf-8")
        deployed = load_recipe(path)
        try:
            build_model(deployed)
        except ValueError as error:
            raise RecipeInvalid(str(error), str(source)) from None
        return compose(deployed, Path(scratch), deployed=True)


def _at_owners(recipe: Recipe) -> Recipe:
    """The same recipe with records nowhere but with owners: its digest must not depend on where they keep them.

    Raises:
        DataProblem: records that cannot be split over owners' disks.
    """
    from tacit.federated.file_data import ELSEWHERE
    from tacit.federated.readers import column_names

    task, federated = recipe.task, recipe.federated
    if task.source is None:
        return recipe
    if task.source not in _OWN_FILES:
        raise DataProblem(
            f"expected task.source among {', '.join(_OWN_FILES)} for owners' own files, got {task.source!r}"
        )
    features = task.features
    if features is None and task.source != "images":
        if not Path(str(task.path)).is_file():
            raise DataProblem(
                f"expected task.features, or a file with the same header at task.path, got neither ({task.path}); name "
                "the columns: the server has no owner's file to look into"
            )
        besides = {*([task.label] if isinstance(task.label, str) else task.label or []), task.owner_column}
        names = column_names(Path(str(task.path)), delimiter=task.delimiter or ",")
        features = [name for name in names if name not in besides]
    moved = task.model_copy(update={"path": ELSEWHERE, "owner_column": None, "features": features})
    return recipe.model_copy(update={"task": moved, "federated": federated.model_copy(update={"partition": "natural"})})


def _write_server(folder: Path, made: Deployment, recipe: Recipe, *, days: int) -> None:
    if not (folder / "certificates").is_dir():
        make_certificates(folder / "certificates", made.host, ca_key=folder.parent / "ca.key", days=days)
    (folder / "app").mkdir(exist_ok=True)
    (folder / "nodes").mkdir(exist_ok=True)
    write_durably(folder / "recipe.toml", recipe.to_toml().encode())
    for name in ("superlink.sh", "flwr.sh", "register.sh"):
        _fill(name, folder / name, made, mode=0o755)
    for name, target in (
        ("compose.yaml", "compose.yaml"),
        ("tacit-superlink.service", "tacit-superlink.service"),
        ("app.toml", "app/pyproject.toml"),
    ):
        _fill(name, folder / target, made)
    write_durably(folder / "app" / "LICENSE", _LICENSE.encode())


def _write_owner(root: Path, made: Deployment, index: int, composition: Composition) -> None:
    owner, server = made.owners[index], root / "server"
    folder = root / "owners" / owner
    (folder / "bin").mkdir(parents=True, exist_ok=True)
    for private in (folder, folder.parent):
        private.chmod(0o700)
    if not (folder / "node.key").exists():
        make_node_key(folder / "node.key", comment=owner)
    write_durably(server / "nodes" / f"{owner}.pub", (folder / "node.key.pub").read_bytes())
    write_durably(folder / "ca.crt", (server / "certificates" / "ca.crt").read_bytes())
    write_durably(folder / "recipe.toml", (server / "recipe.toml").read_bytes())
    _fill("supernode.sh", folder / "supernode.sh", made, index=index, mode=0o755)
    _fill("flwr-clientapp", folder / "bin" / "flwr-clientapp", made, index=index, mode=0o755)
    _fill("tacit-supernode.service", folder / "tacit-supernode.service", made, index=index)
    _fill("owner-compose.yaml", folder / "compose.yaml", made, index=index)
    _fill("owner.txt", folder / "README.txt", made, index=index)
    if not (folder / "owner.toml").exists():  # from then on it is the owner's own
        write_durably(folder / "owner.toml", _policy(composition, owner).encode(), mode=0o600)


def _policy(composition: Composition, owner: str) -> str:
    """An owner.toml that accepts this recipe exactly as it is, and nothing weaker."""
    plan = composition.plan
    mechanisms = [plan.mechanism, *([plan.evaluation] if plan.evaluation else [])]
    noise = min(one.noise_multiplier for one in mechanisms)
    data = '[data]\npath = "data/records.csv"    # your own file, from here; all of it is taken as yours\n\n'
    if composition.recipe.task.source == "images":
        data = '[data]\npath = "data/images"         # your own folder, from here: a folder a class\n\n'
    return (
        "# What this owner accepts. No server can change it; read it, and make it stricter where you want.\n"
        f'\n[owner]\nname = "{owner}"\n\n{data if composition.recipe.task.source else ""}[policy]\n'
        f'unit = "{plan.mechanism.unit}"\n'
        f"epsilon = {_up(composition.budget)!r}    # over all runs; your ledger refuses more\n"
        f"delta = {plan.mechanism.delta!r}\n"
        f'recipes = ["{composition.recipe.digest()}"]\n'
        f"min_noise_multiplier = {math.floor(noise * 1e4) / 1e4!r}\n"
        f"max_sample_rate = {max(one.sample_rate for one in mechanisms)!r}\n"
        f"max_steps = {max(int(str(one.describe()['steps'])) for one in mechanisms)}\n"
        f"max_participations = {sum(one.rounds for one in mechanisms)}\n"
        f"public_sizes = {str(plan.mechanism.sizes == 'public').lower()}\n"
    )


def _up(value: float) -> float:
    """Rounded up to four places: rounded down, the recipe's own plan would not fit.

    >>> _up(8.0), _up(7.99801)
    (8.0, 7.9981)
    """
    return math.ceil(value * 1e4 - 1e-9) / 1e4


def _fill(template: str, target: Path, made: Deployment, *, index: int = 0, mode: int = 0o644) -> None:
    """Writes a template with this deployment's names in place of @NAMES@."""
    places = {
        "HOST": made.host,
        "PORT": str(made.port),
        "OWNER": made.owners[index],
        "INDEX": str(index),
        "OWNERS": str(len(made.owners)),
        "RUNTIME_PORT": str(_RUNTIME_PORT + index),
        "DIGEST": made.recipe,
        "TASK": made.task,
        "NAMES": ", ".join(made.owners),
    }
    text = (_TEMPLATES / template).read_text(encoding="utf-8")
    for place, value in places.items():
        text = text.replace(f"@{place}@", value)
    write_durably(target, text.encode(), mode=mode)
