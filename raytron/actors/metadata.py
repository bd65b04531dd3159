"""Notices of clouds: each answers its machines on an address of its own, over plain HTTP.

    EC2      169.254.169.254          a token (IMDSv2), then      120 s ahead; a rebalance recommendation without a date
             /latest/meta-data/spot/instance-action               (404: none)
    GCE      169.254.169.254          /computeMetadata/v1/…       30 s ahead; maintenance that ends machines with GPUs
             instance/preempted, instance/maintenance-event
    Azure    169.254.169.254          /metadata/scheduledevents   30 s ahead; for all machines of a scale set, by name

Which cloud this is, if any, its answer to a harmless question tells: within half a second, since the address does not exist
elsewhere. Not run on any of them; the tests have a server that plays each.
"""

from __future__ import annotations

import email.utils
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from datetime import datetime
from email.message import Message
from typing import Any, Literal, NamedTuple

from raytron.actors.notices import Notice, Source, SourceError

Cloud = Literal["ec2", "gce", "azure"]
Kind = Literal["auto", "none", "ec2", "gce", "azure"]
LINK_LOCAL = "http://169.254.169.254"
PROBE_S, ANSWER_S = 0.5, 2.0
LONGEST = 1 << 16  # bytes of an answer that are read
TOKEN_S = 21600  # that a token of EC2 lives
GCE_NOTICE_S = 30.0  # from a preemption to the end
LEAVING = ("Preempt", "Terminate", "Redeploy")  # events of Azure after which the machine is gone
NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))

Clock = Callable[[], float]


class Reply(NamedTuple):
    status: int
    text: str
    headers: Message  # named in any case


class Places(NamedTuple):
    """Where clouds answer."""

    ec2: str = LINK_LOCAL
    gce: str = LINK_LOCAL
    azure: str = LINK_LOCAL


def ask(url: str, headers: Mapping[str, str], timeout_s: float = ANSWER_S, method: str = "GET") -> Reply:
    """An answer, whatever its status. Raises SourceError where there is none in time."""
    request = urllib.request.Request(url, headers=dict(headers), method=method)
    try:
        with NO_PROXY.open(request, timeout=timeout_s) as reply:
            return Reply(reply.status, reply.read(LONGEST).decode(errors="replace").strip(), reply.headers)
    except urllib.error.HTTPError as error:
        with error:
            return Reply(error.code, "", error.headers)
    except (OSError, ValueError) as error:
        raise SourceError(f"{url}: {type(error).__name__}: {error}") from None
    except Exception as error:  # half an answer: http.client has errors of its own
        raise SourceError(f"{url}: no HTTP: {type(error).__name__}: {error}") from None


def understood(url: str, reply: Reply) -> str | None:
    """The text of an answer; None: there is nothing there (404). Raises SourceError for anything else."""
    if reply.status == 404:
        return None
    if reply.status != 200:
        raise SourceError(f"{url}: status {reply.status}")
    return reply.text


def _object(url: str, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise SourceError(f"{url}: not a JSON object: {text[:80]!r}")
    return found


class EC2:
    """A spot instance's interruption, and the recommendation to leave before one."""

    def __init__(self, node: str, base: str = LINK_LOCAL, clock: Clock = time.time):
        self.node, self.base, self.clock = node, base, clock
        self._token, self._renew = "", 0.0

    @classmethod
    def answers(cls, base: str) -> bool:
        """Whether this machine is one of EC2's."""
        reply = ask(f"{base}/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, PROBE_S, "PUT")
        return reply.status == 200 and bool(reply.text)

    def poll(self) -> Notice | None:
        url = "/latest/meta-data/spot/instance-action"
        text = self._get(url)
        if text is not None:
            found = _object(url, text)
            return Notice(self.node, _iso_time(found.get("time")), f"EC2 will {found.get('action', 'interrupt')} it")
        url = "/latest/meta-data/events/recommendations/rebalance"
        if self._get(url) is not None:
            return Notice(self.node, None, "EC2 recommends to rebalance: an interruption is likely", certain=False)
        return None

    def _get(self, path: str) -> str | None:
        """With a token, which is renewed half way through its life and where it is refused."""
        url = self.base + path
        for _ in range(2):
            if self.clock() >= self._renew:
                self._new_token()
            reply = ask(url, {"X-aws-ec2-metadata-token": self._token})
            if reply.status != 401:
                return understood(url, reply)
            self._renew = 0.0
        raise SourceError(f"{url}: a new token was refused")

    def _new_token(self) -> None:
        url = f"{self.base}/latest/api/token"
        token = understood(url, ask(url, {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_S)}, method="PUT"))
        if not token or not token.isprintable():
            raise SourceError(f"{url}: no token")
        self._token, self._renew = token, self.clock() + TOKEN_S / 2


class GCE:
    """A preemption, or maintenance that ends the machine."""

    HEADERS = {"Metadata-Flavor": "Google"}  # noqa: RUF012

    def __init__(self, node: str, base: str = LINK_LOCAL, clock: Clock = time.time):
        self.node, self.base, self.clock = node, base, clock
        self._seen: float | None = None  # when the preemption was

    @classmethod
    def answers(cls, base: str) -> bool:
        """Whether this machine is one of Google's."""
        reply = ask(f"{base}/computeMetadata/v1/instance/id", cls.HEADERS, PROBE_S)
        return reply.status == 200 and reply.headers.get("Metadata-Flavor") == "Google"

    def poll(self) -> Notice | None:
        preempted = self._get("preempted", ("TRUE", "FALSE"))
        if preempted == "TRUE":
            self._seen = self.clock() if self._seen is None else self._seen
            return Notice(self.node, self._seen + GCE_NOTICE_S, "Google preempts it")
        self._seen = None
        event = self._get("maintenance-event", ("NONE", "MIGRATE_ON_HOST_MAINTENANCE", "TERMINATE_ON_HOST_MAINTENANCE"))
        if event == "TERMINATE_ON_HOST_MAINTENANCE":
            return Notice(self.node, None, "Google ends it for maintenance of its host")
        return None

    def _get(self, name: str, values: tuple[str, ...]) -> str | None:
        url = f"{self.base}/computeMetadata/v1/instance/{name}"
        text = understood(url, ask(url, self.HEADERS))
        if text is not None and text not in values:
            raise SourceError(f"{url}: {text[:80]!r} is none of {', '.join(values)}")
        return text


class Azure:
    """A scheduled event that ends this machine."""

    HEADERS = {"Metadata": "true"}  # noqa: RUF012

    def __init__(self, node: str, base: str = LINK_LOCAL):
        self.node, self.base = node, base
        self._name: str | None = None

    @classmethod
    def answers(cls, base: str) -> bool:
        """Whether this machine is one of Azure's."""
        reply = ask(cls._name_url(base), cls.HEADERS, PROBE_S)
        return reply.status == 200 and bool(reply.text)

    @staticmethod
    def _name_url(base: str) -> str:
        return f"{base}/metadata/instance/compute/name?api-version=2021-02-01&format=text"

    def poll(self) -> Notice | None:
        if self._name is None:
            self._name = understood(self._name_url(self.base), ask(self._name_url(self.base), self.HEADERS))
        url = f"{self.base}/metadata/scheduledevents?api-version=2020-07-01"
        text = understood(url, ask(url, self.HEADERS))
        events = _object(url, text or "").get("Events")
        if not isinstance(events, list) or not all(isinstance(event, dict) for event in events):
            raise SourceError(f"{url}: no list of events")
        mine = [
            Notice(self.node, _http_time(event.get("NotBefore")), f"Azure will {event['EventType'].lower()} it")
            for event in events
            if event.get("EventType") in LEAVING and self._concerned(event.get("Resources"))
        ]
        return min(mine, key=lambda notice: notice.deadline or 0.0, default=None)

    def _concerned(self, resources: Any) -> bool:
        return isinstance(resources, list) and self._name in resources


def _iso_time(text: Any) -> float | None:
    """Seconds since the epoch of "2017-09-18T08:22:00Z"; None where it can't be read."""
    try:
        return datetime.fromisoformat(str(text)).timestamp()
    except (ValueError, OverflowError):
        return None


def _http_time(text: Any) -> float | None:
    """The same of "Mon, 19 Sep 2016 18:29:47 GMT"; empty once the event has begun."""
    try:
        return email.utils.parsedate_to_datetime(str(text)).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None


def cloud(places: Places = Places()) -> Cloud | None:  # noqa: B008
    """Where this machine is; takes at most a second and a half."""
    kinds: tuple[tuple[Cloud, Callable[[str], bool], str], ...] = (
        ("gce", GCE.answers, places.gce),
        ("ec2", EC2.answers, places.ec2),
        ("azure", Azure.answers, places.azure),
    )
    for name, answers, base in kinds:
        try:
            if answers(base):
                return name
        except SourceError:
            continue
    return None


def sources(kind: Kind, node: str, places: Places = Places()) -> list[Source]:  # noqa: B008
    """The cloud's source for a node, at most one. auto: of the cloud that answers."""
    found = cloud(places) if kind == "auto" else kind
    if found == "ec2":
        return [EC2(node, places.ec2)]
    if found == "gce":
        return [GCE(node, places.gce)]
    return [Azure(node, places.azure)] if found == "azure" else []
