"""Chunks of a big blob over HTTPS, in order: what `aggregator.blob_server` serves (transport.md, section 5).

Whole chunks only, so that a fetch that breaks off goes on over MQTT where it stopped, and the other way round. The device's
own certificate, the pinned CA, the host name of the broker. What comes is trusted no more than chunks over MQTT: only the
digest of the whole decides.
"""

from __future__ import annotations

import http.client
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from edge_sdk.errors import LinkError
from edge_sdk.tls import TlsFiles, client_context
from edge_sdk.wire import CHUNK

_SECONDS: Final = 20.0  # of silence


def fetch_chunks(
    host: str,
    port: int,
    files: TlsFiles,
    floor: int,
    *,
    digest: str,
    size: int,
    ranges: Sequence[tuple[int, int]],
    is_over: Callable[[], bool],
) -> Iterator[tuple[int, bytes]]:
    """(index, bytes) of the chunks in `ranges` (inclusive chunk indexes) of a blob of `size` bytes, until `is_over`.

    Raises `LinkError` for anything but these bytes.
    """
    where = f"https://{host}:{port}"
    connection = http.client.HTTPSConnection(host, port, timeout=_SECONDS, context=client_context(files, floor))
    try:
        for first, last in ranges:
            begin, end = first * CHUNK, min((last + 1) * CHUNK, size) - 1
            tag = f'"{digest}"'
            headers = {"Range": f"bytes={begin}-{end}", "If-Range": tag}
            connection.request("GET", f"/v1/blobs/{digest}", headers=headers)
            answer = connection.getresponse()
            whole = answer.status == http.HTTPStatus.OK and (begin, end) == (0, size - 1)
            if not whole and answer.status != http.HTTPStatus.PARTIAL_CONTENT:
                raise LinkError(f"{where}: {answer.status} {answer.reason} for {digest[:12]}")
            if answer.getheader("ETag") != tag or answer.getheader("Content-Length") != str(end - begin + 1):
                raise LinkError(f"{where}: other bytes than were asked for of {digest[:12]}")
            for index in range(first, last + 1):
                wanted = min((index + 1) * CHUNK, size) - index * CHUNK
                data = answer.read(wanted)
                if len(data) != wanted:
                    raise LinkError(f"{where}: ended within chunk {index} of {digest[:12]}")
                yield index, data
                if is_over():
                    return
    except (OSError, http.client.HTTPException) as error:
        raise LinkError(f"{where}: {error}") from error
    finally:
        connection.close()
