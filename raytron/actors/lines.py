"""Lines: from each process of a run a connection to its controller that says nothing, and breaks when the process dies.

    worker, keeper ── opens its line when it starts, says its name ──► controller
    the process is killed, or its node: the kernel closes the connection       seen within milliseconds, whatever Ray knows

Ray tells of a process that died on a living node within 0.1 s, and why: killed for memory, or preempted. Of a dead node it
learns by missed health checks, after seconds. So a broken line means:

    another line from that node holds          the node lives: Ray will say what happened, and is waited for a while
    no line from that node holds               the node is gone
    there was one line only from that node     the same, but Ray is given a second to say otherwise

A process that is wrongly held for dead does no harm: it is killed, and what it still says carries the number of a dead
epoch. A node that loses its power breaks no connection: then the kernel's probes do, after about 4 s. Who can't open a line
goes without one.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import logging
import secrets
import selectors
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import NamedTuple

SETTLE_S = 0.1  # from the last break of a node's lines until the node counts as gone: Ray may still say why
ALONE_S = 1.0  # the same, of a node that has one line only
TELLS_S = 3.0  # for Ray to tell of a process on a node that lives
CONNECT_S = 5.0
GREETING_BYTES = 512  # that a name and the secret may take
PROBES = (("TCP_KEEPIDLE", 1), ("TCP_KEEPINTVL", 1), ("TCP_KEEPCNT", 3))  # seconds, seconds, how many
log = logging.getLogger(__name__)


class LineTo(NamedTuple):
    """Where a line goes. secret: who does not know it is no process of this run."""

    host: str
    port: int
    secret: str


class Line:
    """The end of a line in a worker or a keeper. It holds until the process ends, or `close`."""

    def __init__(self, to: LineTo, name: str):
        self.to, self.name = to, name
        self._socket: socket.socket | None = None
        try:
            self._socket = socket.create_connection(to[:2], timeout=CONNECT_S)
            self._socket.sendall(json.dumps({"secret": to.secret, "name": name}).encode() + b"\n")
        except OSError as error:
            log.warning("no line to the controller at %s:%d: %s", to.host, to.port, error)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()


class Gone(NamedTuple):
    """What is gone, as lines tell: whole nodes, and single processes by their names."""

    nodes: frozenset[str]
    names: frozenset[str]


class Lines:
    """The end of all lines in the controller. host: the address of its node."""

    def __init__(self, host: str):
        self._server = socket.create_server(("0.0.0.0", 0), backlog=1024)
        self._server.setblocking(False)
        self.to = LineTo(host, self._server.getsockname()[1], secrets.token_hex(16))
        self._lock = threading.Lock()
        self._whole: dict[str, socket.socket] = {}
        self._broken: dict[str, float] = {}  # when
        self._names: dict[socket.socket, str] = {}
        self._greetings: dict[socket.socket, bytes] = {}  # as far as they have come
        self._over = False
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._server, selectors.EVENT_READ)
        threading.Thread(target=self._listen, name="lines", daemon=True).start()

    def holds(self, name: str) -> bool:
        """Whether a process has a line that is whole."""
        with self._lock:
            return name in self._whole

    def broke(self, name: str) -> bool:
        """Whether a process had a line, and has none now: it is dead, or can't be reached."""
        with self._lock:
            return name in self._broken

    def gone(self, homes: Mapping[str, str], *, settle: bool = False) -> Gone:
        """Which of some processes and their nodes are gone. homes: the node of each process, by name.

        settle: wait for those of which that is not certain yet, where no line of their node holds any more.
        """
        while True:
            with self._lock:
                whole, broken = set(self._whole), dict(self._broken)
            found, unsettled = judged(homes, whole, broken, time.monotonic())
            if not (settle and unsettled):
                return found
            time.sleep(0.01)

    def close(self) -> None:
        self._over = True
        with contextlib.suppress(OSError):  # wakes the thread, which then closes all
            socket.create_connection(("127.0.0.1", self.to.port), timeout=1).close()

    # ---- in a thread of its own

    def _listen(self) -> None:
        while not self._over:
            for key, _ in self._selector.select():
                if key.fileobj is self._server:
                    self._accept()
                else:
                    self._hear(key.fileobj)  # type: ignore[arg-type]  # only sockets are registered
        with self._lock:
            for open_line in (*self._names, *self._greetings, self._server):
                open_line.close()
        self._selector.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            line, _ = self._server.accept()
            line.setblocking(False)
            line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in PROBES:
                if hasattr(socket, option):
                    line.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
            self._greetings[line] = b""
            self._selector.register(line, selectors.EVENT_READ)

    def _hear(self, line: socket.socket) -> None:
        try:
            said = line.recv(GREETING_BYTES)
        except BlockingIOError:
            return
        except OSError:
            said = b""
        if not said or line in self._names:  # a line that was greeted has nothing more to say
            self._end(line)
            return
        self._greetings[line] += said
        if self._greetings[line].endswith(b"\n"):
            self._greet(line, self._greetings.pop(line))
        elif len(self._greetings[line]) > GREETING_BYTES:
            self._end(line)

    def _greet(self, line: socket.socket, greeting: bytes) -> None:
        name = name_in(greeting, self.to.secret)
        if name is None:
            self._end(line)
            return
        with self._lock:
            self._names[line], self._whole[name] = name, line
            self._broken.pop(name, None)

    def _end(self, line: socket.socket) -> None:
        self._selector.unregister(line)
        line.close()
        self._greetings.pop(line, None)
        with self._lock:
            name = self._names.pop(line, None)
            if name is not None and self._whole.get(name) is line:  # else it has another one since
                del self._whole[name]
                self._broken[name] = time.monotonic()


def name_in(greeting: bytes, secret: str) -> str | None:
    """The name that a greeting tells; None: it does not know the secret."""
    try:
        told = json.loads(greeting)
        known = hmac.compare_digest(str(told["secret"]), secret)
        return str(told["name"]) if known else None
    except (ValueError, KeyError, TypeError):
        return None


def judged(
    homes: Mapping[str, str], whole: Collection[str], broken: Mapping[str, float], now: float
) -> tuple[Gone, set[str]]:
    """What is gone, and nodes that may be, but for which it is too early. homes: the node of each process; broken: when."""
    lines: dict[str, list[str]] = defaultdict(list)
    for name, node in homes.items():
        if name in whole or name in broken:
            lines[node].append(name)
    nodes, unsettled = set(), set()
    for node, names in lines.items():
        if any(name in whole for name in names):
            continue
        since = now - max(broken[name] for name in names)
        if since >= (SETTLE_S if len(names) > 1 else ALONE_S):
            nodes.add(node)
        elif len(names) > 1:
            unsettled.add(node)
    late = {name for name in homes if name in broken and now - broken[name] >= TELLS_S}
    return Gone(frozenset(nodes), frozenset(late)), unsettled
