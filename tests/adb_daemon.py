"""A phone for tests: a device daemon that speaks the ADB transport over TCP, and an adb server of the tests' own.

What the phone is asked in its shell is run by a real ``/bin/sh``, whose ``getprop``, ``dumpsys``, ``cmd``, ``taskset``
and ``run-as`` are scripts of this file; in the place of benchmark_model ``taskset`` runs what a test has written into
``tool``. Termux is there once ``install_termux`` has put it there, with this computer's own Python.
"""

import contextlib
import itertools
import os
import queue
import shlex
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

_VERSION, _MAX_DATA = 0x01000001, 1 << 18
_FEATURES = "shell_v2,cmd"
_STDOUT, _STDERR, _EXIT, _CLOSE_STDIN = 1, 2, 3, 4
_SCRIPTS = {
    "getprop": 'cat "$PHONE/props/$1" 2>/dev/null; echo',
    "dumpsys": 'cat "$PHONE/dumpsys/$1"',
    "cmd": 'echo "$*" >> "$PHONE/power.log"; exit "$(cat "$PHONE/power.exit")"',
    "taskset": """echo "$*" >> "$PHONE/runs.log"
        test "$1" = -p && exit "$(cat "$PHONE/pin.exit")"
        shift; test -x "$1" || exit 126; exec sh "$PHONE/tool" "$@\"""",
    # As AOSP's run-as.cpp: it goes to the app's folder and becomes the command.
    "run-as": """test -d "$PHONE/apps/$1" || { echo "run-as: unknown package: $1" >&2; exit 1; }
        test -e "$PHONE/debuggable" || { echo "run-as: package not debuggable: $1" >&2; exit 1; }
        cd "$PHONE/apps/$1"; shift; exec "$@\"""",
}
_PROPS = {
    "ro.product.manufacturer": "Tested",
    "ro.product.model": "Phone 7",
    "ro.soc.manufacturer": "Maker",
    "ro.soc.model": "T1000",
    "ro.build.version.release": "14",
    "ro.build.version.sdk": "34",
    "ro.product.cpu.abilist": "arm64-v8a,armeabi-v7a",
}
COOL = """IsStatusOverride: false
Thermal Status: 0
Cached temperatures:
\tTemperature{mValue=93.0, mType=0, mName=CPU, mStatus=0}
Current temperatures from HAL:
\tTemperature{mValue=25.6, mType=0, mName=AP, mStatus=0}
\tTemperature{mValue=31.25, mType=0, mName=CPU, mStatus=0}
\tTemperature{mValue=23.8, mType=2, mName=BAT, mStatus=0}
Current cooling devices from HAL:
"""
BATTERY = """Current Battery Service state:
  AC powered: false
  USB powered: {plugged}
  Wireless powered: false
  status: 2
  present: true
  level: {level}
  scale: 100
  temperature: 285
"""
# As tensorflow 2.16 prints it; the last line of counts is that of the timed runs.
TOOL = """
echo 'INFO: STARTING!' >&2
echo 'INFO: count=13 first=3678 curr=3790 min=3270 max=5473 avg=3751.66 std=334' >&2
echo 'INFO: {counts}' >&2
echo 'INFO: Inference timings in us: Init: 630, First inference: 678, Warmup (avg): 375.66, Inference (avg): 379.9' >&2
echo 'INFO: Memory footprint delta from the start of the tool (MB): init=1.5 overall=2.25' >&2
"""
COUNTS = "count=20 first=39 curr=38 min=30 max=60 avg=40.5 std=5"


class Phone:
    """A device daemon; what it is like may be changed at any time."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.answers = True  # to the first message
        self.authorizes = True
        self.features = _FEATURES
        self.is_full = False
        self.unplugged_by: str | None = None  # the first command with this in it
        self.commands: list[str] = []
        for folder in ("bin", "props", "dumpsys", "data", "proc", "sys"):
            (root / folder).mkdir(parents=True)
        for name, script in _SCRIPTS.items():
            (root / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
            (root / "bin" / name).chmod(0o755)
        for name, value in _PROPS.items():
            (root / "props" / name).write_text(value)
        self.write("dumpsys/thermalservice", COOL)
        self.write("dumpsys/battery", BATTERY.format(plugged="true", level=84))
        self.write("proc/cpuinfo", "CPU part\t: 0xd05\n" * 4 + "CPU part\t: 0xd0b\n" * 4)
        self.write("power.exit", "0")
        self.write("pin.exit", "0")
        self.write("tool", TOOL.format(counts=COUNTS))
        for core, khz in enumerate([1800000] * 4 + [2400000] * 3 + [2800000]):
            self.write(f"sys/devices/system/cpu/cpu{core}/cpufreq/cpuinfo_max_freq", f"{khz}\n")
            self.write(f"sys/devices/system/cpu/cpu{core}/cpufreq/scaling_cur_freq", f"{khz}\n")
            self.write(f"sys/devices/system/cpu/cpu{core}/cpufreq/scaling_governor", "schedutil\n")
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.serial = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._connections: list[_Connection] = []
        self.processes: list[subprocess.Popen[bytes]] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def write(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def read(self, name: str) -> str:
        path = self.root / name
        return path.read_text() if path.exists() else ""

    @property
    def data(self) -> Path:
        """What is ``/data/local/tmp`` on others."""
        return self.root / "data"

    def install_termux(self, python: str = sys.executable) -> Path:
        """Put Termux there, of a kind that adb may enter; returns its home."""
        self.write("debuggable", "")
        program = self.termux / "usr" / "bin" / "python3"
        self.write(str(program.relative_to(self.root)), f'#!/bin/sh\nexec {shlex.quote(python)} "$@"\n')
        program.chmod(0o755)
        (self.termux / "home").mkdir(exist_ok=True)
        return self.termux / "home"

    @property
    def termux(self) -> Path:
        return self.root / "apps" / "com.termux" / "files"

    def localized(self, text: str) -> str:
        """The phone's own paths in a text as what they are here."""
        for path, here in (("/proc/", "proc"), ("/sys/", "sys"), ("/data/data/", "apps"), ("/data/local/tmp/", "data")):
            text = text.replace(path, f"{self.root}/{here}/")
        return text

    def modes(self) -> list[str]:
        """The commands about fixed performance mode, in order."""
        return [line.rpartition(" ")[2] for line in self.read("power.log").splitlines()]

    def unplug(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self._connections:
            connection.end()

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self.unplug()
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection = _Connection(self, self._listener.accept()[0])
                self._connections.append(connection)
                threading.Thread(target=connection.serve, daemon=True).start()


class _Stream:
    """One service in use."""

    def __init__(self, connection: "_Connection", number: int, peer: int) -> None:
        self._connection, self._number, self._peer = connection, number, peer
        self._acknowledged: queue.Queue[bool] = queue.Queue()
        self._received: queue.Queue[bytes] = queue.Queue()
        self._held = b""

    def acknowledge(self, is_open: bool) -> None:
        self._acknowledged.put(is_open)

    def receive(self, content: bytes) -> None:
        self._received.put(content)

    def write(self, content: bytes) -> None:
        for start in range(0, len(content), _MAX_DATA):
            self._connection.send(b"WRTE", self._number, self._peer, content[start : start + _MAX_DATA])
            if not self._acknowledged.get():
                raise EOFError

    def read(self, count: int) -> bytes:
        while len(self._held) < count:
            chunk = self._received.get()
            if not chunk:
                raise EOFError
            self._held += chunk
        taken, self._held = self._held[:count], self._held[count:]
        return taken

    def close(self) -> None:
        self._connection.send(b"CLSE", self._number, self._peer)


class _Connection:
    """A connection of an adb server."""

    def __init__(self, phone: Phone, conn: socket.socket) -> None:
        self._phone, self._conn, self._lock = phone, conn, threading.Lock()
        conn.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._streams: dict[int, _Stream] = {}
        self._numbers = itertools.count(1)

    def end(self) -> None:
        with contextlib.suppress(OSError):
            self._conn.shutdown(socket.SHUT_RDWR)
        self._conn.close()
        for stream in list(self._streams.values()):
            stream.acknowledge(False)
            stream.receive(b"")

    def send(self, kind: bytes, first: int, second: int, content: bytes = b"") -> None:
        number = int.from_bytes(kind, "little")
        header = struct.pack("<6I", number, first, second, len(content), sum(content[:64]), number ^ 0xFFFFFFFF)
        with self._lock, contextlib.suppress(OSError):
            self._conn.sendall(header + content)

    def serve(self) -> None:
        with contextlib.suppress(OSError, EOFError):
            while True:
                number, first, second, length, _, _ = struct.unpack("<6I", self._exactly(24))
                self._obey(number.to_bytes(4, "little"), first, second, self._exactly(length))
        self.end()

    def _obey(self, kind: bytes, first: int, second: int, content: bytes) -> None:
        stream = self._streams.get(second)
        if kind == b"CNXN" and self._phone.answers:
            if self._phone.authorizes:
                self.send(b"CNXN", _VERSION, _MAX_DATA, self._banner())
            else:
                self.send(b"AUTH", 1, 0, b"\x05" * 20)
        elif kind == b"AUTH" and first == 2:
            self.send(b"AUTH", 1, 0, b"\x05" * 20)  # no key is known; the public one that follows waits for a person
        elif kind == b"OPEN":
            stream = _Stream(self, next(self._numbers), first)
            self._streams[stream._number] = stream
            self.send(b"OKAY", stream._number, first)
            service = content.rstrip(b"\0").decode()
            threading.Thread(target=self._serve, args=(service, stream), daemon=True).start()
        elif kind == b"WRTE" and stream is not None:
            self.send(b"OKAY", second, first)
            stream.receive(content)
        elif kind == b"OKAY" and stream is not None:
            stream.acknowledge(True)
        elif kind == b"CLSE" and stream is not None:
            stream.acknowledge(False)
            stream.receive(b"")

    def _banner(self) -> bytes:
        return (
            f"device::ro.product.name=t;ro.product.model=t;ro.product.device=t;features={self._phone.features}".encode()
        )

    def _exactly(self, count: int) -> bytes:
        pieces = []
        while count:
            piece = self._conn.recv(count)
            if not piece:
                raise EOFError
            pieces.append(piece)
            count -= len(piece)
        return b"".join(pieces)

    def _serve(self, service: str, stream: _Stream) -> None:
        with contextlib.suppress(EOFError, OSError):
            kind, _, command = service.partition(":")
            if kind.startswith("shell,v2"):  # and what the real client adds: TERM=..., raw
                self._shell(command, stream)
            elif kind == "sync":
                while self._sync(stream):
                    pass
            stream.close()

    def _shell(self, command: str, stream: _Stream) -> None:
        phone = self._phone
        phone.commands.append(command)
        if phone.unplugged_by is not None and phone.unplugged_by in command:
            phone.unplug()
            return
        command = phone.localized(command)
        environment = {"PATH": f"{phone.root}/bin:/usr/bin:/bin", "PHONE": str(phone.root)}
        pipe = subprocess.PIPE
        process = subprocess.Popen(["/bin/sh", "-c", command], stdin=pipe, stdout=pipe, stderr=pipe, env=environment)
        phone.processes.append(process)
        threading.Thread(target=self._feed, args=(process.stdin, stream), daemon=True).start()
        with process.stdout, process.stderr:
            errors = threading.Thread(target=self._copy, args=(process.stderr, _STDERR, stream), daemon=True)
            errors.start()
            self._copy(process.stdout, _STDOUT, stream)
            errors.join()
        status = process.wait()
        stream.write(struct.pack("<BIB", _EXIT, 1, status if status >= 0 else 128 - status))

    @staticmethod
    def _feed(sink, stream: _Stream) -> None:
        """What comes for the command's input, until the end of that or of the stream."""
        with contextlib.suppress(EOFError, OSError), sink:
            while True:
                kind, length = struct.unpack("<BI", stream.read(5))
                content = stream.read(length)
                if kind == _CLOSE_STDIN:
                    return
                sink.write(content)
                sink.flush()

    def _copy(self, source, kind: int, stream: _Stream) -> None:
        with contextlib.suppress(EOFError):
            while chunk := os.read(source.fileno(), 1 << 17):
                with self._writing(stream):
                    stream.write(struct.pack("<BI", kind, len(chunk)) + chunk)

    @contextlib.contextmanager
    def _writing(self, stream: _Stream) -> Iterator[None]:
        """One message at a time: the two outputs share the stream."""
        lock = stream.__dict__.setdefault("lock", threading.Lock())
        with lock:
            yield

    def _sync(self, stream: _Stream) -> bool:
        """Obey one request about a file; whether another one may follow."""
        kind, length = struct.unpack("<4sI", stream.read(8))
        path, _, mode = self._phone.localized(stream.read(length).decode()).partition(",")
        if kind == b"STAT":
            found = Path(path).stat() if Path(path).exists() else None
            stream.write(b"STAT" + struct.pack("<3I", *((found.st_mode, found.st_size, 1) if found else (0, 0, 0))))
        elif kind == b"RECV":
            content = Path(path).read_bytes()
            stream.write(b"DATA" + struct.pack("<I", len(content)) + content + b"DONE" + bytes(4))
        elif kind == b"SEND":
            return self._receive_file(stream, Path(path), int(mode))
        return kind != b"QUIT"

    def _receive_file(self, stream: _Stream, path: Path, mode: int) -> bool:
        content = b""
        while True:
            kind, length = struct.unpack("<4sI", stream.read(8))
            if kind == b"DONE":
                break
            content += stream.read(length)
            if self._phone.is_full:
                reason = b"couldn't write: No space\x1b[2J left on device"
                stream.write(b"FAIL" + struct.pack("<I", len(reason)) + reason)
                return False
        if not path.is_relative_to(self._phone.data):
            raise OSError(f"not on this phone: {path}")
        path.write_bytes(content)
        path.chmod(mode & 0o777)
        stream.write(b"OKAY" + bytes(4))
        return True


class AdbServer:
    """An adb server with a port, a home and keys of its own, and no eye for what else is on this computer."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.environment = {
            **os.environ,
            "HOME": str(folder),
            "ANDROID_ADB_SERVER_PORT": str(self.port),
            "ADB_LOCAL_TRANSPORT_MAX_PORT": "1",  # no search for emulators
            "ADB_MDNS": "0",
        }
        quiet = subprocess.DEVNULL
        command = [self.program(), "-P", str(self.port), "nodaemon", "server"]
        self._process = subprocess.Popen(command, env=self.environment, stdin=quiet, stdout=quiet, stderr=quiet)
        for _ in range(500):
            with contextlib.suppress(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            time.sleep(0.02)
        raise RuntimeError("the adb server did not start")

    @staticmethod
    def program() -> str:
        found = shutil.which("adb")
        if found is None:
            raise FileNotFoundError("adb not found; these tests need it: apt-get install adb")
        return found

    def adb(self, *arguments: str, limit_s: float = 20) -> str:
        """The real client."""
        command = [self.program(), *arguments]
        run = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=limit_s, check=False
        )
        return run.stdout + run.stderr

    def connect(self, phone: Phone) -> str:
        return self.adb("connect", phone.serial)

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
