"""Mesh arithmetic: ranks and coordinates are inverse, groups partition the world."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytron.config import MeshConfig
from raytron.plan.mesh import AXES, Coords, MeshShape

shapes = st.builds(MeshShape, pp=st.integers(1, 4), dp=st.integers(1, 4), cp=st.integers(1, 3), tp=st.integers(1, 4))


@given(shapes)
def test_ranks_and_coordinates_are_inverse(mesh):
    assert [mesh.rank(mesh.coords(rank)) for rank in range(mesh.world)] == list(range(mesh.world))
    everywhere = itertools.product(*map(range, mesh.sizes))
    assert sorted(mesh.rank(Coords(*at)) for at in everywhere) == list(range(mesh.world))


@given(shapes, st.sets(st.sampled_from(AXES)))
def test_groups_partition_the_world(mesh, axes):
    groups = mesh.groups(*axes)
    assert sorted(rank for group in groups for rank in group) == list(range(mesh.world))
    assert {len(group) for group in groups} == {mesh.size(*axes)}
    for group in groups:
        assert list(group) == sorted(group)
        fixed = {tuple(getattr(mesh.coords(rank), axis) for axis in AXES if axis not in axes) for rank in group}
        assert len(fixed) == 1
        assert all(mesh.group(rank, *axes) == group for rank in group)


def test_tensor_parallel_is_innermost_and_pipeline_outermost():
    mesh = MeshShape(pp=2, dp=2, tp=2)
    assert mesh.group(0, "tp") == (0, 1)
    assert mesh.group(0, "dp") == (0, 2)
    assert mesh.group(0, "pp") == (0, 4)
    assert str(mesh.coords(6)) == "pp=1,dp=1,cp=0,tp=0"
    assert str(mesh) == "PP2·DP2·CP1·TP2"


def test_outside_and_empty_are_refused():
    mesh = MeshShape.of(MeshConfig(pp=2, tp=2))
    for call in (lambda: mesh.coords(4), lambda: mesh.rank(Coords(2, 0, 0, 0)), lambda: MeshShape(tp=0)):
        with pytest.raises(ValueError):
            call()


@settings(deadline=None)
@given(st.data())
def test_experts_fold_the_plane_on_a_grid_of_their_own(data):
    replicate, shard, cp, tp = (data.draw(st.integers(1, 3)) for _ in range(4))
    plane = shard * cp * tp
    ep = data.draw(st.sampled_from([n for n in range(1, plane + 1) if plane % n == 0]))
    etp = data.draw(st.sampled_from([n for n in range(1, plane // ep + 1) if plane // ep % n == 0]))
    mesh = MeshShape(pp=2, dp=replicate * shard, cp=cp, tp=tp, ep=ep, etp=etp, replicate=replicate)
    assert mesh.size("edp") * mesh.size("ep", "etp") == mesh.size("dp", "cp", "tp")
    for axes in (("edp",), ("eshard",), ("ep",), ("etp",), ("ep", "etp"), ("shard", "cp"), ("replicate",)):
        groups = mesh.groups(*axes)
        assert sorted(rank for group in groups for rank in group) == list(range(mesh.world))
        assert {len(group) for group in groups} == {mesh.size(*axes)}
        assert all(mesh.group(rank, *axes)[mesh.index(rank, *axes)] == rank for rank in range(mesh.world))


def test_the_parts_of_an_axis():
    mesh = MeshShape(dp=4, cp=4, tp=2, replicate=2, cp_all_to_all=2, ep=4)
    assert mesh.group(0, "tp") == (0, 1)
    assert mesh.group(0, "all_to_all") == (0, 2)
    assert mesh.group(0, "ring") == (0, 4)
    assert mesh.group(0, "shard") == (0, 8)
    assert mesh.group(0, "replicate") == (0, 16)
    assert mesh.group(5, "ep") == (4, 5, 6, 7)
    assert mesh.group(0, "eshard") == (0, 4, 8, 12)
    assert str(mesh) == "PP1·DP4·CP4·TP2·EP4"


def test_axes_that_do_not_divide_or_do_not_meet_are_refused():
    for sizes in ({"dp": 3, "replicate": 2}, {"cp": 3, "cp_all_to_all": 2}, {"dp": 2, "tp": 2, "ep": 3}):
        with pytest.raises(ValueError):
            MeshShape(**sizes)
    with pytest.raises(ValueError, match="no one grid"):
        MeshShape(dp=2, ep=2).group(0, "tp", "ep")
