import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tacit.edge.recipe import Recipe, RecipeInvalid, load_recipe
from tacit.edge.run_folder import FolderHeld, FolderMismatch, RunFolder

TACIT = Path(sys.executable).with_name("tacit")
HAND_WRITTEN = "# mine\n[federated]\nrounds = 3\n"
HOLD = "import sys; from pathlib import Path; from tacit.edge.run_folder import RunFolder; RunFolder(Path(sys.argv[1]))"


@pytest.fixture
def recipe() -> Recipe:
    return load_recipe("digits", ["federated.rounds=3"])


@contextmanager
def opened(path: Path, recipe: Recipe | None = None) -> Iterator[RunFolder]:
    folder = RunFolder(path, recipe)
    try:
        yield folder
    finally:
        folder.close()


@contextmanager
def held_by_another(path: Path) -> Iterator[subprocess.Popen[str]]:
    """A second process that has the folder open until the block ends."""
    code = HOLD.replace("RunFolder(Path", "held = RunFolder(Path") + "; print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def content(path: Path) -> dict[str, bytes]:
    return {str(found.relative_to(path)): found.read_bytes() for found in path.rglob("*") if found.is_file()}


def test_a_fresh_folder_gets_the_resolved_recipe_and_an_identity(tmp_path, recipe):
    with opened(tmp_path / "a" / "run", recipe) as folder:
        assert load_recipe(folder.path / "recipe.toml") == recipe
        assert folder.recipe == recipe
        assert len(folder.run) == 16
        assert not folder.begun
        assert not folder.trained
    assert set(content(tmp_path / "a" / "run")) == {"lock", "recipe.toml", "run.json"}


def test_two_runs_have_two_identities_and_one_run_keeps_its_own(tmp_path, recipe):
    with opened(tmp_path / "a", recipe) as first, opened(tmp_path / "b", recipe) as second:
        assert first.run != second.run
    with opened(tmp_path / "a", recipe) as again, opened(tmp_path / "b") as without_recipe:
        assert (again.run, again.created) == (first.run, first.created)
        assert without_recipe.run == second.run
        assert without_recipe.recipe == recipe


def test_opening_again_changes_nothing_but_the_lock(tmp_path, recipe):
    with opened(tmp_path, recipe):
        before = content(tmp_path)
    with opened(tmp_path, recipe):
        assert content(tmp_path) == before


def test_a_hand_written_recipe_is_kept_beside_the_resolved_one(tmp_path):
    (tmp_path / "recipe.toml").write_text(HAND_WRITTEN)
    with opened(tmp_path) as folder:
        assert folder.recipe.federated.rounds == 3
        assert (tmp_path / "recipe.toml").read_text() == folder.recipe.to_toml()
        assert (tmp_path / "recipe.original.toml").read_text() == HAND_WRITTEN
    with opened(tmp_path):
        assert (tmp_path / "recipe.original.toml").read_text() == HAND_WRITTEN


def test_a_recipe_that_says_the_same_in_other_words_is_the_folders_own(tmp_path):
    (tmp_path / "recipe.toml").write_text(HAND_WRITTEN)
    with opened(tmp_path, load_recipe("digits", ["federated.rounds=3"])) as folder:
        assert folder.recipe.federated.rounds == 3


def test_another_recipe_is_refused_by_the_keys_that_differ(tmp_path, recipe):
    (tmp_path / "train").mkdir()
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    with opened(tmp_path, recipe):
        before = content(tmp_path)
    other = load_recipe("digits", ["federated.rounds=4", "privacy.epsilon=2.0"])
    with pytest.raises(FolderMismatch, match=r"differs in federated\.rounds, privacy\.epsilon\)"):
        RunFolder(tmp_path, other)
    assert content(tmp_path) == before


def test_many_differences_are_cut_short(tmp_path, recipe):
    with opened(tmp_path, recipe) as folder:
        folder.train.mkdir()
    keys = ["rounds=4", "seed=5", "alpha=1.0", "learning_rate=0.1", "local_steps=2"]
    with pytest.raises(FolderMismatch, match=r"\(differs in ([a-z_.]+, ){3}\.\.\.\)"):
        RunFolder(tmp_path, load_recipe("digits", [f"federated.{key}" for key in keys]))


def test_a_refusal_gives_the_lock_back(tmp_path, recipe):
    with opened(tmp_path, recipe) as folder:
        folder.train.mkdir()
    for _ in range(3):
        with pytest.raises(FolderMismatch):
            RunFolder(tmp_path, load_recipe("digits"))
    with opened(tmp_path, recipe):
        pass


@pytest.mark.parametrize("name", ["notes.txt", "ledger.jsonl", "sub/file"])
def test_a_folder_with_somebody_elses_files_is_refused_and_left_alone(tmp_path, recipe, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("precious")
    with pytest.raises(FolderMismatch, match="other files"):
        RunFolder(tmp_path, recipe)
    assert content(tmp_path) == {name: b"precious"}


@pytest.mark.parametrize("path", ["", "missing", "missing/below"])
def test_a_folder_without_a_recipe_is_refused_and_not_made(tmp_path, path):
    with pytest.raises(FolderMismatch, match="tacit init"):
        RunFolder(tmp_path / path)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_recipe_in_the_folder_is_refused_with_its_line_and_frees_the_lock(tmp_path, recipe):
    (tmp_path / "recipe.toml").write_text("[federated]\nrounds = 0\n")
    for _ in range(2):
        with pytest.raises(RecipeInvalid) as caught:
            RunFolder(tmp_path, recipe)
        assert caught.value.where.endswith("recipe.toml:2:1")


# Crashes between the steps of opening.


def test_a_folder_with_only_a_lock_is_adopted(tmp_path, recipe):
    (tmp_path / "lock").touch()
    with opened(tmp_path, recipe) as folder:
        assert folder.recipe == recipe


def test_a_folder_without_its_identity_gets_one(tmp_path, recipe):
    with opened(tmp_path, recipe):
        pass
    (tmp_path / "run.json").unlink()
    with opened(tmp_path) as folder:
        assert len(folder.run) == 16


@pytest.mark.parametrize("torn", ["", "{", '{"run": ', "[]", "null"])
def test_a_json_file_that_is_not_whole_reads_as_absent(tmp_path, recipe, torn):
    with opened(tmp_path, recipe) as folder:
        (tmp_path / "torn.json").write_text(torn)
        assert folder.read_json("torn.json") is None
        assert folder.read_json("missing", "file.json") is None


def test_what_is_written_is_whole_and_leaves_no_other_file(tmp_path, recipe):
    with opened(tmp_path, recipe) as folder:
        before = set(content(tmp_path))
        folder.write_json({"ε": [1, None, "a\nb"]}, "new", "file.json")
        assert folder.read_json("new", "file.json") == {"ε": [1, None, "a\nb"]}
        assert set(content(tmp_path)) == before | {"new/file.json"}
        with pytest.raises(ValueError, match="JSON"):
            folder.write_json({"accuracy": float("nan")}, "new", "file.json")
        assert folder.read_json("new", "file.json") == {"ε": [1, None, "a\nb"]}


def test_wall_time_adds_up_over_sessions(tmp_path, recipe):
    for _ in range(2):
        with opened(tmp_path, recipe) as folder:
            folder.add_wall_time("train", -1e9)
            identity = folder.run
    with opened(tmp_path) as folder:
        assert folder.wall_s()["train"] > 2e9
        assert folder.run == identity


# Locks.


def test_a_folder_in_use_by_another_process_is_refused_by_its_number(tmp_path, recipe):
    with opened(tmp_path, recipe):
        pass
    with held_by_another(tmp_path) as holder:
        with pytest.raises(FolderHeld, match=f"in use by process {holder.pid};"):
            RunFolder(tmp_path, recipe)
        done = subprocess.run([TACIT, "report", tmp_path], capture_output=True, text=True)
        assert done.returncode == 5
        assert f"in use by process {holder.pid}" in done.stderr
    with opened(tmp_path, recipe):
        pass


def test_a_folder_that_is_open_here_is_refused_to_a_second_opening_here(tmp_path, recipe):
    with opened(tmp_path, recipe), pytest.raises(FolderHeld):
        RunFolder(tmp_path, recipe)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_holder_that_was_killed_leaves_a_free_folder(tmp_path, recipe, how):
    with opened(tmp_path, recipe):
        pass
    with held_by_another(tmp_path) as holder:
        holder.send_signal(how)
        holder.wait()
        with opened(tmp_path, recipe):
            assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"


def test_an_own_lock_of_a_larger_process_number_is_overwritten_whole(tmp_path, recipe):
    (tmp_path / "lock").write_text("4194304123\n")
    with opened(tmp_path, recipe):
        assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"


# Folders that cannot be written.


def test_a_path_below_a_file_is_code_7(tmp_path, recipe):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="directory"):
        RunFolder(tmp_path / "file" / "run", recipe)
    for command in (["run", "--out"], ["init"]):
        done = subprocess.run([TACIT, *command, tmp_path / "file" / "run"], capture_output=True, text=True)
        assert (done.returncode, len(done.stderr.splitlines())) == (7, 1), done.stderr


def test_a_folder_in_which_nothing_was_done_takes_another_recipe(tmp_path, recipe):
    with opened(tmp_path, recipe):
        pass
    with opened(tmp_path, load_recipe("digits")) as folder:
        assert folder.recipe.digest() == load_recipe("digits").digest()


def test_a_hand_written_recipe_is_never_replaced(tmp_path):
    (tmp_path / "recipe.toml").write_text(HAND_WRITTEN)
    with pytest.raises(FolderMismatch, match="differs"):
        RunFolder(tmp_path, load_recipe("digits"))
    assert (tmp_path / "recipe.toml").read_text() == HAND_WRITTEN


def test_an_edited_recipe_does_not_pass_for_the_one_that_was_trained(tmp_path, recipe):
    with opened(tmp_path, recipe) as folder:
        folder.train.mkdir()
        folder.bind()
    held = tmp_path / "recipe.toml"
    held.write_text(held.read_text().replace("learning_rate = 0.25", "learning_rate = 0.5", 1))
    with pytest.raises(FolderMismatch, match="edited"):
        RunFolder(tmp_path)


def test_a_file_in_place_of_the_folder_is_code_2(tmp_path):
    (tmp_path / "file").write_text("x")
    done = subprocess.run([TACIT, "run", "--out", tmp_path / "file"], capture_output=True, text=True)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission_is_code_7(tmp_path):
    tmp_path.chmod(0o555)
    done = subprocess.run([TACIT, "run", "--out", tmp_path / "run"], capture_output=True, text=True)
    tmp_path.chmod(0o755)
    assert (done.returncode, len(done.stderr.splitlines())) == (7, 1), done.stderr
    assert "permission" in done.stderr


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="needs a read-only file system")
def test_a_file_system_that_takes_no_files_is_code_7():
    done = subprocess.run([TACIT, "run", "--out", "/sys/kernel/tacit-run"], capture_output=True, text=True)
    assert (done.returncode, len(done.stderr.splitlines())) == (7, 1), done.stderr
