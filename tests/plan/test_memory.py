"""Bytes per rank: sums over ranks equal the whole, and each way of cutting saves what it should."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytron.config import RunConfig
from raytron.plan.flops import parameters
from raytron.plan.plan import make_plan

BASE = RunConfig().replace(**{"global_batch_size": 32, "model.layers": 8})


def memory(**overrides):
    return make_plan(BASE.replace(**{key.replace("__", "."): value for key, value in overrides.items()}), None).memory


@settings(max_examples=25, deadline=None)
@given(pp=st.sampled_from([1, 2, 4]), tied=st.booleans(), kind=st.sampled_from(["rmsnorm", "layernorm"]))
def test_stages_sum_to_the_model(pp, tied, kind):
    changes = {"mesh.pp": pp, "model.tied_embeddings": tied, "model.norm": kind, "model.bias": True}
    config = BASE.replace(**changes, **{"model.qkv_bias": True, "model.qk_norm": True, "model.positions": "learned"})
    total = sum(rank.parameters for rank in make_plan(config, None).memory.ranks)
    copy = config.model.vocab * config.model.hidden if tied and pp > 1 else 0
    assert total == parameters(config.model) + copy


def test_one_rank_in_fp32_has_sixteen_bytes_for_each_parameter():
    (rank,) = memory().ranks
    assert rank.weights + rank.gradients + rank.optimizer == 16 * rank.parameters == 16 * parameters(BASE.model)
    assert rank.total == rank.weights + rank.gradients + rank.optimizer + rank.activations + rank.loss


def test_bf16_halves_weights_and_adds_masters():
    (rank,) = memory(precision__dtype="bf16").ranks
    assert (rank.weights, rank.gradients, rank.optimizer) == tuple(n * rank.parameters for n in (2, 4, 12))


@pytest.mark.parametrize(("zero", "gradients", "optimizer"), [(0, 4, 8), (1, 4 + 4 / 4, 12 / 4), (2, 4 / 4, 12 / 4)])
def test_zero_cuts_state_over_replicas(zero, gradients, optimizer):
    (rank,) = memory(mesh__dp=4, data_parallel__zero=zero, data_parallel__bucket_mb=1).ranks
    bucket = 2**20 if zero == 2 else 0
    assert rank.gradients == pytest.approx(gradients * rank.parameters + bucket, rel=1e-5)
    assert rank.optimizer == pytest.approx(optimizer * rank.parameters, rel=1e-5)


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
    gpipe, one = memory(mesh__pp=4, pipeline__schedule="gpipe"), memory(mesh__pp=4, pipeline__schedule="1f1b")
    assert gpipe.ranks[0].activations == 8 * one.ranks[0].activations
    assert gpipe.ranks[3].loss > 8 * one.ranks[3].loss
    assert all(rank.loss == 0 for rank in one.ranks[:3])


def test_options_that_keep_more():
    plain = memory().ranks[0].activations
    for option in ({"model__dropout": 0.1}, {"model__attention_dropout": 0.1}, {"model__qk_norm": True}):
        assert memory(**option).ranks[0].activations > plain
