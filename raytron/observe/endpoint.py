"""The status endpoint of a run: a small HTTP server that tells, and does nothing else.

    GET /status           where the run stands                                    JSON
    GET /metrics          the figures of the newest step                          Prometheus' text format
    GET /events?after=N   lines of events.jsonl after the first N, at most 1000   JSON lines

Who can reach it need not be who may read it: another user of the machine, or a web page in a browser on it. So:

    token         where there is one, each request carries it, as `Authorization: Bearer TOKEN`
    Host          on loopback it is a name of loopback: a page whose own name was made to mean 127.0.0.1 sends that one
    cross-site    what a browser asks for on behalf of another site is refused, and no answer allows it to be read there
    bounds        one request of at most 16 KiB in 5 s for each connection, and 16 connections at once

A request that goes wrong ends in its own thread: the run does not notice.
"""

from __future__ import annotations

import hmac
import io
import ipaddress
import re
import socket
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import TCPServer, ThreadingMixIn
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from raytron.errors import ConfigError, Problem
from raytron.observe.prometheus import CONTENT_TYPE, exposition
from raytron.observe.records import Record, dump

LONGEST = 16 * 2**10  # bytes of a request
PATIENCE_S = 5.0  # for a request to be there, and for an answer to be taken
MOST_AT_ONCE = 16  # connections
MOST_LINES, MOST_BYTES = 1000, 4 * 2**20  # of events in one answer
END_OF_HEAD = re.compile(rb"\r?\n\r?\n")
HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^:\[\]/@\s]+)(?::[0-9]{1,5})?")
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
ALWAYS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Connection": "close",
}
JSON, LINES, TEXT = "application/json", "application/x-ndjson", "text/plain; charset=utf-8"
Say = Callable[[], Record]


class Refused(Exception):
    """A request that gets no answer but a status and a reason."""

    def __init__(self, status: HTTPStatus, why: str, **headers: str):
        self.status, self.why, self.headers = status, why, headers
        super().__init__(why)


class Endpoint:
    """Listens until `close`, in threads of its own.

        endpoint = Endpoint(lambda: {"name": "tiny", "step": 3}, lambda: {"loss": 4.2}, Path("events.jsonl"))
        endpoint.address                            # http://127.0.0.1:43121

    facts: where the run stands, its `name` included. newest: the record of the newest step. port: 0 for any free one.
    token: what a request has to show, "" for nothing. Raises ConfigError where it can't listen, or may not: where other
    machines reach it and there is no token.
    """

    def __init__(
        self, facts: Say, newest: Say, events: Path, *, host: str = "127.0.0.1", port: int = 0, token: str = ""
    ):
        if not token and not is_loopback(host):
            what = f"other machines reach {host}, and Ray has no token here"
            raise ConfigError([Problem("observe.host", what, "use 127.0.0.1, or start Ray with RAY_AUTH_MODE=token")])
        self.facts, self.newest, self.events, self.token = facts, newest, events, token
        self.only_as = {*LOOPBACK, _bracketed(host.lower())} if is_loopback(host) else None
        try:
            self._server = _Server(host, port, self)
        except (OSError, OverflowError, UnicodeError) as error:
            what = f"{port} on {host} can't be listened on: {getattr(error, 'strerror', None) or error}"
            raise ConfigError([Problem("observe.port", what, "use another one, or 0 for any free one")]) from None
        self.address = f"http://{_bracketed(host)}:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, name="endpoint", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Listens no more."""
        self._server.shutdown()
        self._server.server_close()

    def page(self, target: str) -> tuple[str, bytes]:
        """The type and the bytes of an answer. Raises Refused."""
        try:
            parts = urlsplit(target)
            query = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query), max_num_fields=4)
        except ValueError:
            raise Refused(HTTPStatus.BAD_REQUEST, "this is no path") from None
        asked = dict(query)
        known = {"after"} if parts.path == "/events" else set()
        if len(asked) < len(query) or not asked.keys() <= known:
            raise Refused(HTTPStatus.BAD_REQUEST, f"{parts.path[:40]} takes {' '.join(known) or 'nothing'}")
        match parts.path:
            case "/":
                return TEXT, b"/status\n/metrics\n/events?after=0\n"
            case "/status":
                return JSON, dump(self.facts()).encode()
            case "/metrics":
                facts = self.facts()
                return CONTENT_TYPE, exposition({**facts, **self.newest()}, str(facts["name"])).encode()
            case "/events":
                return LINES, self._lines(asked.get("after", "0"))
        raise Refused(HTTPStatus.NOT_FOUND, "there are /status, /metrics and /events")

    def _lines(self, after: str) -> bytes:
        """Whole lines of the events after so many; as many as may be told at once."""
        if not re.fullmatch(r"[0-9]{1,15}", after):
            raise Refused(HTTPStatus.BAD_REQUEST, "after is the number of lines that are known")
        lines: list[bytes] = []
        size = 0
        try:
            with self.events.open("rb") as file:
                for number, line in enumerate(file):
                    if number < int(after):
                        continue
                    size += len(line)
                    if not line.endswith(b"\n") or len(lines) >= MOST_LINES or (lines and size > MOST_BYTES):
                        break
                    lines.append(line)
        except FileNotFoundError:
            return b""
        return b"".join(lines)


class _Server(ThreadingMixIn, TCPServer):
    """A thread for each connection, while there are not too many."""

    daemon_threads, block_on_close, allow_reuse_address = True, False, True
    request_queue_size = MOST_AT_ONCE

    def __init__(self, host: str, port: int, endpoint: Endpoint):
        self.endpoint, self._room = endpoint, threading.BoundedSemaphore(MOST_AT_ONCE)
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._room.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no thread is to be had
            self._room.release()
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Whoever asked has gone, or sent what nobody can read."""


class _Handler(BaseHTTPRequestHandler):
    """One request of one connection."""

    server: _Server
    server_version, sys_version = "raytron", ""
    timeout = PATIENCE_S

    def handle(self) -> None:
        self.command, self.request_version, self.requestline = "", "HTTP/1.1", ""  # of an answer to what can't be read
        try:
            self.raw_requestline, _, rest = self._head().partition(b"\n")
            self.rfile = io.BytesIO(rest)
            if not self.parse_request():  # which has answered
                return
            self._check()
            kind, body = self.server.endpoint.page(self.path)
            self._answer(HTTPStatus.OK, kind, body)
        except Refused as refused:
            self._answer(refused.status, TEXT, f"{refused.why}\n".encode(), **refused.headers)
        except OSError:
            raise
        except Exception as error:
            self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, TEXT, f"{type(error).__name__}\n".encode())

    def _head(self) -> bytes:
        """A request up to its empty line. Raises Refused, or OSError where it does not come."""
        head, deadline = b"", time.monotonic() + PATIENCE_S
        while not END_OF_HEAD.search(head):
            if len(head) > LONGEST:
                raise Refused(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"a request has {LONGEST} bytes at most")
            try:
                self.connection.settimeout(max(0.001, deadline - time.monotonic()))  # 0 would not wait at all
                more = self.connection.recv(4096)
            except TimeoutError:
                raise Refused(HTTPStatus.REQUEST_TIMEOUT, f"no whole request came in {PATIENCE_S:g} s") from None
            if not more:
                raise Refused(HTTPStatus.BAD_REQUEST, "the request does not end")
            head += more
        self.connection.settimeout(PATIENCE_S)
        return head

    def _check(self) -> None:
        """Raises Refused for whoever may not read, and for what is no plain question."""
        headers, endpoint = self.headers, self.server.endpoint
        if not self.request_version.startswith("HTTP/1."):
            raise Refused(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, "use HTTP/1.1")
        hosts = headers.get_all("Host", [])
        match = HOST.fullmatch(str(hosts[0])) if len(hosts) == 1 else None
        if match is None or (endpoint.only_as is not None and match[1].lower() not in endpoint.only_as):
            raise Refused(HTTPStatus.MISDIRECTED_REQUEST, "the Host of a request is that of the endpoint")
        if headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin") or "Origin" in headers:
            raise Refused(HTTPStatus.FORBIDDEN, "no other site may ask")
        shown = str(headers.get("Authorization", "")).encode("utf-8", "surrogateescape")
        if endpoint.token and not hmac.compare_digest(shown, f"Bearer {endpoint.token}".encode()):
            why = "show Ray's token: Authorization: Bearer TOKEN"
            raise Refused(HTTPStatus.UNAUTHORIZED, why, **{"WWW-Authenticate": "Bearer"})
        if self.command not in ("GET", "HEAD"):
            raise Refused(HTTPStatus.METHOD_NOT_ALLOWED, "this endpoint only tells", Allow="GET, HEAD")
        if headers.get("Content-Length", "0") != "0" or "Transfer-Encoding" in headers:
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "a question has no body")

    def _answer(self, status: HTTPStatus, kind: str, body: bytes, **headers: str) -> None:
        self.request_version = "HTTP/1.1"  # to HTTP/0.9, too: an answer without headers could be anything
        self.send_response(status)
        for name, value in {**ALWAYS, **headers, "Content-Type": kind, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What `parse_request` says to a line that is no request: the status, without a page around it."""
        self._answer(HTTPStatus(code), TEXT, f"{HTTPStatus(code).phrase}\n".encode())

    def log_message(self, format: str, *args: Any) -> None:
        """Nobody reads it."""


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host, by its name or address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
