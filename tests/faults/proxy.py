"""A TCP proxy before a broker: it cuts, slows down, and holds back what it is told to."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import Self


class Proxy:
    """Listens on `port`. `rate` is bytes per second upwards (None: no limit); while `mute`, nothing leaves for the broker.

    `passed` counts the bytes that went up.
    """

    def __init__(self, target: int, *, rate: float | None = None) -> None:
        self.rate, self.mute, self.passed = rate, False, 0
        self._target = target
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        """The address for `device.toml` or the job file."""
        return f"mqtt://127.0.0.1:{self.port}"

    def cut(self) -> None:
        """Break every connection, wherever its bytes are."""
        pairs, self._pairs = self._pairs, []
        for pair in pairs:
            for end in pair:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                try:
                    broker = socket.create_connection(("127.0.0.1", self._target))
                except OSError:
                    client.close()
                    continue
                self._pairs.append((client, broker))
                threading.Thread(target=self._pump, args=(client, broker, True), daemon=True).start()
                threading.Thread(target=self._pump, args=(broker, client, False), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, up: bool) -> None:
        with suppress(OSError):
            while data := source.recv(4096):
                while up and self.mute:
                    time.sleep(0.01)
                if up and self.rate:
                    time.sleep(len(data) / self.rate)
                sink.sendall(data)
                if up:
                    self.passed += len(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.close()
        self.cut()
