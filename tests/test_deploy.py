"""`tacit deploy` without a network: what is written, what is refused, and every complaint of `tacit deploy check`."""

import contextlib
import json
import os
import shutil
import socket
import ssl
import stat
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Context, RecordDict

from tacit.edge import deploy_check, deploy_keys, deploy_run, flower_app
from tacit.edge.calibrations import recall
from tacit.edge.composition import compose
from tacit.edge.deploy import deploy, read_deployment
from tacit.edge.deploy_check import examine
from tacit.edge.deploy_keys import KeyPresent, make_certificates, make_node_key
from tacit.edge.deploy_probe import probe_server
from tacit.edge.deploy_run import run_deployed
from tacit.edge.deployed_card import deployed_card
from tacit.edge.owner_process import pin_app
from tacit.edge.planning import mechanism_of
from tacit.edge.progress import Silent
from tacit.edge.recipe import RecipeInvalid, load_recipe
from tacit.edge.run_folder import FolderMismatch, RunFolder
from tacit.federated.accounting import epsilon_pld
from tacit.federated.accounts import read_ledger
from tacit.federated.chain import ChainDamaged
from tacit.federated.mechanism import PrivacyRefused
from tacit.federated.policy import load_policy
from tacit.federated.task import DataProblem
from tacit.federated.turns import Reservation

TACIT = Path(sys.executable).with_name("tacit")
FIXED = ["privacy.noise_multiplier=1.5", "compression.variants=[]", "federated.rounds=2"]  # nothing to calibrate
OWNERS = ["anna", "ben", "carl"]
HEADER = "height,weight,kind\n"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A deployment that tests copy and spoil."""
    folder = tmp_path_factory.mktemp("deployed") / "written"
    deploy(folder, recipe="digits", host=f"localhost:{free_port()}", owners=OWNERS, overrides=FIXED)
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    copy = tmp_path / "deployment"
    shutil.copytree(written, copy)
    monkeypatch.setenv("TACIT_HOME", str(copy / "owners" / "anna"))
    return copy


def complaints(folder: Path, owner: str | None = None) -> dict[str, str]:
    """What failed, by name; that no server runs is left out for an owner."""
    found = {one.name: f"{one.found}; {one.hint}" for one in examine(folder, owner) if one.status == "fail"}
    if owner is not None:
        assert "cannot be reached" in found.pop("server")
    return found


# What is written.


def test_private_keys_are_their_users_alone_and_lie_only_where_they_are_used(written):
    private = {
        p.relative_to(written).as_posix() for p in written.rglob("*") if p.name in ("ca.key", "server.key", "node.key")
    }
    assert private == {"ca.key", "server/certificates/server.key", *(f"owners/{o}/node.key" for o in OWNERS)}
    assert {stat.S_IMODE((written / name).stat().st_mode) for name in private} == {0o600}
    assert stat.S_IMODE((written / "owners" / "anna").stat().st_mode) == 0o700
    assert "PRIVATE" not in "".join(
        p.read_text() for p in (written / "owners").rglob("*") if p.is_file() and p.name != "node.key"
    )


def test_the_servers_certificate_holds_for_its_name_and_is_signed_by_the_ca(written):
    folder = written / "server" / "certificates"
    authority, server = (x509.load_pem_x509_certificate((folder / n).read_bytes()) for n in ("ca.crt", "server.pem"))
    server.verify_directly_issued_by(authority)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost"]
    assert authority.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert (written / "owners" / "ben" / "ca.crt").read_bytes() == (folder / "ca.crt").read_bytes()


@pytest.mark.parametrize(("host", "name"), [("fl.example.org", "fl.example.org"), ("10.1.2.3", "10.1.2.3")])
def test_a_certificate_names_a_host_as_what_it_is(tmp_path, host, name):
    make_certificates(tmp_path / "c", host, ca_key=tmp_path / "ca.key", days=3)
    certificate = x509.load_pem_x509_certificate((tmp_path / "c" / "server.pem").read_bytes())
    assert deploy_check._names(certificate)[:1] == [name] or name in deploy_check._names(certificate)
    assert timedelta(days=2.9) < certificate.not_valid_after_utc - datetime.now(UTC) < timedelta(days=3.1)


def test_node_keys_are_p384_in_the_form_that_flower_reads(written):
    keys = []
    for owner in OWNERS:
        folder = written / "owners" / owner
        key = serialization.load_ssh_private_key((folder / "node.key").read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        assert isinstance(key.curve, ec.SECP384R1)
        assert (
            serialization.load_ssh_public_key((written / "server" / "nodes" / f"{owner}.pub").read_bytes())
            == key.public_key()
        )
        keys.append(key.public_key())
    assert all(keys[0] != other for other in keys[1:])


def test_no_placeholder_is_left_and_scripts_are_shell(written):
    for path in written.rglob("*"):
        if path.is_file() and path.suffix in (".sh", ".service", ".yaml", ".md", ".txt", ".toml"):
            text = path.read_text().replace("USER@", "").replace('"$@"', "").replace('"@owners"', "")
            assert "@" not in text, path
    for script in [*written.rglob("*.sh"), written / "owners" / "anna" / "bin" / "flwr-clientapp"]:
        assert os.access(script, os.X_OK)
        subprocess.run(["sh", "-n", script], check=True)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd")
def test_systemd_finds_nothing_wrong_with_the_units(folder):
    for unit, there in (
        (folder / "server" / "tacit-superlink.service", "/srv/tacit/server"),
        (folder / "owners" / "anna" / "tacit-supernode.service", "/srv/tacit/anna"),
    ):
        unit.write_text(unit.read_text().replace(there, str(unit.parent)))
        done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        unit.write_text(unit.read_text().replace("Restart=on-failure", "Restart=sometimes"))
        done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
        assert "sometimes" in done.stderr  # it does look


def test_compose_files_run_scripts_that_are_there_with_the_servers_port(written):
    server = yaml.safe_load((written / "server" / "compose.yaml").read_text())["services"]["superlink"]
    port = read_deployment(written).port
    assert server["ports"] == [f"{port}:{port}"]
    node = yaml.safe_load((written / "owners" / "anna" / "compose.yaml").read_text())["services"]["supernode"]
    for service, place in ((server, written / "server"), (node, written / "owners" / "anna")):
        mounted = dict(volume.split(":")[:2] for volume in service["volumes"])
        assert mounted["./"] == "/srv/tacit"
        (command,) = service["command"]
        assert (place / Path(command).relative_to("/srv/tacit")).is_file()


def test_a_template_policy_accepts_its_own_recipe_and_nothing_weaker(written):
    recipe = load_recipe(written / "server" / "recipe.toml")
    assert recipe.digest() == load_recipe(written / "owners" / "anna" / "recipe.toml").digest()
    policy = load_policy(written / "owners" / "anna" / "owner.toml")
    stated = mechanism_of(recipe).describe() | {"noise": "gaussian on a grid"}

    def accepts(change, digest=None, n=0):
        return policy.terms.refusal({**stated, **change}, recipe=digest or recipe.digest(), participations=n)

    assert accepts({}) is None
    assert accepts({}, n=1) is None
    for weaker in (
        {"noise_multiplier": 1.49},
        {"sample_rate": 0.5},
        {"steps": 2},
        {"unit": "client"},
        {"relation": "zero-out"},
    ):
        assert accepts(weaker) is not None, weaker
    assert accepts({}, digest="0" * 64) is not None
    assert accepts({}, n=2) is not None  # more often than planned


def test_running_again_adds_owners_and_replaces_no_key_and_no_policy(folder):
    made = read_deployment(folder)
    (folder / "owners" / "anna" / "owner.toml").write_text("# edited by anna\n")
    kept = {
        p: p.read_bytes()
        for p in folder.rglob("*")
        if p.suffix in (".key", ".pem", ".crt", ".pub") or p.name == "owner.toml"
    }
    again = deploy(folder, recipe="digits", host=f"localhost:{made.port}", owners=["dora"], overrides=FIXED)
    assert again.owners == ("anna", "ben", "carl", "dora")
    assert {p: p.read_bytes() for p in kept} == kept
    assert (folder / "server" / "nodes" / "dora.pub").is_file()
    assert again.recipe != made.recipe  # four owners are another recipe, which the first three have not accepted
    assert again.recipe in (folder / "owners" / "dora" / "owner.toml").read_text()


def test_a_key_that_is_there_is_never_written_over(tmp_path):
    make_node_key(tmp_path / "node.key", comment="anna")
    before = (tmp_path / "node.key").read_bytes()
    with pytest.raises(KeyPresent):
        make_node_key(tmp_path / "node.key", comment="anna")
    (tmp_path / "taken.key").write_text("mine")
    with pytest.raises(KeyPresent):
        make_certificates(tmp_path / "c", "host", ca_key=tmp_path / "taken.key", days=3)
    with pytest.raises(KeyPresent):
        deploy_keys.write_private(tmp_path / "node.key", b"other")
    assert (tmp_path / "node.key").read_bytes() == before
    assert (tmp_path / "taken.key").read_text() == "mine"


@pytest.mark.parametrize(
    ("changed", "kind"),
    [
        ({"owners": []}, RecipeInvalid),
        ({"owners": ["anna", "anna"]}, RecipeInvalid),
        ({"owners": ["../anna"]}, RecipeInvalid),
        ({"owners": ["server"]}, RecipeInvalid),
        ({"host": "a b"}, RecipeInvalid),
        ({"host": "host:0"}, RecipeInvalid),
        ({"host": "host:70000"}, RecipeInvalid),
        ({"host": "host:"}, RecipeInvalid),
        ({"days": 0}, RecipeInvalid),
        ({"overrides": ["privacy.unit=none"]}, PrivacyRefused),
    ],
)
def test_what_cannot_be_deployed_is_refused_before_anything_is_written(tmp_path, changed, kind):
    asked = {"recipe": "digits", "host": "localhost", "owners": OWNERS, "overrides": FIXED, **changed}
    with pytest.raises(kind):
        deploy(tmp_path / "new", **asked)
    assert not (tmp_path / "new").exists()


def test_a_folder_with_other_files_or_of_another_server_is_refused(folder, tmp_path):
    with pytest.raises(FolderMismatch, match="name another folder"):
        deploy(tmp_path, recipe="digits", host="localhost", owners=OWNERS, overrides=FIXED)
    with pytest.raises(FolderMismatch, match="its certificate names that one"):
        deploy(folder, recipe="digits", host="elsewhere", owners=["dora"], overrides=FIXED)


# Owners' own files.


def described(tmp_path: Path, **task: str) -> Path:
    lines = {
        "name": '"pets"', "source": '"csv"', "path": '"sample.csv"', "owner_column": '"vet"', "label": '"kind"',
        "labels": '["cat", "dog"]', "test": '"test.csv"', **task,
    }  # fmt: skip
    table = "".join(f"{key} = {value}\n" for key, value in lines.items() if value)
    (tmp_path / "sample.csv").write_text("height,weight,kind,vet\n1,2,cat,a\n3,4,dog,b\n")
    (tmp_path / "test.csv").write_text(HEADER + "1,2,cat\n3,4,dog\n")
    path = tmp_path / "pets.toml"
    path.write_text(
        f'[task]\n{table}[model]\nfamily = "mlp"\n[federated]\nowners = 2\npartition = "natural"\n'
        "[privacy]\nreference_size = 10\nsample_rate = 0.5\n"
    )
    return path


def test_a_described_task_is_deployed_without_a_path_and_with_the_same_digest_wherever_an_owners_file_lies(tmp_path):
    made = deploy(tmp_path / "d", recipe=described(tmp_path), host="localhost", owners=["anna", "ben"], overrides=FIXED)
    assert made.described
    recipe = load_recipe(tmp_path / "d" / "server" / "recipe.toml")
    assert (recipe.task.path, recipe.task.owner_column, recipe.task.features) == ("@owners", None, ["height", "weight"])
    moved = tmp_path / "elsewhere" / "anna"
    shutil.copytree(tmp_path / "d" / "owners" / "anna", moved)
    (moved / "records.csv").write_text(HEADER)
    assert load_recipe(moved / "recipe.toml").digest() == made.recipe


def test_a_deployed_server_reads_public_splits_and_no_owners_records(tmp_path):
    deploy(tmp_path / "d", recipe=described(tmp_path), host="localhost", owners=["anna", "ben"], overrides=FIXED)
    (tmp_path / "sample.csv").unlink()
    recipe = load_recipe(tmp_path / "d" / "server" / "recipe.toml")
    composition = compose(recipe, tmp_path / "run", deployed=True)
    assert composition.data.test is not None
    assert len(composition.data.test) == 2
    assert composition.data.private is None
    with pytest.raises(DataProblem, match="on the owners' own disks"):
        composition.owners[0].records()


def test_a_deployed_owner_takes_its_whole_file_and_not_before_it_is_asked_for(tmp_path):
    deploy(tmp_path / "d", recipe=described(tmp_path), host="localhost", owners=["anna", "ben"], overrides=FIXED)
    recipe = load_recipe(tmp_path / "d" / "owners" / "ben" / "recipe.toml")
    own = tmp_path / "ben.csv"
    composition = compose(recipe, tmp_path / "run", deployed=True, own_data=own)  # there is no such file yet
    own.write_text(HEADER + "5,6,dog\n7,8,dog\n9,1,dog\n")  # of one class: that is nobody's business
    assert composition.data.test is None
    assert composition.owners[1].records().labels.tolist() == [1, 1, 1]
    assert composition.owners[1].records().inputs.tolist() == [[5, 6], [7, 8], [9, 1]]


def test_declared_sizes_are_refused_because_nobody_carries_them_to_the_server(tmp_path):
    with pytest.raises(PrivacyRefused, match="nothing carries"):
        deploy(
            tmp_path / "d",
            recipe=described(tmp_path),
            host="localhost",
            owners=["anna", "ben"],
            overrides=[*FIXED, "privacy.sizes=public"],
        )


def test_a_described_task_needs_its_columns_named_or_a_file_to_read_them_from(tmp_path):
    recipe = described(tmp_path, path='"absent.csv"')
    with pytest.raises(DataProblem, match=r"task\.features"):
        deploy(tmp_path / "d", recipe=recipe, host="localhost", owners=["anna", "ben"], overrides=FIXED)


def test_a_deployed_servers_ledger_at_client_level_is_kept_without_anybodys_records(tmp_path, monkeypatch):
    monkeypatch.setenv("TACIT_HOME", str(tmp_path / "home"))
    unit = ["privacy.unit=client", "privacy.sample_rate=0.5", "privacy.reference_size=2"]
    recipe, d = described(tmp_path), tmp_path / "d"
    deploy(d, recipe=recipe, host="localhost", owners=["anna", "ben"], overrides=[*FIXED, *unit])
    composition = compose(load_recipe(d / "server" / "recipe.toml"), tmp_path / "run", deployed=True)
    (tmp_path / "run").mkdir()
    book = composition.open_book(tmp_path / "run", "r")  # records, asked for, would raise
    stated = composition.mechanism.describe()
    request = Reservation(owner="server", source="pets", run="r", round=1, body="1", mechanism=stated)
    assert type(book.reserve([request])[0]).__name__ == "Granted"
    book.close()
    entry = json.loads((tmp_path / "home" / "ledgers" / "server" / "pets.jsonl").read_text().splitlines()[0])
    assert "data" not in entry


def test_a_deployed_runs_card_states_what_was_planned_and_refuses_more_rounds_than_that(tmp_path):
    deploy(tmp_path / "d", recipe=described(tmp_path), host="localhost", owners=["anna", "ben"], overrides=FIXED)
    recipe = load_recipe(tmp_path / "d" / "server" / "recipe.toml")
    folder = RunFolder(tmp_path / "run", recipe)
    plan = compose(recipe, tmp_path / "run", deployed=True).plan
    folder.train.mkdir()
    for rounds in (2, 3):
        (folder.train / "rounds.jsonl").write_text('{"clients": 2}\n' * rounds)
        if rounds > recipe.federated.rounds:
            with pytest.raises(ChainDamaged, match="at most 2 rounds"):
                deployed_card(folder, plan, data_status="private", passes=[])
            continue
        card = deployed_card(folder, plan, data_status="private", passes=[])
        assert card["epsilon"] == epsilon_pld(plan.mechanism.plan, 1e-5)
        assert (card["scope"], card["noise"]) == ("deployed", "hardened (grid); sampler not exact, not timing-hardened")
        assert "its own disk" in str(card["statement"])
        assert "Simulated" not in str(card["statement"])
    folder.close()


def deployed_owner(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> flower_app.Owner:
    monkeypatch.setenv("TACIT_HOME", str(folder))
    flower_app._composed.cache_clear()
    config = {"recipe": "/the/servers/recipe.toml", "out": "/the/servers/run", "deployed": True, "owners": "anna,ben"}
    node = {"owner": name, "partition-id": 1, "num-partitions": 2, "recipe": str(folder / "recipe.toml")}
    return flower_app._find_owner(Context(1, 2, node, RecordDict(), config))


def test_a_deployed_owner_believes_its_own_recipe_and_keeps_everything_in_its_own_folder(tmp_path, monkeypatch):
    deploy(
        tmp_path / "d",
        recipe=described(tmp_path),
        host="localhost",
        owners=["anna", "ben"],
        overrides=[*FIXED, "federated.personal=ditto"],
    )
    home = tmp_path / "d" / "owners" / "ben"
    (home / "data").mkdir()
    (home / "data" / "records.csv").write_text(HEADER + "5,6,dog\n7,8,cat\n")
    owner = deployed_owner(home, "ben", monkeypatch)
    assert (owner.name, owner.index, owner.source) == ("ben", 1, "pets")
    assert len(owner.records()) == 2
    assert owner.mechanism.hardened
    assert home in owner.log.parents
    assert owner.kept.store is not None
    assert home in owner.kept.store.folder.parents


def test_a_deployed_owner_opens_its_ledger_as_strictly_whether_or_not_its_plan_is_computed_again(tmp_path, monkeypatch):
    deploy(tmp_path / "d", recipe=described(tmp_path), host="localhost", owners=["anna", "ben"], overrides=FIXED)
    home = tmp_path / "d" / "owners" / "ben"
    (home / "data").mkdir()
    (home / "data" / "records.csv").write_text(HEADER + "5,6,dog\n7,8,cat\n")
    outcomes = []
    for round_number in (1, 2, 3):  # two were planned
        owner = deployed_owner(home, "ben", monkeypatch)
        assert owner.gate is not None
        ledger = owner.gate.open_ledger()
        request = request_of(owner, round_number)
        outcomes.append(type(ledger.reserve([request])[0]).__name__)
        ledger.close()
    assert outcomes == ["Granted", "Granted", "Refused"]
    (account,), _, _ = read_ledger(home / "ledgers" / "ben" / "pets.jsonl")
    assert account.reserved == 2


def request_of(owner, round_number):
    return Reservation(
        owner=owner.name, source=owner.source, run="r", round=round_number, body=str(round_number),
        mechanism=owner.mechanism.describe(),
    )  # fmt: skip


# The app of the server is not run.


def test_an_owners_process_runs_the_installed_app_and_unpacks_nothing():
    from flwr.supernode.runtime import run_clientapp

    runtime = ModuleType("copy")
    vars(runtime).update(vars(run_clientapp))
    pin_app(runtime)
    runtime.install_from_fab(b"not even a FAB", skip_prompt=True)
    find_app = runtime.get_load_client_app_fn(default_app_ref="", app_path=None, multi_app=True)
    assert find_app("evil/app", "1.0", "0" * 64) is flower_app.client_app
    with pytest.raises(PermissionError):
        runtime.install_app_dependencies()


def test_the_names_that_an_owners_process_replaces_are_those_that_flower_calls():
    import inspect

    from flwr.supernode.runtime import run_clientapp

    source = inspect.getsource(run_clientapp.run_clientapp)
    for name in ("install_from_fab(", "get_project_dir(", "get_load_client_app_fn(", "install_app_dependencies("):
        assert source.count(name) == 1
    assert source.index("install_from_fab(") < source.index("load_client_app_fn(\n            run.fab_id")


# What is remembered.


def test_a_calibration_is_remembered_by_everything_it_depends_on_and_a_damaged_file_is_not_believed(tmp_path):
    figures = iter([1.0, 2.0, 3.0, 4.0])
    compute = lambda: next(figures)  # noqa: E731
    assert recall({"epsilon": 8.0}, compute, folder=tmp_path) == 1.0
    assert recall({"epsilon": 8.0}, compute, folder=tmp_path) == 1.0
    assert recall({"epsilon": 7.0}, compute, folder=tmp_path) == 2.0
    for path in tmp_path.iterdir():
        path.write_text(path.read_text().replace('"figure": ', '"figure": -'))
    assert recall({"epsilon": 8.0}, compute, folder=tmp_path) == 3.0
    for path in tmp_path.iterdir():
        path.write_text("{")
    assert recall({"epsilon": 8.0}, compute, folder=tmp_path) == 4.0


def test_a_remembered_noise_is_the_one_that_is_calibrated(tmp_path, monkeypatch):
    monkeypatch.setenv("TACIT_HOME", str(tmp_path))
    recipe = load_recipe("digits", ["federated.rounds=2", "privacy.epsilon=3"])
    fresh = mechanism_of(recipe)
    assert mechanism_of(recipe, remembered=True) == fresh == mechanism_of(recipe, remembered=True)
    assert len(list((tmp_path / "cache").iterdir())) == 1


# What check says.


def test_check_finds_nothing_wrong_in_what_was_just_written(folder):
    assert complaints(folder) == {}
    assert complaints(folder, "anna") == {}
    assert complaints(folder / "server") == {}  # each part alone, as on its own machine
    assert complaints(folder / "owners" / "anna", "anna") == {}


def sign(folder: Path, *, first: timedelta, last: timedelta, name: str = "localhost", other_ca: bool = False) -> None:
    """Another certificate in place of the server's."""
    now = datetime.now(UTC)
    key = serialization.load_pem_private_key((folder.parent.parent / "ca.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    if other_ca:
        key = ec.generate_private_key(ec.SECP384R1())
    authority = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
    server = x509.load_pem_x509_certificate((folder / "server.pem").read_bytes())
    made = (
        x509.CertificateBuilder().subject_name(server.subject).issuer_name(authority.subject)
        .public_key(server.public_key()).serial_number(1).not_valid_before(now + first).not_valid_after(now + last)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )  # fmt: skip
    (folder / "server.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))


DAY = timedelta(days=1)
SPOILT = {
    "expired": ({"first": -9 * DAY, "last": -DAY}, "server certificate, dates", "expired on"),
    "not yet": ({"first": DAY, "last": 9 * DAY}, "server certificate, dates", "valid only from"),
    "wrong name": (
        {"first": -DAY, "last": 30 * DAY, "name": "other.example"},
        "host name",
        "names other.example, not localhost",
    ),
    "wrong ca": ({"first": -DAY, "last": 30 * DAY, "other_ca": True}, "certificate chain", "not signed by this CA"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_check_names_what_is_wrong_with_a_certificate(folder, how):
    changed, name, words = SPOILT[how]
    sign(folder / "server" / "certificates", **changed)
    found = complaints(folder)
    assert words in found[name]
    assert set(found) == {name}


ANSWERS = {
    "expired": "the certificate has expired",
    "not yet": "the certificate is not valid yet",
    "wrong name": "the certificate is for another name",
    "wrong ca": "not signed by this deployment's CA",
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_node_is_told_why_it_does_not_trust_the_server(folder, how):
    certificates = folder / "server" / "certificates"
    sign(certificates, **SPOILT[how][0])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "server.pem", certificates / "server.key")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving = threading.Thread(target=shake_hands, args=(listener, context))
        serving.start()
        (finding,) = probe_server("localhost", listener.getsockname()[1], certificates / "ca.crt")
        serving.join(10)
    assert finding.status == "fail"
    assert ANSWERS[how] in finding.found
    assert finding.hint


def shake_hands(listener: socket.socket, context: ssl.SSLContext) -> None:
    connection, _ = listener.accept()
    with connection, contextlib.suppress(OSError):
        context.wrap_socket(connection, server_side=True).close()


def test_a_port_that_another_program_has_is_named(folder):
    made = read_deployment(folder)
    with socket.create_server(("", made.port)) as listener:
        serving = threading.Thread(target=lambda: listener.accept()[0].close())
        serving.start()
        found = {one.name: one for one in examine(folder)}
        serving.join(10)
    assert found["port"].status == "warn"
    assert "does not speak TLS" in found["server"].found


def test_an_unknown_host_and_a_closed_port_are_told_apart(folder):
    ca = folder / "server" / "certificates" / "ca.crt"
    (unknown,) = probe_server("no-such-host.invalid", 8000, ca)
    (closed,) = probe_server("127.0.0.1", free_port(), ca)
    assert "no machine of the name" in unknown.found
    assert "refused" in closed.found


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


SERVER = {
    "open key": (lambda f: (f / "certificates/server.key").chmod(0o644), "server.key, permissions", "others may open"),
    "no key": (lambda f: (f / "certificates/server.key").unlink(), "server.key, permissions", "no "),
    "no ca": (lambda f: (f / "certificates/ca.crt").unlink(), "CA certificate", "no "),
    "no certificate": (
        lambda f: (f / "certificates/server.pem").write_text("x"),
        "server certificate",
        "cannot be read",
    ),
    "another recipe": (lambda f: edit(f / "recipe.toml", "rounds = 2", "rounds = 3"), "recipe", "its digest is"),
    "no recipe": (lambda f: edit(f / "recipe.toml", "rounds = 2", "round = 2"), "recipe", "round"),
    "no node": (lambda f: (f / "nodes/ben.pub").unlink(), "owners' public keys", "missing: ben"),
}


@pytest.mark.parametrize("how", SERVER)
def test_check_names_what_is_wrong_with_a_servers_files(folder, how):
    spoil, name, words = SERVER[how]
    spoil(folder / "server")
    assert words in complaints(folder)[name]


NO_SUCH = 'recipes = ["' + "0" * 64 + '"] # "'
OWNER = {
    "open key": (lambda f: (f / "node.key").chmod(0o640), "node.key, permissions", "others may open"),
    "another key": (lambda f: shutil.copy(f.parent / "ben/ca.crt", f / "node.key.pub"), "node.key", "cannot be read"),
    "another's key": (lambda f: shutil.copy(f.parent / "ben/node.key", f / "node.key"), "node.key", "is not the key"),
    "no policy": (lambda f: (f / "owner.toml").unlink(), "owner.toml", "TACIT_HOME"),
    "bad policy": (lambda f: edit(f / "owner.toml", "epsilon", "epsilonn"), "owner.toml", "did you mean 'epsilon'"),
    "another's policy": (lambda f: edit(f / "owner.toml", "anna", "ben"), "owner.toml", "is ben's, not anna's"),
    "another recipe": (lambda f: edit(f / "owner.toml", 'recipes = ["', NO_SUCH), "owner.toml", "does not accept"),
    "own data": (
        lambda f: edit(f / "owner.toml", "[policy]", '[data]\npath = "x"\n[policy]'),
        "data",
        "takes no [data]",
    ),
    "no ca": (lambda f: (f / "ca.crt").write_text("x"), "CA certificate", "cannot be read"),
    "open ledgers": (lambda f: (f / "ledgers/anna").mkdir(parents=True), "home", "cannot be written"),
}


@pytest.mark.parametrize("how", OWNER)
def test_check_names_what_is_wrong_with_an_owners_files(folder, how):
    spoil, name, words = OWNER[how]
    spoil(folder / "owners" / "anna")
    found = {one.name: f"{one.found}; {one.hint}" for one in examine(folder, "anna") if one.status == "fail"}
    assert words in found[name]


def test_check_looks_for_the_file_that_a_policy_names(tmp_path, monkeypatch):
    deploy(tmp_path / "d", recipe=described(tmp_path), host="localhost", owners=["anna", "ben"], overrides=FIXED)
    home = tmp_path / "d" / "owners" / "anna"
    monkeypatch.setenv("TACIT_HOME", str(home))
    assert "no such file" in complaints(tmp_path / "d", "anna")["data"]
    (home / "data").mkdir()
    (home / "data" / "records.csv").write_text(HEADER)
    assert complaints(tmp_path / "d", "anna") == {}


def test_check_warns_before_a_certificate_expires(folder):
    sign(folder / "server" / "certificates", first=-DAY, last=5 * DAY)
    found = {one.name: one.status for one in examine(folder)}
    assert found["server certificate, dates"] == "warn"


# The command.


def tacit(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "TACIT_HOME": str(folder / "owners" / "anna")}
    return subprocess.run(
        [TACIT, *arguments], env=environment, cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )


def test_the_command_ends_with_the_federations_code_or_with_this_machines(folder):
    (folder / "server" / "certificates" / "server.key").chmod(0o644)
    done = tacit(folder, "deploy", "check", ".", "--format", "json")
    assert done.returncode == 7
    bad = [one for one in json.loads(done.stdout)["data"]["findings"] if one["status"] == "fail"]
    assert [one["name"] for one in bad] == ["server.key, permissions"]
    assert all(one["hint"] for one in bad)
    done = tacit(folder, "deploy", "check", ".", "--owner", "anna")
    assert done.returncode == 5
    assert "fail  server: localhost" in done.stdout


def test_running_without_a_server_is_one_line_and_the_federations_code(folder):
    done = tacit(folder, "deploy", "run", ".")
    assert done.returncode == 5, done.stdout + done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "superlink.sh" in errors[0]
    assert "Traceback" not in done.stderr


# A run that is watched: the answers of `flwr` and the log are those of a real one.

ANSWER = """#!/bin/sh
case "$1" in
run) %s echo '{"success": true, "run-id": "7"}' ;;
list) echo '{"success": true, "runs": [{"run-id": "7", "status": "finished:%s"}]}' ;;
esac
"""


def watch(folder: Path, monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, object]], status: str) -> list[str]:
    """What a person sees of a run that logs these rows."""
    monkeypatch.setattr(deploy_run, "_ASK_S", 0.0)
    monkeypatch.setattr(deploy_run, "_POLL_S", 0.01)
    run = folder / "server" / "run"
    run.mkdir()
    (run / "log.jsonl").write_text('{"event": "failed", "kind": "DataProblem", "failure": "of an earlier run"}\n')
    added = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "rows").write_text(added)
    script = folder / "server" / "flwr.sh"
    script.write_text(ANSWER % (f"cat {folder}/rows >> {run}/log.jsonl;", status))
    seen: list[str] = []

    class Said(Silent):
        def step(self, done: int, text: str) -> None:
            seen.append(f"{done} {text}")

        def note(self, text: str) -> None:
            seen.append(text)

    with pytest.raises(Exception) as ended:  # noqa: PT011  # its kind is what the test looks at
        run_deployed(folder, progress=Said())
    return [*seen, f"{type(ended.value).__name__}: {ended.value}"]


def test_rounds_of_a_deployed_run_are_shown_and_its_own_failure_is_the_commands(folder, monkeypatch):
    rows = [
        {"event": "round", "note": "waiting for owners: 2 of 3, 9 s left"},
        {"event": "round", "round": 1, "accuracy": 0.5},
        {"event": "failed", "kind": "PrivacyRefused", "failure": "expected budget, got exhausted; plan less"},
    ]
    assert watch(folder, monkeypatch, rows, "failed") == [
        "waiting for owners: 2 of 3, 9 s left",
        "1 accuracy 50.0%",
        "PrivacyRefused: expected budget, got exhausted; plan less",
    ]


def test_a_run_that_nothing_explains_is_the_federations_failure(folder, monkeypatch):
    (said,) = watch(folder, monkeypatch, [], "stopped")
    assert said.startswith("FederationFailed: expected a model, got a run that ended as finished:stopped; see ")


def test_an_owner_that_cannot_be_reached_is_the_federations_failure(folder, monkeypatch):
    failure = "expected at least 2 owners to be reachable, got 1 after 60 s; bring owners back"
    rows = [{"event": "failed", "kind": "FederationFailed", "failure": failure}]
    assert watch(folder, monkeypatch, rows, "failed") == [f"FederationFailed: {failure}"]
