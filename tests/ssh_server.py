"""A real OpenSSH server on the loopback, of this user, with keys of its own; and what is around it, made and ended."""

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

START_S = 10


def sshd_program() -> str:
    """The server's absolute path, which it insists on."""
    found = shutil.which("sshd", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
    if found is None:
        raise FileNotFoundError("sshd not found; these tests need it: apt-get install openssh-server")
    return found


def make_key(path: Path, kind: str = "ed25519", passphrase: str = "") -> Path:
    """A new key pair; the private one's path."""
    subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", passphrase, "-f", str(path)], check=True)
    return path


def fingerprint(key: Path) -> str:
    """As ssh-keygen shows it."""
    shown = subprocess.run(["ssh-keygen", "-lf", f"{key}.pub"], check=True, capture_output=True, text=True).stdout
    return shown.split()[1]


class SshServer:
    """``sshd -D`` with a configuration, host keys and authorized keys in one folder."""

    def __init__(
        self, folder: Path, *, kind: str = "ed25519", sftp: bool = True, wrapper: tuple[str, ...] = ()
    ) -> None:
        folder.mkdir(mode=0o700)
        self.folder, self._wrapper = folder, wrapper
        self.host_key = make_key(folder / "host", kind)
        self.key = make_key(folder / "user")
        (folder / "authorized_keys").write_bytes(Path(f"{self.key}.pub").read_bytes())
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        lines = {
            "Port": self.port,
            "ListenAddress": "127.0.0.1",
            "HostKey": self.host_key,
            "AuthorizedKeysFile": folder / "authorized_keys",
            "PidFile": folder / "pid",
            "UsePAM": "no",
            "StrictModes": "no",  # the folder of a test run lies under /tmp
            "PasswordAuthentication": "yes",  # so that asking for one would be seen
            "PermitRootLogin": "yes",
            "MaxStartups": "100",
        }
        lines |= {"Subsystem": "sftp internal-sftp"} if sftp else {}
        (folder / "config").write_text("".join(f"{name} {value}\n" for name, value in lines.items()))
        self.known_hosts = folder / "known_hosts"
        self.known_hosts.write_text(self.known_line())
        self.process: subprocess.Popen[bytes] | None = None

    def known_line(self, key: Path | None = None) -> str:
        kind, value = Path(f"{key or self.host_key}.pub").read_text().split()[:2]
        return f"[127.0.0.1]:{self.port} {kind} {value}\n"

    @property
    def target(self) -> str:
        return f"ssh:{pwd.getpwuid(os.getuid()).pw_name}@127.0.0.1:{self.port}"

    def start(self) -> None:
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # where a server of root wants to drop its rights
        configured = [sshd_program(), "-f", str(self.folder / "config")]
        forgiving = ["-o", "PerSourcePenalties=no"]  # since 9.8; before, there were no penalties
        if subprocess.run([*configured, *forgiving, "-t"], capture_output=True, check=False).returncode == 0:
            configured += forgiving
        command = [*self._wrapper, *configured, "-D", "-e"]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=log, start_new_session=True)
        limit_s = time.monotonic() + START_S
        while time.monotonic() < limit_s and self.process.poll() is None:
            with contextlib.suppress(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            time.sleep(0.02)
        raise RuntimeError(f"sshd did not start: {(self.folder / 'log').read_text()[-500:]}")

    def stop(self, *, power: bool = False) -> None:
        """End the server and every connection; with ``power``, all that runs for them too, as if that had gone."""
        if self.process is None:
            return
        begun = [pid for pid in children_of(self.process.pid) if power or command_of(pid).startswith(b"sshd")]
        for pid in [self.process.pid, *begun]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self.process = None


@contextlib.contextmanager
def running(folder: Path, **named) -> Iterator[SshServer]:
    server = SshServer(folder, **named)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def children_of(pid: int) -> list[int]:
    """Every descendant of a process."""
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split() if Path(f"/proc/{pid}").exists() else []:
        found += [int(child), *children_of(int(child))]
    return found


def command_of(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def processes_naming(text: str) -> list[int]:
    """Processes whose command line holds a text; of ours, since the text is a folder that we have made."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and text.encode() in command_of(int(entry.name)):
            found.append(int(entry.name))
    return found


@contextlib.contextmanager
def small_disk(folder: Path, size_bytes: int, options: str = "") -> Iterator[bool]:
    """A file system of its own at a folder; False, and the folder as it is, where this user may not mount one."""
    flags = ",".join(filter(None, (f"size={size_bytes}", options)))
    command = ["mount", "-t", "tmpfs", "-o", flags, "tacit-test", str(folder)]
    mounted = os.getuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)
