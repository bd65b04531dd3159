import pytest

from raytron.actors.network import interface_of
from raytron.actors.placement import Bundle, address_key, fill, groups, missing, resources, seats
from raytron.config import ClusterConfig
from raytron.plan.cluster import NodeShape
from raytron.plan.mesh import MeshShape


def test_ranks_fill_whole_nodes_the_largest_first():
    assert fill(12, [4, 8, 8]) == [Bundle(0, 8), Bundle(8, 4)]
    assert fill(1, [0, 2]) == [Bundle(0, 1)]
    with pytest.raises(ValueError, match="9 workers don't fit in 8 slots"):
        fill(9, [4, 4])


@pytest.mark.parametrize(
    ("mesh", "nodes", "sizes"),
    [
        (MeshShape(dp=4, tp=4), [8, 8], [1, 1]),  # two whole replicas on each node
        (MeshShape(dp=4, tp=3), [4, 4, 4], [3]),  # replicas cross nodes
        (MeshShape(dp=4, tp=3), [6, 6], [1, 1]),
        (MeshShape(dp=2, tp=16), [8] * 4, [2, 2]),  # a replica on two nodes
        (MeshShape(pp=2, dp=4, tp=4), [8] * 4, [2, 2]),  # stages stand apart: nodes 0 and 2, 1 and 3
        (MeshShape(pp=2, tp=2), [4], [1]),
    ],
)
def test_a_group_is_the_smallest_set_of_nodes_with_whole_replicas(mesh, nodes, sizes):
    found = groups(mesh, fill(mesh.world, nodes))
    assert [len(bundles) for bundles in found] == sizes
    assert sum(bundle.workers for bundles in found for bundle in bundles) == mesh.world


def test_lower_ranks_sit_at_lower_addresses_wherever_the_bundles_went():
    mesh = MeshShape(pp=2, dp=4, tp=2)
    sets = groups(mesh, fill(mesh.world, [4] * 4))
    assert [[bundle.first for bundle in bundles] for bundles in sets] == [[0, 8], [4, 12]]
    found = seats(sets, [["10.0.0.9", "10.0.0.10"], ["10.0.0.12", "10.0.0.2"]])
    assert [found[rank] for rank in (0, 8, 4, 12)] == [(1, 1), (1, 0), (0, 0), (0, 1)]
    assert sorted(found) == list(range(16))


def test_a_smaller_bundle_keeps_its_size():
    sets = [[Bundle(0, 4), Bundle(4, 2)]]
    found = seats(sets, [["10.0.0.3", "10.0.0.1"]])
    assert {rank: bundle for rank, (_, bundle) in found.items()} == {0: 0, 1: 0, 2: 0, 3: 0, 4: 1, 5: 1}


def test_a_bundle_asks_for_all_its_workers_on_one_node():
    config = ClusterConfig(cpus_per_worker=2)
    assert resources(Bundle(0, 8), config, "cuda") == {"CPU": 16, "GPU": 8}
    assert resources(Bundle(0, 4), config, "cpu") == {"CPU": 8}


def test_what_is_missing_is_said_with_amounts():
    said = missing([{"CPU": 8, "GPU": 8}], [NodeShape("10.0.0.2", 3, 1)])
    assert said == "wanted on one node each: 8 CPU and 8 GPU; there is 10.0.0.2: 3 CPU and 1 GPU free"


def test_addresses_sort_by_number():
    assert sorted(["10.0.0.10", "head", "10.0.0.9"], key=address_key) == ["10.0.0.9", "10.0.0.10", "head"]


def test_the_interface_of_an_address():
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.7") is None
