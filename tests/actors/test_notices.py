"""Notices of clouds, from a server that plays each; and a watcher that tells of each notice once."""

from __future__ import annotations

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from raytron.actors import metadata
from raytron.actors.metadata import EC2, GCE, Azure, Places, cloud, sources
from raytron.actors.notices import Fake, Notice, SourceError, Watcher

NODE = "node-a"
TOKEN = "AQAEA-token"
ACTION = '{"action": "terminate", "time": "2030-09-18T08:22:00Z"}'
ACTION_TIME = 1915950120.0


class Server:
    """A metadata service: answers by path, (status, text), and what each cloud demands of a question."""

    def __init__(self):
        self.answers, self.tokens, self.asked, self.delay_s, self.raw = {}, {TOKEN}, [], 0.0, None
        self.kind = None
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_PUT(self):
                server.asked.append(self.path)
                if server.kind != "ec2" or "X-aws-ec2-metadata-token-ttl-seconds" not in self.headers:
                    return self.answer(405, "")
                self.answer(200, next(iter(server.tokens)))

            def do_GET(self):
                server.asked.append(self.path)
                time.sleep(server.delay_s)
                if server.raw is not None:
                    self.wfile.write(server.raw)
                    return None
                needed = {"gce": ("Metadata-Flavor", "Google"), "azure": ("Metadata", "true")}.get(server.kind)
                if server.kind == "ec2" and self.headers.get("X-aws-ec2-metadata-token") not in server.tokens:
                    return self.answer(401, "")
                if needed is not None and self.headers.get(needed[0]) != needed[1]:
                    return self.answer(403, "")
                return self.answer(*server.answers.get(self.path.partition("?")[0], (404, "no such thing")))

            def answer(self, status, text):
                self.send_response(status)
                if server.kind == "gce":
                    self.send_header("Metadata-Flavor", "Google")
                self.end_headers()
                self.wfile.write(text.encode())

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.handle_error = lambda *_: None  # whoever asked has gone
        self.base = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def plays(self, kind, **answers):
        self.kind = kind
        names = {
            "instance_action": "/latest/meta-data/spot/instance-action",
            "rebalance": "/latest/meta-data/events/recommendations/rebalance",
            "gce_id": "/computeMetadata/v1/instance/id",
            "preempted": "/computeMetadata/v1/instance/preempted",
            "maintenance": "/computeMetadata/v1/instance/maintenance-event",
            "name": "/metadata/instance/compute/name",
            "events": "/metadata/scheduledevents",
        }
        self.answers = {
            names[key]: value if isinstance(value, tuple) else (200, value) for key, value in answers.items()
        }
        return self


@pytest.fixture
def server():
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


# ---- EC2


def test_ec2_says_nothing_until_it_does(server):
    source = EC2(NODE, server.plays("ec2").base)
    assert source.poll() is None
    server.plays("ec2", instance_action=ACTION)
    assert source.poll() == Notice(NODE, ACTION_TIME, "EC2 will terminate it")
    assert source.poll() == source.poll()
    server.plays("ec2")
    assert source.poll() is None


def test_ec2_asks_for_a_token_once_and_again_when_it_is_refused(server):
    source = EC2(NODE, server.plays("ec2").base)
    source.poll()
    source.poll()
    assert server.asked.count("/latest/api/token") == 1
    server.tokens = {"another"}
    assert source.poll() is None
    assert server.asked.count("/latest/api/token") == 2


def test_ec2_renews_its_token_in_time(server):
    now = [0.0]
    source = EC2(NODE, server.plays("ec2").base, clock=lambda: now[0])
    now[0] = 1.0
    source.poll()
    now[0] = metadata.TOKEN_S
    source.poll()
    assert server.asked.count("/latest/api/token") == 2


def test_ec2_without_a_token_is_an_error_not_silence(server):
    server.plays("ec2")
    server.tokens = {""}
    with pytest.raises(SourceError, match="no token"):
        EC2(NODE, server.base).poll()
    server.tokens = {"a", "b"}  # gives one and then takes neither
    source = EC2(NODE, server.base)
    source.poll()
    server.plays("other")
    server.answers = {"/latest/meta-data/spot/instance-action": (401, "")}
    with pytest.raises(SourceError):
        source.poll()


def test_a_rebalance_recommendation_is_not_certain(server):
    found = EC2(NODE, server.plays("ec2", rebalance='{"noticeTime": "2030-01-01T00:00:00Z"}').base).poll()
    assert found is not None
    assert (found.deadline, found.certain) == (None, False)


# ---- Google


def test_google_preempts_thirty_seconds_ahead(server):
    now = [1000.0]
    server.plays("gce", preempted="FALSE", maintenance="NONE")
    source = GCE(NODE, server.base, clock=lambda: now[0])
    assert source.poll() is None
    server.plays("gce", preempted="TRUE\n", maintenance="NONE")
    assert source.poll() == Notice(NODE, 1030.0, "Google preempts it")
    now[0] = 1010.0
    assert source.poll() == Notice(NODE, 1030.0, "Google preempts it"), "the deadline does not move"


@pytest.mark.parametrize(("event", "leaves"), [("MIGRATE", False), ("TERMINATE", True)])
def test_google_ends_a_machine_for_maintenance_or_moves_it(server, event, leaves):
    server.plays("gce", preempted="FALSE", maintenance=f"{event}_ON_HOST_MAINTENANCE")
    assert (GCE(NODE, server.base).poll() is not None) is leaves


# ---- Azure


def event(kind="Preempt", resources=("vm_1",), when="Mon, 19 Sep 2030 18:29:47 GMT"):
    return {"EventId": "x", "EventType": kind, "Resources": list(resources), "NotBefore": when}


def events(*each):
    return str({"DocumentIncarnation": 2, "Events": list(each)}).replace("'", '"')


AZURE_TIME = 1916072987.0


@pytest.mark.parametrize(
    ("text", "deadline"),
    [
        (events(), "none"),
        (events(event()), AZURE_TIME),
        (events(event(when="")), None),  # it has begun
        (events(event(resources=["vm_2", "vm_1"])), AZURE_TIME),
        (events(event(resources=["vm_2"])), "none"),
        (events(event("Freeze")), "none"),
        (events(event("Reboot", when="")), "none"),
        (events(event("Terminate"), event(when="Mon, 19 Sep 2030 18:29:40 GMT")), AZURE_TIME - 7),
    ],
)
def test_azure_schedules_events_for_machines_by_name(server, text, deadline):
    found = Azure(NODE, server.plays("azure", name="vm_1", events=text).base).poll()
    assert ("none" if found is None else found.deadline) == deadline


# ---- what goes wrong


GARBAGE = ["", "<html>proxy</html>", "[1, 2]", "null", '"text"', "{", "[" * 100_000, "\x00\xff"]


@pytest.mark.parametrize("text", GARBAGE, ids=lambda text: repr(text[:12]))
@pytest.mark.parametrize("kind", ["ec2", "gce", "azure"])
def test_nonsense_is_an_error(server, kind, text):
    answers = {"ec2": {"instance_action": text}, "gce": {"preempted": text}, "azure": {"name": "vm_1", "events": text}}
    server.plays(kind, **answers[kind])
    with pytest.raises(SourceError):
        {"ec2": EC2, "gce": GCE, "azure": Azure}[kind](NODE, server.base).poll()


@pytest.mark.parametrize("text", ['{"Events": 3}', '{"Events": [3]}', "{}"])
def test_events_that_are_no_events_are_an_error(server, text):
    with pytest.raises(SourceError, match="no list of events"):
        Azure(NODE, server.plays("azure", name="vm_1", events=text).base).poll()


def test_an_interruption_whose_time_can_not_be_read_is_one_for_now(server):
    found = EC2(NODE, server.plays("ec2", instance_action='{"action": "stop", "time": "soon"}').base).poll()
    assert found == Notice(NODE, None, "EC2 will stop it")


@pytest.mark.parametrize("status", [403, 500, 503])
def test_another_status_is_an_error(server, status):
    with pytest.raises(SourceError, match=f"status {status}"):
        GCE(NODE, server.plays("gce", preempted=(status, "")).base).poll()


@pytest.mark.parametrize("raw", [b"", b"not http at all\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\nhalf"])
def test_half_an_answer_is_an_error(server, raw):
    server.plays("gce")
    server.raw = raw
    with pytest.raises(SourceError):
        GCE(NODE, server.base).poll()


def test_a_slow_service_is_not_waited_for(server, monkeypatch):
    monkeypatch.setattr(metadata, "PROBE_S", 0.1)
    server.plays("gce", gce_id="1")
    server.delay_s = 5.0
    start = time.monotonic()
    assert cloud(Places(server.base, server.base, server.base)) is None
    assert time.monotonic() - start < 3.0


def test_nobody_there_is_an_error_at_once(server):
    server.http.server_close()
    with pytest.raises(SourceError):
        EC2(NODE, server.base).poll()


@pytest.mark.parametrize("kind", ["ec2", "gce", "azure"])
def test_the_cloud_that_answers_is_the_one(server, kind):
    server.plays(kind, gce_id="42", name="vm_1", preempted="FALSE", maintenance="NONE", events=events())
    places = Places(server.base, server.base, server.base)
    assert cloud(places) == kind
    (source,) = sources("auto", NODE, places)
    assert type(source).__name__.lower() == kind
    assert source.poll() is None


def test_sources_by_name():
    assert sources("none", NODE) == []
    assert [type(sources(kind, NODE)[0]) for kind in ("ec2", "gce", "azure")] == [EC2, GCE, Azure]


# ---- the watcher


FIRST, SECOND = Notice(NODE, 10.0, "one"), Notice(NODE, 5.0, "two")


def watch(*answers, told=None):
    """What a watcher says of a source's answers, asked once for each."""
    said = []
    source = Fake(*answers)
    watcher = Watcher(list, told or said.append, lambda notice: said.append(("withdrawn", notice)))
    for _ in answers:
        watcher.ask(0, source)
    return said, watcher


def test_a_notice_is_told_once():
    assert watch(None, FIRST, FIRST, FIRST)[0] == [FIRST]


def test_a_notice_that_changes_is_told_again():
    assert watch(FIRST, SECOND, SECOND)[0] == [FIRST, SECOND]


def test_a_notice_that_disappears_is_withdrawn_and_may_come_again():
    assert watch(FIRST, None, None, FIRST)[0] == [FIRST, ("withdrawn", FIRST), FIRST]


def test_an_error_withdraws_nothing():
    said, watcher = watch(FIRST, SourceError("no answer"), SourceError("no answer"), FIRST)
    assert said == [FIRST]
    assert watcher.error == "no answer"


def test_who_could_not_be_told_is_told_again():
    calls = []

    def told(notice):
        calls.append(notice)
        if len(calls) == 1:
            raise ConnectionError("nobody there")

    assert watch(FIRST, FIRST, FIRST, told=told)[1].error == "ConnectionError: nobody there"
    assert calls == [FIRST, FIRST]


def test_a_watcher_asks_in_a_thread_of_its_own():
    said, seen = [], threading.Event()
    sources = [Fake(SourceError("no")), Fake(None, None, FIRST)]
    watcher = Watcher(lambda: sources, lambda notice: (said.append(notice), seen.set()), poll_s=0.01)
    watcher.start()
    assert seen.wait(5)
    time.sleep(0.2)
    watcher.close()
    polls = [source.polls for source in sources]
    assert said == [FIRST]
    assert polls[0] < polls[1], "who always fails is asked less often"
    time.sleep(0.1)
    assert [source.polls for source in sources] == polls, "closed is closed"


def test_without_sources_a_watcher_ends():
    watcher = Watcher(list, lambda notice: None)
    watcher.start()
    watcher._thread.join(5)
    assert not watcher._thread.is_alive()
    watcher.close()
