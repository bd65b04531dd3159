"""make_plan: what it decides, what it refuses, and that it is quick, small and one page."""

import itertools
import pickle
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from raytron import presets
from raytron.config import SCHEDULE_CHUNKS, RunConfig
from raytron.errors import ConfigError
from raytron.plan import draw
from raytron.plan.cluster import on_paper
from raytron.plan.draw import COLUMNS, mesh_text, schedule_svg, schedule_text, size, table
from raytron.plan.mesh import MeshShape
from raytron.plan.plan import ClusterShape, NodeShape, make_plan
from raytron.plan.schedule import generate, interleaved

CONFIG = RunConfig().replace(**{"mesh.tp": 2, "mesh.pp": 2, "global_batch_size": 8})
ROOT = Path(__file__).parents[2]


def problems_of(config, cluster):
    with pytest.raises(ConfigError) as caught:
        make_plan(config, cluster)
    return caught.value.problems


def test_a_plan_holds_its_decisions_and_travels():
    plan = make_plan(CONFIG, ClusterShape.local(4))
    assert plan.mesh == MeshShape(pp=2, tp=2)
    assert plan.stages == ((0, 3), (3, 4))
    assert plan.schedule.rank_of == plan.evaluation.rank_of == (0, 1)
    assert plan.evaluation.forward_only
    assert plan.tokens_per_step == 8 * 256
    assert 0 < plan.bubble < 0.5
    assert pickle.loads(pickle.dumps(plan)) == plan


def test_a_given_split_is_kept():
    plan = make_plan(CONFIG.replace(**{"pipeline.split": [1, 3]}), None)
    assert plan.stages == ((0, 1), (1, 4))


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb-h1", "interleaved"])
def test_a_plan_is_one_page(schedule):
    chunks = 2 if schedule == "interleaved" else 1
    changes = {"pipeline.schedule": schedule, "pipeline.virtual_stages": chunks, "mesh.pp": 16, "model.layers": 64}
    plan = make_plan(CONFIG.replace(**changes, global_batch_size=128), None)
    lines = str(plan).splitlines()
    assert len(lines) <= 45
    assert max(map(len, lines)) <= 110
    for word in (schedule, "bubble", "stages", "PP16·DP1·CP1·TP2", "weights", "per token", "of 16 ranks"):
        assert word in str(plan)


def test_a_plan_takes_a_moment():
    config = CONFIG.replace(**{"mesh.pp": 16, "model.layers": 126, "pipeline.schedule": "zb-h1"}, global_batch_size=128)
    start = time.process_time()
    make_plan(config, None)
    assert time.process_time() - start < 0.3


def test_a_mesh_larger_than_the_cluster_says_what_is_there():
    (problem,) = problems_of(CONFIG, ClusterShape.local(2))
    assert problem.where == "mesh"
    assert "needs 4 workers of 1 CPU each" in problem.what
    assert "1 node with 2 CPUs" in problem.what
    assert "room for 2" in problem.what
    assert "0.5 or less" in problem.remedy
    assert make_plan(CONFIG.replace(**{"cluster.cpus_per_worker": 0.5}), ClusterShape.local(2))


def test_gpus_count_where_the_cluster_has_some():
    node = NodeShape("a", cpus=64, gpus=2, device_name="NVIDIA H100")
    (problem,) = problems_of(CONFIG, ClusterShape((node,)))
    assert "and 1 GPU each" in problem.what
    assert "2 GPUs" in problem.what
    assert "cluster.device to cpu" in problem.remedy
    plan = make_plan(CONFIG, ClusterShape((node, node)))
    assert plan.cluster is not None
    assert plan.cluster.device_name == "NVIDIA H100"
    assert make_plan(CONFIG.replace(**{"cluster.device": "cpu"}), ClusterShape((node,)))


def test_all_problems_come_at_once():
    found = problems_of(CONFIG.replace(steps=0, global_batch_size=0), ClusterShape.local(1))
    assert {problem.where for problem in found} == {"steps", "global_batch_size", "mesh"}


def test_warnings_name_what_will_hardly_do():
    small = ClusterShape((NodeShape("a", cpus=4, memory_bytes=10**6),))
    assert "needs about" in str(make_plan(CONFIG, small))
    nodes = ClusterShape(tuple(NodeShape(name, cpus=4, gpus=1) for name in "abcd"))
    (warning,) = make_plan(CONFIG, nodes).warnings
    assert "crosses nodes" in warning


def test_a_drawing_shows_each_action():
    drawn = schedule_text(generate("1f1b", 2, 1, 3)).splitlines()[:2]
    assert all(line in draw.__doc__ for line in drawn)
    text = schedule_text(generate("1f1b", 2, 1, 4))
    assert text.splitlines()[0] == "rank 0 │F0F1....B0==F2B1==F3B2==..B3=="
    assert text.splitlines()[1] == "rank 1 │..F0B0==F1B1==F2B2==F3B3==...."
    assert "f1" in schedule_text(interleaved(2, 2, 2))
    assert "W weight gradient" in schedule_text(generate("zb-h1", 2, 1, 2))


def test_a_large_drawing_is_cut_and_says_so():
    text = schedule_text(generate("1f1b", 32, 1, 64), rows=8)
    assert max(map(len, text.splitlines())) <= COLUMNS
    assert "units of time, 7 of 32 ranks" in text
    assert "rank 31" in text


@pytest.mark.parametrize("name", [name for name in SCHEDULE_CHUNKS if name != "auto"])
def test_every_schedule_is_drawn_whole(name):
    """As SVG with every action in its place, none over another; as text with every action of every rank."""
    schedule = generate(name, 2, SCHEDULE_CHUNKS[name][0], 4)
    root = ElementTree.fromstring(schedule_svg(schedule))
    space = "{http://www.w3.org/2000/svg}"
    titles = [item.text for item in root.iter(f"{space}title")]
    assert sorted(titles) == sorted(str(action) for row in schedule.rows for action in row)
    boxes = [(float(b.get("y")), float(b.get("x")), float(b.get("width"))) for b in root.iter(f"{space}rect")]
    for (y, x, width), (below, right, _) in itertools.pairwise(sorted(boxes)):
        assert y < below or x + width <= right
    for row, line in zip(schedule.rows, schedule_text(schedule, columns=400).splitlines(), strict=False):
        assert sum(letter.isalpha() for letter in line.split("│")[1]) == len(row)


def test_small_drawings():
    assert (
        mesh_text(MeshShape(pp=2, tp=2)) == "PP2·DP1·CP1·TP2: 4 ranks\n  pp 0  dp 0  ranks 0 1\n  pp 1  dp 0  ranks 2 3"
    )
    assert len(mesh_text(MeshShape(pp=8, dp=8)).splitlines()) == 17
    assert table(["a", "b"], [["x", "10"]]) == "a   b\nx  10"
    assert [size(n) for n in (5, 2048, 3 << 30)] == ["5 B", "2.00 KiB", "3.00 GiB"]


def test_planning_imports_neither_torch_nor_ray():
    code = "import sys, raytron.plan.plan, raytron.presets; print(sorted({'torch', 'ray', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_the_example_prints_a_plan():
    command = [sys.executable, str(ROOT / "examples" / "01_plan_on_paper.py"), "llama3_70b_64xh100"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert "70.55 billion parameters" in done.stdout
    assert "interleaved" in done.stdout


def test_presets_fit_their_devices():
    bytes_of = {"h100": 80e9, "h200": 141e9}
    for name in presets.names():
        hardware = name.rsplit("_", 1)[-1]
        count, device = hardware.split("x", 1)
        plan = make_plan(presets.find(name), None)
        assert plan.mesh.world == int(count), name
        if device in bytes_of:
            assert plan.memory.largest < 0.8 * bytes_of[device], name


def test_a_cluster_on_paper():
    cluster = on_paper("20xH100")
    assert [node.gpus for node in cluster.nodes] == [8, 8, 4]
    assert cluster.device_name == "H100"
    assert on_paper("6xA100 80GB:4").nodes[1].gpus == 2
    assert on_paper("4xcpu").cpus == 4
    with pytest.raises(ConfigError, match="names no hardware"):
        on_paper("many")


def test_a_mesh_that_is_larger_than_the_cluster_on_paper_is_refused():
    config = RunConfig().replace(**{"mesh.dp": 16, "cluster.device": "cuda"})
    with pytest.raises(ConfigError, match="room for 8"):
        make_plan(config, on_paper("8xH100"))
