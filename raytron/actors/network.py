"""Which network interface carries a node's address, so that gloo and NCCL talk where Ray talks.

Left alone, gloo looks up the host's name and falls back to 127.0.0.1 on hosts with several interfaces.
"""

from __future__ import annotations

import os
import socket
import struct
import sys

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
