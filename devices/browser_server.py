"""A small server for one page: over HTTPS on a network, bounded in everything, and believing nobody who asks.

Whoever is on the network can connect. They get at most so many connections at a time, so many bytes and seconds each,
and files by names that were chosen here; everything else is refused with a status and a line that says why.
"""

import json
import re
import secrets
import socket
import socketserver
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol

HEADERS = {
    # Both together give the page a fine clock and threads.
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    # Both runtimes compile WebAssembly, and Emscripten's loader makes scripts of blobs.
    "Content-Security-Policy": "default-src 'none'; script-src 'self' blob: 'wasm-unsafe-eval'; connect-src 'self'; "
    "worker-src 'self' blob:; style-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
KINDS = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript",
    ".mjs": "text/javascript",
    ".wasm": "application/wasm",
}
_PATH = re.compile(r"/([A-Za-z0-9_-]{1,64})/([A-Za-z0-9_./-]{0,128})")
_MOST_CONNECTIONS, _MOST_OF_ONE_ADDRESS = 48, 24
_ASK_S, _ANSWER_S = 15.0, 180.0  # to have sent a whole request; to have taken the whole answer
_POLL_S = 0.1
_DRAINED_BYTES = 16 << 20
_TLS_HANDSHAKE = 0x16


class RequestRefused(ValueError):
    """A request that is answered with an HTTP status and a line; nothing else comes of it."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a request is answered with."""

    kind: str
    content: bytes


class Site(Protocol):
    """What is served to those who know the token; each method raises ``RequestRefused``."""

    def get(self, name: str, session: str) -> Reply:
        """A file by its name."""

    def allow(self, name: str, session: str) -> int:
        """How many bytes may be posted there, before they are read."""

    def post(self, name: str, headers: dict[str, str], body: bytes) -> Reply:
        """Take what was posted."""


@dataclass(frozen=True, kw_only=True)
class Served:
    """Where a site is: ``url`` ends in its token."""

    url: str
    refusals: dict[int, int]  # how often each status was given


@contextmanager
def serve(
    site: Site,
    *,
    host: str,
    port: int,
    names: tuple[str, ...],
    tls: ssl.SSLContext | None,
    failed: Callable[[str], None],
) -> Iterator[Served]:
    """Serve a site as long as the block lasts.

    Args:
        site: What is served.
        host: The address to listen on.
        port: The port; 0 for any that is free.
        names: Addresses by which requests may name this server; the first is that of the URL.
        tls: With a certificate; None for plain HTTP.
        failed: Called with a line about a request that failed here by a fault of ours.

    Raises:
        OSError: The address cannot be listened on.
    """
    token = secrets.token_urlsafe(16)
    with _Server(host, port, tls, failed) as server:
        port = server.server_address[1]
        hosts = [f"[{name}]:{port}" if ":" in name else f"{name}:{port}" for name in names]
        server.site, server.token, server.hosts = site, token, frozenset(hosts)
        server.scheme = "http" if tls is None else "https"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": _POLL_S}, daemon=True)
        thread.start()
        try:
            yield Served(url=f"{server.scheme}://{hosts[0]}/{token}/", refusals=server.refusals)
        finally:
            server.finish()
            thread.join()


class _Connection:
    """An open connection, and until when it has to get further."""

    def __init__(self, address: str, held: socket.socket) -> None:
        self.address, self.held, self.until_s = address, held, time.monotonic() + _ASK_S


class _Server(ThreadingHTTPServer):
    site: Site
    token: str
    hosts: frozenset[str]
    scheme: str
    daemon_threads = True
    request_queue_size = _MOST_CONNECTIONS

    def __init__(self, host: str, port: int, tls: ssl.SSLContext | None, failed: Callable[[str], None]) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.tls, self._failed = tls, failed
        self.refusals: dict[int, int] = {}
        self._open: dict[int, _Connection] = {}
        self._lock = threading.Lock()
        super().__init__((host, port), _Exchange)

    def server_bind(self) -> None:
        """As of TCP: HTTP's asks a name server for this computer's name first."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Take a connection, unless there are too many already."""
        address = str(client_address[0])
        with self._lock:
            same = sum(one.address == address for one in self._open.values())
            if len(self._open) < _MOST_CONNECTIONS and same < _MOST_OF_ONE_ADDRESS:
                self._open[id(request)] = _Connection(address, request)
                return True
        self.count(503)
        if self.tls is None:
            with suppress(OSError):
                request.settimeout(0)
                request.sendall(b"HTTP/1.0 503 Too many connections\r\nContent-Length: 0\r\n\r\n")
        return False

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer one request, and forget its connection."""
        key = id(request)
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._lock:
                self._open.pop(key, None)

    def wrapped(self, request: socket.socket) -> socket.socket:
        """The connection with TLS, where that is spoken; ``until`` then holds for it."""
        if self.tls is None:
            return request
        key = id(request)
        request.settimeout(_ASK_S)
        if request.recv(1, socket.MSG_PEEK) != bytes([_TLS_HANDSHAKE]):
            return request  # a browser that was sent here without the s of https: told so
        inside = self.tls.wrap_socket(request, server_side=True, do_handshake_on_connect=False)
        with self._lock:
            if key in self._open:
                self._open[key].held = inside
        inside.do_handshake()
        return inside

    def read_whole(self, held: socket.socket) -> None:
        """A request has arrived; now there is time to take the answer."""
        with self._lock:
            for one in self._open.values():
                if one.held is held:
                    one.until_s = time.monotonic() + _ANSWER_S

    def service_actions(self) -> None:
        """Between requests: end connections that take too long."""
        now_s = time.monotonic()
        with self._lock:
            for one in self._open.values():
                if one.until_s < now_s:
                    _cut(one.held)

    def count(self, status: int) -> None:
        """Remember a refusal."""
        with self._lock:
            self.refusals[status] = self.refusals.get(status, 0) + 1

    def finish(self) -> None:
        """Stop listening; whoever is still being answered gets two seconds."""
        self.shutdown()
        end_s = time.monotonic() + 2.0
        while self._open and time.monotonic() < end_s:
            time.sleep(0.02)
        with self._lock:
            for one in self._open.values():
                _cut(one.held)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Connections break and that is no news; anything else is a fault of ours, and the run goes on."""
        import sys

        error = sys.exception()
        if error is not None and not isinstance(error, OSError):
            self._failed(f"a request failed ({type(error).__name__}: {error}); the measurement goes on")


def _cut(held: socket.socket) -> None:
    with suppress(OSError):
        socket.socket.shutdown(held, socket.SHUT_RDWR)  # not TLS's own, which another thread is in


class _Exchange(BaseHTTPRequestHandler):
    """One request and its answer."""

    server: _Server
    timeout = _ASK_S
    server_version, sys_version = "tacit", ""

    def setup(self) -> None:
        self.request = self.server.wrapped(self.request)
        super().setup()

    def finish(self) -> None:
        super().finish()
        if isinstance(self.request, ssl.SSLSocket):
            self.request.close()

    def do_GET(self) -> None:
        self._respond(lambda name: self.server.site.get(name, self._header("X-Tacit-Session")))

    def do_POST(self) -> None:
        self._respond(self._take)

    def _take(self, name: str) -> Reply:
        length = self._header("Content-Length")
        if "Transfer-Encoding" in self.headers or not (length.isascii() and length.isdigit() and len(length) < 12):
            raise RequestRefused(411, "expected a Content-Length")
        try:
            most = self.server.site.allow(name, self._header("X-Tacit-Session"))
            if int(length) > most:
                raise RequestRefused(413, f"expected at most {most} bytes, got {length}")
        except RequestRefused:
            self._drain(int(length))
            raise
        body = self.rfile.read(int(length))
        if len(body) != int(length):
            raise RequestRefused(400, "expected as many bytes as Content-Length says, got fewer")
        self.server.read_whole(self.request)
        return self.server.site.post(name, {key.lower(): value for key, value in self.headers.items()}, body)

    def _drain(self, length: int) -> None:
        """Read and forget, so that the refusal is seen: a connection that is closed over unread bytes is reset."""
        left = min(length, _DRAINED_BYTES)
        while left > 0 and (read := self.rfile.read(min(left, 1 << 16))):
            left -= len(read)

    def _respond(self, answer: Callable[[str], Reply]) -> None:
        try:
            reply = answer(self._name())
        except RequestRefused as refused:
            self.send_error(refused.status, str(refused))
            return
        self.server.read_whole(self.request)
        self._send(200, reply)

    def _name(self) -> str:
        """What is asked for, by somebody who knows the token and is on this page."""
        if self.server.tls is not None and not isinstance(self.request, ssl.SSLSocket):
            raise RequestRefused(426, "expected https: open the link as it was given, beginning with https://")
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or hosts[0] not in self.server.hosts:
            raise RequestRefused(421, "expected the Host of the link")
        origin = self.headers.get("Origin")
        if origin != f"{self.server.scheme}://{hosts[0]}" and (origin is not None or self.command == "POST"):
            raise RequestRefused(403, "expected a request of this page, got another Origin")
        found = _PATH.fullmatch(self.path.partition("?")[0])
        if found is None or ".." in found[2] or "//" in found[2]:
            raise RequestRefused(400, "expected a path of plain names")
        if not secrets.compare_digest(found[1].encode(), self.server.token.encode()):
            raise RequestRefused(404, "expected the token of the link; open it as it was given")
        return found[2]

    def _header(self, name: str) -> str:
        return self.headers.get(name, "")

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """A refusal as JSON."""
        del explain
        self.server.count(code)
        content = json.dumps({"error": (message or "refused")[:200]}).encode()
        self._send(code, Reply(kind="application/json", content=content))

    def _send(self, status: int, reply: Reply) -> None:
        self.send_response(status)
        sizes = {"Content-Type": reply.kind, "Content-Length": str(len(reply.content))}
        for name, value in {**HEADERS, **sizes, "Connection": "close"}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.content)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # named by the standard library
        """Says nothing."""
