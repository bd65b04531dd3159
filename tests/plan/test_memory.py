"""Bytes per rank on paper: sums over ranks equal the whole, and each way of cutting saves what it should.

That the count equals what ranks really hold is shown in tests/parity/test_memory_count.py.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytron.config import RunConfig
from raytron.plan.cluster import on_paper
from raytron.plan.flops import parameters
from raytron.plan.live import Held, kept_after_each
from raytron.plan.plan import make_plan
from raytron.plan.recompute import treatments
from raytron.plan.schedule import Action, Schedule, generate
from raytron.presets import find

BASE = RunConfig().replace(**{"global_batch_size": 32, "model.layers": 8})


def config(**overrides):
    return BASE.replace(**{key.replace("__", "."): value for key, value in overrides.items()})


def memory(**overrides):
    return make_plan(config(**overrides), None).memory


@settings(max_examples=25, deadline=None)
@given(pp=st.sampled_from([1, 2, 4]), tied=st.booleans(), kind=st.sampled_from(["rmsnorm", "layernorm"]))
def test_stages_sum_to_the_model(pp, tied, kind):
    changes = {"mesh.pp": pp, "model.tied_embeddings": tied, "model.norm": kind, "model.bias": True}
    made = BASE.replace(**changes, **{"model.qkv_bias": True, "model.qk_norm": True, "model.positions": "learned"})
    total = sum(rank.parameters for rank in make_plan(made, None).memory.ranks)
    copy = made.model.vocab * made.model.hidden if tied and pp > 1 else 0
    assert total == parameters(made.model) + copy


def test_one_rank_in_fp32_has_sixteen_bytes_for_each_parameter():
    (rank,) = memory(optimizer__name="lion", precision__moments="fp32").ranks
    assert rank.weights + rank.gradients + rank.optimizer == 12 * rank.parameters == 12 * parameters(BASE.model)
    tensors = 8 * (2 + 3 + 2) + 3  # AdamW counts the steps of each
    assert memory().ranks[0].optimizer == 8 * rank.parameters + 4 * tensors


def test_updates_at_once_keep_masters_and_moments_twice():
    free, at_once = memory(optimizer__clip_norm=None), memory(optimizer__clip_norm=None, optimizer__at_once=True)
    assert at_once.ranks[0].optimizer - free.ranks[0].optimizer == 12 * free.ranks[0].parameters


def test_bf16_halves_weights_and_adds_masters():
    (rank,) = memory(precision__dtype="bf16", precision__moments="bf16").ranks
    assert (rank.weights, rank.gradients, rank.optimizer) == tuple(n * rank.parameters for n in (2, 4, 8))


@pytest.mark.parametrize(
    ("zero", "weights", "gradients", "optimizer"), [(0, 4, 4, 8), (1, 4, 5, 3), (2, 4, 1, 3), (3, 1, 1, 2)]
)
def test_zero_cuts_state_over_replicas(zero, weights, gradients, optimizer):
    (rank,) = memory(mesh__dp=4, data_parallel__zero=zero, data_parallel__bucket_mb=1).ranks
    assert rank.weights == pytest.approx(weights * rank.parameters, rel=1e-4)
    assert rank.gradients == pytest.approx(gradients * rank.parameters, rel=1e-4)
    assert rank.optimizer == pytest.approx(optimizer * rank.parameters, rel=1e-4)


def test_tensor_parallel_pads_the_vocabulary_and_repeats_kv_heads():
    (rank,) = memory(mesh__tp=4, model__vocab=4097, model__kv_heads=2).ranks
    model = BASE.model
    width, hidden = model.dim_per_head, model.hidden
    layer = hidden * (2 * width + 2 * width + 2 * width + 3 * model.ffn // 4) + 2 * hidden
    assert rank.parameters == 8 * layer + 2 * 1025 * hidden + hidden


def test_sequence_parallel_saves_activations():
    cut, whole = memory(mesh__tp=4), memory(mesh__tp=4, mesh__sequence_parallel=False)
    assert cut.largest < whole.largest
    assert cut.ranks[0].activations < memory().ranks[0].activations / 3.9


def test_activations_follow_the_schedule():
    gpipe, one = (memory(mesh__pp=4, pipeline__schedule=name, cluster__device="cuda") for name in ("gpipe", "1f1b"))
    assert gpipe.ranks[0].activations == pytest.approx(8 * one.ranks[0].activations, rel=0.02)
    assert gpipe.ranks[3].loss > 8 * one.ranks[3].loss
    assert all(rank.loss == 0 for rank in one.ranks[:3])


def test_options_that_keep_more():
    plain = memory().ranks[0].activations
    for option in ({"model__dropout": 0.1}, {"model__qk_norm": True}, {"mesh__pp": 2}):
        assert memory(**option).ranks[0].activations > plain


def test_options_that_keep_less():
    none, selective, full, second, chunks, moved = (
        memory(**option).ranks[0]
        for option in (
            {},
            {"memory__recompute": "selective"},
            {"memory__recompute": "full"},
            {"memory__recompute": "full", "memory__recompute_every": 2},
            {"memory__loss_chunks": 4},
            {"memory__offload_activations": True, "memory__offload_min_mb": 0.0},
        )
    )
    assert full.activations < selective.activations < none.activations
    assert second.activations == pytest.approx((full.activations + none.activations) / 2, rel=0.1)
    assert chunks.loss < none.loss / 100
    assert moved.host > 0.8 * none.activations
    assert moved.activations + moved.host == none.activations
    assert none.host == 0


def test_zero_bubble_undoes_a_part_of_recomputation():
    """What a weight gradient is made of waits for W, recomputed or not."""
    together, apart = (
        memory(mesh__pp=2, memory__recompute="full", pipeline__schedule=name).ranks[1] for name in ("1f1b", "zb-h1")
    )
    assert apart.activations > 3 * together.activations


def test_treatments_of_a_stage():
    every = config(memory__recompute="full", memory__recompute_every=2, memory__offload_activations=True).memory
    assert [bool(each.parts) for each in treatments(every, 0, False, 5)] == [True, False, True, False, True]
    assert [each.offload for each in treatments(every, 1, True, 3)] == [True, True, False]
    some = config(memory__recompute="selective", memory__recompute_stages=[1], mesh__pp=2).memory
    assert [bool(treatments(some, stage, False, 1)[0].parts) for stage in (0, 1)] == [False, True]


def test_what_is_kept_after_each_action():
    held = [Held(100, 10, 30), Held(200, 0, 50, 7, 3)]
    split = generate("zb-h1", 1, 1, 1)
    assert [kept[:2] for kept in kept_after_each(split, 0, held[1:], 1, False)] == [(200, 7), (50, 3), (0, 0)]
    one = generate("1f1b", 2, 1, 2)
    first = [kept.device for kept in kept_after_each(one, 0, held, 1, False)]
    assert first == [100, 200, 100, 0]
    assert [kept.device for kept in kept_after_each(one, 0, held, 1, True)] == [101, 202, 102, 2]
    row = tuple(map(Action.parse, ("0F0", "1F0", "1B0", "0B0")))
    two = Schedule("by hand", (row,), (0, 0), 1)  # what goes from stage to stage waits, and is taken
    assert [kept.device for kept in kept_after_each(two, 0, held, 1, False)] == [101, 300, 101, 0]


def test_a_rank_that_does_not_fit_says_what_would():
    tight = find("llama3_8b_8xh100").replace(micro_batch_size=4, **{"memory.recompute": "none"})
    (warning,) = make_plan(tight, on_paper("8xH100")).warnings
    assert "a worker may fill 67.06 GiB: set memory.recompute to selective" in warning
    (warning,) = make_plan(
        tight.replace(micro_batch_size=2, **{"pipeline.memory_gb": 50.0}), on_paper("8xH100")
    ).warnings
    assert "set memory.loss_chunks to 8" in warning
    huge = find("llama3_70b_64xh100").replace(
        **{"mesh.pp": 1, "mesh.dp": 16, "mesh.tp": 4, "pipeline.schedule": "1f1b"}
    )
    (warning,) = make_plan(huge.replace(**{"pipeline.virtual_stages": 1}), on_paper("64xH100")).warnings
    assert "raise mesh.tp, mesh.pp or mesh.dp" in warning


def test_the_page_compares_treatments():
    page = str(make_plan(config(memory__offload_activations=True, memory__offload_min_mb=0.0), on_paper("1xH100")))
    assert "fullest rank" in page
    assert "8 loss chunks" in page
    assert "on its host" in page
