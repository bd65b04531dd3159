"""Connections between nodes: which interface carries a node's address, and how to give up those to a node that is gone.

Left alone, gloo looks up the host's name and falls back to 127.0.0.1 on hosts with several interfaces. And it waits for a
node that has lost its power, which closes no connection, until a collective's timeout.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import struct
import sys
from collections.abc import Collection
from pathlib import Path

VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
SIOCGIFADDR = 0x8915  # "get interface address", linux/sockios.h


def interface_of(ip: str) -> str | None:
    """The name of the interface that has an IPv4 address; None where it can't be told."""
    if sys.platform != "linux":
        return None
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)
            except OSError:  # an interface without an IPv4 address
                continue
            if socket.inet_ntoa(answer[20:24]) == ip:
                return name
    return None


def bind_to(ip: str) -> None:
    """Points gloo and NCCL at the interface of an address, where the environment does not choose already."""
    name = interface_of(ip)
    if name is not None:
        for variable in VARIABLES:
            os.environ.setdefault(variable, name)


def cut(addresses: Collection[str]) -> int:
    """Ends all TCP connections of this process to some IP addresses, so that who waits there gets an error at once; how many
    there were. On other systems than Linux none."""
    count, place = 0, Path("/proc/self/fd")
    for name in os.listdir(place) if place.is_dir() else ():
        with contextlib.suppress(OSError):  # closed meanwhile, or not connected yet
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as line:
                if line.family not in (socket.AF_INET, socket.AF_INET6) or line.type != socket.SOCK_STREAM:
                    continue
                if line.getpeername()[0].removeprefix("::ffff:") in addresses:
                    line.shutdown(socket.SHUT_RDWR)
                    count += 1
    return count
