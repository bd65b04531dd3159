"""What a raylet starts in place of Ray's own `setup_worker.py`: hands its command over to the fork server, whose socket lies
beside the link that this file is called by. It imports next to nothing, since it runs once for each worker."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys

CONTEXT = "--serialized-runtime-env-context="
LANGUAGE = "--language="


def main() -> None:
    link, *arguments = sys.argv
    plain = all(json.loads(each[len(CONTEXT) :]) == {} for each in arguments if each.startswith(CONTEXT))
    if not plain or f"{LANGUAGE}PYTHON" not in arguments:
        start_as_ever(arguments)
    told = {
        "command": [each for each in arguments if not each.startswith((CONTEXT, LANGUAGE))],
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    }
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(os.path.join(os.path.dirname(link), "socket"))
        text = json.dumps(told).encode()
        sent = socket.send_fds(server, [text], [0, 1, 2])
        server.sendall(text[sent:])


def start_as_ever(arguments: list[str]) -> None:
    """By Ray's own script, which lies beside that of the worker."""
    worker = next(each for each in arguments if each.endswith(".py"))
    usual = os.path.join(os.path.dirname(worker), "setup_worker.py")
    os.execv(sys.executable, [sys.executable, usual, *arguments])


if __name__ == "__main__":
    main()
