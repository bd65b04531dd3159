"""Whole runs whose samples come by other ways: the same samples, so the same losses to the bit."""

from __future__ import annotations

import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tiny_run import TINY

from raytron.actors.run import train
from raytron.config import load
from raytron.observe.records import read_records


class Ranges(SimpleHTTPRequestHandler):
    """Serves a folder, parts of files too; notes the shards that were asked for whole, and what parts were."""

    whole: list[str] = []  # noqa: RUF012
    parts: list[tuple[str, str]] = []  # noqa: RUF012

    def log_message(self, *_):
        pass

    def do_GET(self):
        asked, path = self.headers.get("Range"), Path(self.translate_path(self.path))
        if asked is None or not path.is_file():
            self.whole += [path.name] if path.suffix == ".arrow" and path.exists() else []
            super().do_GET()
            return
        self.parts.append((path.name, asked))
        content = path.read_bytes()
        start, stop = (int(part) for part in asked.removeprefix("bytes=").split("-"))
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{stop}/{len(content)}")
        self.send_header("Content-Length", str(len(content[start : stop + 1])))
        self.end_headers()
        self.wfile.write(content[start : stop + 1])


@pytest.fixture
def served(dataset):
    """The URL of a data set on a web server of this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Ranges, directory=str(dataset)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def losses(tmp_path, dataset, name, recovery=None, **data):
    made = {**TINY, "name": f"feed-{name}", "run_dir": str(tmp_path / name), "steps": 3, "recovery": recovery or {}}
    result = train(load({**made, "data": {"dataset": str(dataset), "packing": "best_fit", **data}}), quiet=True)
    assert result.status == "complete"
    records = list(read_records(tmp_path / name / "metrics.jsonl"))
    assert all(0 <= record["data_wait_s"] <= record["step_time_s"] for record in records)
    return [record["loss"] for record in records], result.validation_loss


@pytest.mark.slow
def test_every_way_gives_the_same_samples(tmp_path, dataset, served):
    plain = losses(tmp_path, dataset, "plain", prefetch=0)
    assert losses(tmp_path, served, "served") == plain
    together = len(Ranges.parts)
    assert losses(tmp_path, served, "apart", recovery={"memory_every": None}) == plain
    apart = len(Ranges.parts) - together
    assert together < apart, "the two stages of a pipeline train on what one of them has fetched"
    assert losses(tmp_path, dataset, "ahead") == plain
    assert losses(tmp_path, dataset, "ray-data", feed="ray_data") == plain
    assert not Ranges.whole
