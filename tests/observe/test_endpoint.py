"""The status endpoint: what it tells, to whom it does not, and that nothing sent to it hurts it."""

from __future__ import annotations

import http.client
import json
import socket
import time
import urllib.parse

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from raytron.errors import ConfigError
from raytron.observe import endpoint as module
from raytron.observe.endpoint import MOST_AT_ONCE, MOST_LINES, Endpoint, is_loopback
from raytron.observe.prometheus import exposition

FACTS = {"name": "tiny", "phase": "training", "step": 3, "steps": 9, "loss": float("nan"), "lost": []}
RECORD = {"step": 3, "loss": float("nan"), "grad_norm": 0.5, "grad_norm/layers.1": 0.25, "rerun": {"what": "spike"}}


class Told:
    """An endpoint and the way to it."""

    def __init__(self, events, **keys):
        self.events = events
        self.endpoint = Endpoint(lambda: FACTS, lambda: RECORD, events, **keys)
        self.port = int(self.endpoint.address.rpartition(":")[2])

    def get(self, path, method="GET", **headers):
        """(status, headers, body)"""
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request(method, path, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()
        finally:
            connection.close()

    def send(self, data):
        """Bytes as they are, and what comes back until the end; nothing more is sent."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as connection:
            try:
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
                parts = []
                while part := connection.recv(65536):
                    parts.append(part)
            except TimeoutError:
                raise
            except OSError:
                return b"reset"
        return b"".join(parts)


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    events = tmp_path_factory.mktemp("told") / "events.jsonl"
    events.write_text('{"event": "a"}\n{"event": "b"}\n{"event": "torn', encoding="utf-8")
    made = Told(events)
    yield made
    made.endpoint.close()


def test_it_tells_where_the_run_stands(told):
    status, headers, body = told.get("/status")
    assert (status, headers["Content-Type"]) == (200, "application/json")
    assert json.loads(body) == {**FACTS, "loss": None}
    assert "Access-Control-Allow-Origin" not in headers
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert told.get("/status", "HEAD")[::2] == (200, b"")
    assert b"/events?after=0" in told.get("/")[2]


def test_it_tells_figures_as_prometheus_reads_them(told):
    families = {each.name: each for each in text_string_to_metric_families(told.get("/metrics")[2].decode())}
    samples = {(s.name, s.labels.get("of")): s.value for each in families.values() for s in each.samples}
    assert samples["raytron_grad_norm", None] == 0.5
    assert samples["raytron_grad_norm", "layers.1"] == 0.25
    assert samples["raytron_steps", None] == 9
    assert samples["raytron_loss", None] != samples["raytron_loss", None]
    assert {each.type for each in families.values()} == {"gauge"}
    assert "raytron_rerun" not in families


@given(st.dictionaries(st.text(), st.floats() | st.integers(-(2**40), 2**40) | st.text() | st.booleans()), st.text())
def test_any_figures_of_any_run_are_read_back(figures, run):
    read = [s for each in text_string_to_metric_families(exposition(figures, run)) for s in each.samples]
    assert len({(s.name, s.labels.get("of", "")) for s in read}) == len(read)
    assert {s.labels["run"] for s in read} <= {run}
    numbers = [float(value) for value in figures.values() if isinstance(value, int | float)]
    assert len(read) <= len(numbers)
    assert {repr(s.value) for s in read} <= {repr(number) for number in numbers}


def test_it_tells_events_from_a_line_on(told, tmp_path):
    assert told.get("/events")[2] == b'{"event": "a"}\n{"event": "b"}\n'
    assert told.get("/events?after=1")[2] == b'{"event": "b"}\n'
    assert told.get("/events?after=7")[2] == b""
    endpoint = told.endpoint
    many = tmp_path / "events.jsonl"
    many.write_text("".join(f'{{"number": {number}}}\n' for number in range(2500)), encoding="utf-8")
    endpoint.events, before = many, endpoint.events
    try:
        known = 0
        while lines := told.get(f"/events?after={known}")[2].splitlines():
            assert len(lines) <= MOST_LINES
            assert json.loads(lines[0]) == {"number": known}
            known += len(lines)
        assert known == 2500
        endpoint.events = tmp_path / "none"
        assert told.get("/events")[::2] == (200, b"")
    finally:
        endpoint.events = before


@pytest.mark.parametrize(
    "path",
    [
        "/events?after=-1",
        "/events?after=x",
        "/events?after=1&after=2",
        "/events?after=٣",
        "/status?x=1",
        "/events?&&&&&&",
    ],
)
def test_what_it_can_not_read_is_refused(told, path):
    assert told.get(urllib.parse.quote(path, safe="/?&=-"))[0] == 400


def test_it_only_tells(told):
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "BREW"):
        status, headers, _ = told.get("/status", method)
        assert (status, headers["Allow"]) == (405, "GET, HEAD")
    assert told.get("/../config.yaml")[0] == 404
    assert told.get("/status", Content_Length="5")[0] == 413
    assert told.get("/status", Transfer_Encoding="chunked")[0] == 413


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "evil.example:80", "localhost@evil", ""])
def test_a_page_under_another_name_is_refused(told, host):
    assert told.get("/status", Host=host)[0] == 421


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8080", "127.0.0.1", "[::1]:80"])
def test_a_tunnel_may_end_at_another_port(told, host):
    assert told.get("/status", Host=host)[0] == 200


def test_what_a_browser_asks_for_another_site_is_refused(told):
    assert told.get("/status", Sec_Fetch_Site="cross-site")[0] == 403
    assert told.get("/status", Origin="https://evil.example")[0] == 403
    assert told.get("/status", Sec_Fetch_Site="none")[0] == 200
    twice = b"GET /status HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n"
    assert told.send(twice).startswith(b"HTTP/1.0 421")


def test_a_token_is_asked_for(tmp_path):
    told = Told(tmp_path / "events.jsonl", token="s3cret")
    try:
        assert told.get("/status", Authorization="Bearer s3cret")[0] == 200
        for shown in ("Bearer s3cre", "Bearer s3cret ", "bearer s3cret", "s3cret", "Basic s3cret", "Bearer \xff", ""):
            status, headers, body = told.get("/metrics", Authorization=shown)
            assert (status, headers["WWW-Authenticate"]) == (401, "Bearer"), shown
            assert b"raytron_" not in body
        assert told.get("/status")[0] == 401
        assert told.get("/none")[0] == 401
    finally:
        told.endpoint.close()


@pytest.mark.parametrize("host", ["0.0.0.0", "10.1.2.3", "::", "node-7", "localhost.example"])
def test_other_hosts_than_loopback_need_a_token(tmp_path, host):
    assert not is_loopback(host)
    with pytest.raises(ConfigError) as caught:
        Endpoint(dict, dict, tmp_path / "events.jsonl", host=host)
    (problem,) = caught.value.problems
    assert problem.where == "observe.host"
    assert "RAY_AUTH_MODE=token" in problem.remedy


def test_with_a_token_it_listens_everywhere(tmp_path):
    told = Told(tmp_path / "events.jsonl", host="0.0.0.0", token="s3cret")
    try:
        assert told.get("/status", Host="node-7:9000", Authorization="Bearer s3cret")[0] == 200
        assert told.get("/status", Host="node-7:9000")[0] == 401
    finally:
        told.endpoint.close()


def test_a_port_that_is_taken_says_so(told, tmp_path):
    with pytest.raises(ConfigError, match=rf"observe.port: {told.port} on 127.0.0.1 can't be listened on: Address"):
        Endpoint(dict, dict, tmp_path / "events.jsonl", port=told.port)


def test_it_opens_again_at_the_same_port(tmp_path):
    first = Told(tmp_path / "events.jsonl")
    assert first.get("/status")[0] == 200
    first.endpoint.close()
    second = Told(tmp_path / "events.jsonl", port=first.port)
    assert second.get("/status")[0] == 200
    second.endpoint.close()


def test_what_fails_inside_ends_in_its_own_thread(tmp_path, capfd):
    def fail():
        raise KeyError("/home/someone/secret")

    told = Told(tmp_path / "events.jsonl")
    told.endpoint.facts = fail
    try:
        status, _, body = told.get("/status")
        assert (status, body) == (500, b"KeyError\n")
        told.endpoint.facts = lambda: FACTS
        assert told.get("/status")[0] == 200
    finally:
        told.endpoint.close()
    assert capfd.readouterr().err == ""


def test_who_does_not_finish_is_sent_away_and_only_so_many_are_let_in(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE_S", 1.5)
    told = Told(tmp_path / "events.jsonl")
    try:
        slow = [socket.create_connection(("127.0.0.1", told.port), timeout=10) for _ in range(MOST_AT_ONCE)]
        for each in slow:
            each.sendall(b"GET /status HTTP/1.1\r\n")
        with pytest.raises((http.client.HTTPException, ConnectionError)):
            told.get("/status")
        assert all(each.recv(100).startswith(b"HTTP/1.0 408") for each in slow)
        for each in slow:
            each.close()
        deadline = time.monotonic() + 10
        while told.send(b"GET /status HTTP/1.1\r\nHost: localhost\r\n\r\n")[:12] != b"HTTP/1.0 200":
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        told.endpoint.close()


def test_what_is_too_long_is_not_read(told):
    head = b"GET /status HTTP/1.1\r\nHost: localhost\r\n"
    for length in (17_000, 40_000, 4_000_000):
        assert told.send(head + b"X: " + b"x" * length)[:12] in (b"HTTP/1.0 431", b"reset")
    assert told.get("/" + "a" * 15_000)[0] == 404


words = st.sampled_from(
    [b"GET", b"POST", b"/status", b"/events?after=", b"HTTP/1.1", b"HTTP/0.9", b"HTTP/9.9", b"Host: localhost", b"Host:",
     b"\r\n", b"\n", b" ", b"\r\n\r\n", b"Authorization: Bearer ", b"Content-Length: -1", b"\x00", b"%00", b"//[", b"?&="]
)  # fmt: skip


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(words | st.binary(max_size=30), max_size=12).map(b"".join))
def test_garbage_is_answered_or_dropped_and_it_goes_on(told, data):
    answer = told.send(data)
    assert answer in (b"", b"reset") or answer.startswith(b"HTTP/1.0 ")
    assert b" 500 " not in answer.partition(b"\r\n")[0]


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.text(st.characters(codec="latin-1", exclude_characters=" \r\n\t\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0"), max_size=40),
    st.text(st.characters(codec="latin-1", exclude_characters="\r\n"), max_size=40),
)
def test_no_path_and_no_host_get_more_than_they_should(told, path, host):
    lines = f"GET /{path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode("latin-1")
    code = int(told.send(lines).split(b" ")[1])
    assert code in (400, 404, 421) or (code == 200 and module.HOST.fullmatch(host.strip()))
