"""FLOPs and parameters against published figures."""

import pytest

from raytron import presets
from raytron.config import ModelConfig
from raytron.plan.flops import (
    FORMULA,
    active_parameters,
    flops_per_token,
    formula,
    layer_parameters,
    local_mixture_parameters,
    mean_context,
    mfu,
    parameters,
    peak_flops,
)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("gpt2_124m_1xcpu", 124_439_808),
        ("llama3_8b_8xh100", 8_030_261_248),
        ("llama3_70b_64xh100", 70_553_706_496),
        ("mistral_7b_8xh100", 7_241_732_096),
        ("qwen3_8b_8xh100", 8_190_735_360),
        ("mixtral_8x7b_64xh100", 46_702_792_704),
        ("qwen3_30b_a3b_16xh100", 30_532_122_624),
    ],
)
def test_parameters_equal_the_published_models(name, count):
    assert parameters(presets.find(name).model) == count


def test_llama_reproduces_a_published_figure():
    model = presets.llama3_8b_8xh100().model
    assert 14_451 * flops_per_token(model, 8192) == pytest.approx(744e12, rel=0.001)
    assert mfu(14_451, flops_per_token(model, 8192), 1, 989.4e12) == pytest.approx(0.752, abs=0.001)


@pytest.mark.parametrize(
    ("name", "count"), [("mixtral_8x7b_64xh100", 12_879_925_248), ("qwen3_30b_a3b_16xh100", 3_353_032_704)]
)
def test_a_token_goes_through_few_experts(name, count):
    assert active_parameters(presets.find(name).model) == count


def test_deepseek_v3_is_as_large_as_published():
    model = presets.deepseek_v3_shaped_1024xh100().model
    assert parameters(model) == pytest.approx(671e9, rel=0.01)
    assert active_parameters(model) == pytest.approx(37e9, rel=0.03)
    assert [layer_parameters(model, layer).experts for layer in range(3)] == [0, 0, 0]


@pytest.mark.parametrize(("tp", "ep", "etp"), [(1, 1, 1), (4, 1, 1), (2, 8, 2)])
def test_the_ranks_of_a_plane_hold_a_layer_of_experts_between_them(tp, ep, etp):
    model = presets.deepseek_v3_shaped_1024xh100().model
    whole = layer_parameters(model, 3)
    dense, experts = local_mixture_parameters(model, tp, ep, etp)
    assert experts * ep * etp == whole.experts == 256 * 3 * 7168 * 2048
    assert dense * tp == whole.ffn + (tp - 1) * 256 * 7168  # every tp rank holds the router


@pytest.mark.parametrize("name", ["qwen3_8b_8xh100", "deepseek_v3_shaped_1024xh100"])
def test_the_formula_evaluates_to_the_number(name):
    model = presets.find(name).model
    text = formula(model, 4096).replace(",", "").replace("·", "*")
    assert eval(text) == flops_per_token(model, 4096)
    assert "context" in FORMULA


def test_a_window_shortens_the_context():
    assert mean_context(ModelConfig(), 1000) == 500
    assert mean_context(ModelConfig(window=1000), 1000) == 500
    assert mean_context(ModelConfig(window=2000), 1000) == 500
    exact = sum(min(at, 100) for at in range(1, 1001)) / 1000
    assert mean_context(ModelConfig(window=100), 1000) == pytest.approx(exact, rel=0.01)


def test_full_attention_counts_every_pair():
    model = ModelConfig(layers=2, heads=4, hidden=64, window=8)
    more = flops_per_token(model, 128, full_attention=True) - flops_per_token(model, 128)
    assert more == pytest.approx(12 * 2 * 64 * (128 - mean_context(model, 128)))


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2450e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("AMD EPYC", None),
        (None, None),
    ],
)
def test_peaks_by_name(device, peak):
    assert peak_flops(device) == peak
    assert peak_flops(device, "fp32") is None
