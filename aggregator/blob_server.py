"""Big models over HTTPS: the fast path beside chunks over MQTT (transport.md, section 5).

Rules
-----
1. Mutual TLS, always: the identity is the common name of a certificate of the site's CA that is not on its revocation list.
   Files that change (a renewed certificate, a new list) hold from the next connection on.
2. A device gets what it may fetch over MQTT, and nothing else: `find` decides, for each request anew. Whatever it does not
   name is 404, whether it exists or not; only digests are names, so no request can leave the folder.
3. Read only, one kind of path, one range per request (206, or 416 beyond the end). A blob is immutable: its entity tag is
   its digest.
4. Connections and the time that each may be idle are bounded. A gateway whose port is closed loses nothing but speed.
"""

from __future__ import annotations

import logging
import re
import socket
import socketserver
import ssl
import sys
import threading
from collections import Counter
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, Final

from aggregator.blobs import DIGEST
from edge_sdk.errors import LinkError

log = logging.getLogger(__name__)

CONNECTIONS: Final = 64
CONNECTIONS_PER_DEVICE: Final = 2  # the task's start, and the model to serve with
_IDLE_SECONDS: Final = 30.0
_PATIENCE_SECONDS: Final = 1.0  # the end of a connection that broke off may be noticed a little later
_PIECE: Final = 65_536
_FILES: Final = ("ca.pem", "crl.pem", "server.pem", "server.key")
_PATH: Final = re.compile(rf"/v1/blobs/({DIGEST})")
_RANGE: Final = re.compile(r"bytes=([0-9]{1,15})-([0-9]{0,15})")

Find = Callable[[str, str], Path | None]  # (device, digest) -> the file, None if this device may not have it
Served = Callable[[str, int], None]  # (device, bytes)


class BlobServer:
    """Serves blobs at `address`:`port` (0: a free one) with the certificates in `security`."""

    def __init__(self, address: str, port: int, security: Path, *, find: Find, served: Served) -> None:
        self._address, self._wanted, self._security = address, port, security
        self.find, self.served = find, served
        self._server: _Server | None = None
        self._context: tuple[tuple[tuple[int, int], ...], ssl.SSLContext] | None = None
        self._changed = threading.Condition()
        self._open: Counter[str] = Counter()

    @property
    def port(self) -> int:
        """Where it listens."""
        assert self._server is not None
        return int(self._server.server_address[1])

    def start(self) -> None:
        """Listen, in threads of its own. Raises `LinkError` naming the port or the file."""
        self.context()  # a certificate that cannot be used is told now
        try:
            self._server = _Server(self._address, self._wanted, self)
        except OSError as error:
            raise LinkError(
                f"port {self._wanted} on {self._address} cannot be used ({error.strerror}): change blobs.port, or leave it out"
            ) from error
        threading.Thread(target=self._server.serve_forever, name="edgewise-blobs", daemon=True).start()
        log.info("models over HTTPS at %s:%d", self._address, self.port)

    def stop(self) -> None:
        """Listen no more; what is being sent ends with the process."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    def context(self) -> ssl.SSLContext:
        """The TLS context of a connection that comes now."""
        paths = [self._security / name for name in _FILES]
        try:
            stamp = tuple((found.st_mtime_ns, found.st_ino) for found in (path.stat() for path in paths))
            if self._context is None or self._context[0] != stamp:
                made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                made.minimum_version = ssl.TLSVersion.TLSv1_2
                made.verify_mode = ssl.CERT_REQUIRED
                made.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
                authority, revoked, certificate, key = paths
                made.load_verify_locations(authority)
                made.load_verify_locations(revoked)
                made.load_cert_chain(certificate, key)
                self._context = (stamp, made)
        except (OSError, ssl.SSLError) as error:
            raise LinkError(f"{self._security}: its certificates cannot be used for HTTPS ({error})") from error
        return self._context[1]

    def enter(self, device: str) -> bool:
        """Count a connection; False where there are too many, and none of them ends at once."""

        def has_room() -> bool:
            return self._open.total() < CONNECTIONS and self._open[device] < CONNECTIONS_PER_DEVICE

        with self._changed:
            if not self._changed.wait_for(has_room, _PATIENCE_SECONDS):
                return False
            self._open[device] += 1
            return True

    def leave(self, device: str) -> None:
        """It has ended."""
        with self._changed:
            self._open[device] -= 1
            self._open += Counter()  # forgets those at 0
            self._changed.notify_all()


class _Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, address: str, port: int, blobs: BlobServer) -> None:
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.blobs = blobs
        self._slots = threading.BoundedSemaphore(2 * CONNECTIONS)  # handshakes too
        super().__init__((address, port), socketserver.BaseRequestHandler)  # `finish_request` makes its own

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._slots.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()

    def finish_request(self, request: Any, client_address: Any) -> None:
        """In the connection's own thread: a handshake that takes its time keeps nobody waiting."""
        request.settimeout(_IDLE_SECONDS)
        with self.blobs.context().wrap_socket(request, server_side=True) as secured:
            device = _common_name(secured.getpeercert())
            if device is None or not self.blobs.enter(device):
                return
            try:
                _Handler(secured, client_address, self, device=device)
            finally:
                self.blobs.leave(device)

    def handle_error(self, _request: Any, client_address: Any) -> None:
        log.debug("a connection from %s ended: %s", client_address, sys.exc_info()[1])


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = _IDLE_SECONDS
    server: _Server

    def __init__(self, *arguments: Any, device: str) -> None:
        self._device = device
        super().__init__(*arguments)

    def version_string(self) -> str:
        return "edgewise"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name of the base class
        log.debug("%s: %s", self._device, format % args)

    def do_GET(self) -> None:
        """One blob, or a range of it."""
        match = _PATH.fullmatch(self.path)
        path = None if match is None else self.server.blobs.find(self._device, match[1])
        if match is None or path is None:
            self._refuse(HTTPStatus.NOT_FOUND)
            return
        try:
            file = path.open("rb")
        except OSError:
            self._refuse(HTTPStatus.NOT_FOUND)
            return
        with file:
            size, tag = file.seek(0, 2), f'"{match[1]}"'
            part = self._range(size, tag)
            if part is None:
                self._refuse(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, {"Content-Range": f"bytes */{size}"})
                return
            first, last, status = part
            self.send_response(status)
            if status is HTTPStatus.PARTIAL_CONTENT:
                self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
            for name, value in (("Content-Length", last - first + 1), ("ETag", tag), ("Accept-Ranges", "bytes")):
                self.send_header(name, str(value))
            self.send_header("Content-Type", "application/octet-stream")
            self.end_headers()
            file.seek(first)
            left = last - first + 1
            while left and (data := file.read(min(left, _PIECE))):
                self.wfile.write(data)
                left -= len(data)
                self.server.blobs.served(self._device, len(data))

    def _range(self, size: int, tag: str) -> tuple[int, int, HTTPStatus] | None:
        """First and last byte of the answer and its status; None beyond the end."""
        asked = self.headers.get("Range")
        if asked is None or self.headers.get("If-Range", tag) != tag:
            return 0, size - 1, HTTPStatus.OK
        match = _RANGE.fullmatch(asked)
        if match is None:
            return None
        first, last = int(match[1]), min(int(match[2] or size - 1), size - 1)
        return None if first > last else (first, last, HTTPStatus.PARTIAL_CONTENT)

    def _refuse(self, status: HTTPStatus, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": "0", **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()


def _common_name(certificate: Any) -> str | None:
    for entry in (certificate or {}).get("subject", ()):
        for name, value in entry:
            if name == "commonName":
                return str(value)
    return None
