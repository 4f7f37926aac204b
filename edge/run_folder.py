"""The run directory: whose it is, who is using it, and what it holds."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from tacit.devices.durable import write_durably
from tacit.edge.recipe import Recipe, RecipeInvalid, load_recipe

__all__ = ["FolderHeld", "FolderMismatch", "RunFolder"]


_VOID = "guarantee-void"


class FolderHeld(RuntimeError):
    """Another run is using the folder."""


class FolderMismatch(ValueError):
    """A folder that is not this recipe's, or not a run at all."""


class RunFolder:
    """An open run directory, locked until `close`.

    Attributes:
        path: the directory.
        recipe: resolved.
        run: the run's identity, made once and kept.
        unsafe_seed: of batches and noise in a run whose guarantee is void; None in every other.
    """

    def __init__(self, path: Path, recipe: Recipe | None = None, *, unsafe_seed: int | None = None) -> None:
        """Makes or opens a run directory.

        Args:
            path: the directory.
            recipe: the run's; None to take the one that the directory holds.
            unsafe_seed: of a new run whose guarantee is void; a folder that has begun keeps its own.

        Raises:
            FolderMismatch: it holds another recipe or seed, or other files and no recipe.
            FolderHeld: another process is using it.
            OSError: it cannot be written.
        """
        self.path = path
        if unsafe_seed is not None and _VOID not in path.name:
            raise FolderMismatch(
                f"expected {_VOID!r} in the name of a folder for --unsafe-seed, got {path}; name it {path}.{_VOID}"
            )
        if path.exists() and not path.is_dir():
            raise FolderMismatch(f"expected a folder, got the file {path}; name another --out")
        held = path / "recipe.toml"
        if recipe is None and not held.is_file():
            raise FolderMismatch(f"expected a run folder with a recipe.toml, got {path}; `tacit init {path}` makes one")
        if path.is_dir() and not held.is_file() and any(found.name != "lock" for found in path.iterdir()):
            raise FolderMismatch(f"expected an empty folder or a run's, got other files in {path}; name another --out")
        path.mkdir(parents=True, exist_ok=True)
        self._lock()
        self.recipe = self._adopt(recipe)
        about = self._about()
        self.run, self.created = str(about["run"]), str(about["created"])
        self.unsafe_seed = self._void(about, unsafe_seed)
        if about.get("recipe") not in (None, self.recipe.digest()):
            self.close()
            raise FolderMismatch(
                f"expected the recipe that {path} was trained with, got an edited recipe.toml; undo the edit, or name "
                "another --out"
            )

    @property
    def train(self) -> Path:
        """Where training keeps its files."""
        return self.path / "train"

    @property
    def trained(self) -> bool:
        """Whether training is over."""
        return (self.train / "weights.safetensors").is_file()

    @property
    def begun(self) -> bool:
        """Whether training has begun."""
        return self.train.is_dir()

    def read_json(self, *parts: str) -> dict[str, object] | None:
        """A JSON file below the folder, or None when it is not there or not whole."""
        try:
            content = json.loads(self.path.joinpath(*parts).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return content if isinstance(content, dict) else None

    def read_rounds(self, *below: str) -> list[dict[str, object]]:
        """The rows of rounds.jsonl below train/, oldest first; none when it is not there."""
        path = self.train.joinpath(*below, "rounds.jsonl")
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def write_json(self, content: Mapping[str, object], *parts: str) -> Path:
        """Writes a JSON file below the folder, durably."""
        path = self.path.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
        return path

    def log(self, event: str, **fields: object) -> None:
        """Appends a line to log.jsonl."""
        # At client level a round's time would tell how many took part.
        timespec = "hours" if self.recipe.privacy.unit == "client" else "milliseconds"
        line = {"at": datetime.now(UTC).isoformat(timespec=timespec), "event": event, **fields}
        with (self.path / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, default=str) + "\n")

    def add_wall_time(self, stage: str, started: float) -> None:
        """Adds the seconds since `started` (monotonic) to what a stage has taken so far."""
        about = self._about()
        wall_s = about.get("wall_s")
        spent: dict[str, float] = dict(wall_s) if isinstance(wall_s, dict) else {}
        spent[stage] = round(spent.get(stage, 0.0) + time.monotonic() - started, 2)
        self.write_json({**about, "wall_s": spent}, "run.json")

    def wall_s(self) -> dict[str, float]:
        """Seconds that each stage has taken, over all sessions."""
        spent = self._about().get("wall_s")
        return dict(spent) if isinstance(spent, dict) else {}

    def bind(self) -> None:
        """From here on the folder is this recipe's: called when training begins."""
        self.write_json({**self._about(), "recipe": self.recipe.digest()}, "run.json")

    def named(self, name: str) -> str:
        """A file's name, which says so when the run's guarantee is void."""
        stem, dot, ending = name.rpartition(".")
        return name if self.unsafe_seed is None else f"{stem}.{_VOID}{dot}{ending}"

    def close(self) -> None:
        """Gives the lock back."""
        os.close(self._descriptor)

    def _void(self, about: Mapping[str, object], asked: int | None) -> int | None:
        """The seed that voids the run, from its beginning to its end; a run that began without one never gets one."""
        kept = about.get("unsafe_seed")
        if asked is None or asked == kept:
            return kept if isinstance(kept, int) else None
        if self.begun:
            self.close()
            raise FolderMismatch(
                f"expected --unsafe-seed to be as at the run's beginning, got {asked} for {kept}; name another --out"
            )
        self.write_json({**about, "unsafe_seed": asked}, "run.json")
        return asked

    def _lock(self) -> None:
        self._descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(self._descriptor, 32).decode(errors="replace").strip()
            os.close(self._descriptor)
            raise FolderHeld(
                f"expected a free folder, got {self.path} in use by process {owner or '?'}; wait for it or name another"
            ) from None
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)

    def _adopt(self, recipe: Recipe | None) -> Recipe:
        """Compares recipes and leaves the resolved one in the folder, a hand-written one beside it."""
        held = self.path / "recipe.toml"
        if held.is_file():
            try:
                present = load_recipe(held)
            except RecipeInvalid:
                self.close()
                raise
            differs = recipe is not None and recipe.digest() != present.digest()
            ours = held.read_text(encoding="utf-8") == present.to_toml()
            if recipe is not None and differs and ours and not self.begun:
                write_durably(held, recipe.to_toml().encode())  # nothing was done by the other one, and nobody wrote it
                return recipe
            if recipe is not None and recipe.digest() != present.digest():
                self.close()
                raise FolderMismatch(
                    f"expected a folder of this recipe, got {self.path} of another "
                    f"({_differences(recipe, present)}); name another --out"
                )
            recipe = present
            if held.read_text(encoding="utf-8") != recipe.to_toml():
                write_durably(self.path / "recipe.original.toml", held.read_bytes())
                write_durably(held, recipe.to_toml().encode())
        if recipe is None:
            raise FolderMismatch(f"expected a recipe for {self.path}, got none")
        if not held.is_file():
            write_durably(held, recipe.to_toml().encode())
        return recipe

    def _about(self) -> dict[str, object]:
        about = self.read_json("run.json")
        if about is None or not {"run", "created"} <= set(about):
            about = {"run": secrets.token_hex(8), "created": datetime.now(UTC).isoformat(timespec="seconds")}
            self.write_json(about, "run.json")
        return about


def _differences(first: Recipe, second: Recipe) -> str:
    """The keys in which two recipes differ, at most three of them."""
    one, other = first.model_dump(), second.model_dump()
    keys = [f"{table}.{key}" for table in one for key in one[table] if one[table][key] != other[table].get(key)]
    return "differs in " + ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
