"""Mixtures of experts equal Hugging Face's Mixtral, Qwen2-MoE and Qwen3-MoE of the same weights, block by block and whole.

Whole models go through files, as their checkpoints do: ours under their names are read by `from_pretrained`, and what
`save_pretrained` writes is read under our names.
"""

from __future__ import annotations

import pytest
import torch
from models import LLAMA, batch_of, tiny
from safetensors.torch import load_file, save_file
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from raytron.config import ExpertsConfig
from raytron.errors import ConfigError
from raytron.model.assemble import assemble
from raytron.model.hf import from_hugging_face, to_hugging_face
from raytron.model.router import choose, scores_of
from raytron.parallel.mesh import Mesh
from raytron.plan.mesh import MeshShape
from raytron.plan.plan import make_plan
from raytron.testing.twin import Twin

SMALL = {**LLAMA, "layers": 2, "init_std": 0.1}
MODELS = {
    "mixtral": {**SMALL, "experts": {"count": 4, "top_k": 2}},
    "qwen2": {
        **SMALL, "qkv_bias": True,
        "experts": {
            "count": 6, "top_k": 3, "ffn": 24, "normalize": False, "shared_ffn": 40, "shared_gate": True, "every": 2,
        },
    },
    "qwen3": {
        **SMALL, "qk_norm": True, "tied_embeddings": True,
        "experts": {"count": 8, "top_k": 2, "ffn": 24, "first_dense": 1},
    },
}  # fmt: skip
CLASSES = {
    "mixtral": (MixtralConfig, MixtralForCausalLM),
    "qwen2": (Qwen2MoeConfig, Qwen2MoeForCausalLM),
    "qwen3": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
}


def theirs_of(name):
    """Their configuration of one of our models."""
    m = tiny(MODELS[name]).model
    e = m.experts
    common = {
        "vocab_size": m.vocab, "hidden_size": m.hidden, "num_hidden_layers": m.layers, "num_attention_heads": m.heads,
        "num_key_value_heads": m.num_kv_heads, "intermediate_size": m.ffn, "rms_norm_eps": m.norm_eps,
        "tie_word_embeddings": m.tied_embeddings, "num_experts_per_tok": e.top_k, "attn_implementation": "eager",
        "rope_parameters": {"rope_type": "default", "rope_theta": m.rope_theta},
    }  # fmt: skip
    if name == "mixtral":
        return MixtralConfig(num_local_experts=e.count, **common)
    common |= {"num_experts": e.count, "moe_intermediate_size": m.expert_ffn, "norm_topk_prob": e.normalize}
    if name == "qwen3":
        dense = list(range(e.first_dense))
        return Qwen3MoeConfig(head_dim=m.dim_per_head, mlp_only_layers=dense, decoder_sparse_step=1, **common)
    return Qwen2MoeConfig(shared_expert_intermediate_size=e.shared_ffn, decoder_sparse_step=e.every, **common)


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
    """Our twin and their model, read from files of the twin's weights."""
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    twin = Twin(tiny(MODELS[name]))
    weights = {key: weight.detach() for key, weight in twin.weights.items()}
    files = {key: weight.contiguous().clone() for key, weight in to_hugging_face(weights, twin.model).items()}
    save_file(files, folder / "model.safetensors", metadata={"format": "pt"})
    theirs_of(name).save_pretrained(folder)
    theirs, report = CLASSES[name][1].from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return name, twin, theirs.eval()


def test_logits_equal(pair):
    _, twin, theirs = pair
    tokens = torch.from_numpy(batch_of(twin.config).tokens)
    with torch.no_grad():
        assert (twin.logits(tokens) - theirs(tokens).logits).abs().max() < 1e-5


def test_their_files_lead_back(pair, tmp_path):
    _, twin, theirs = pair
    theirs.save_pretrained(tmp_path)
    back = from_hugging_face(load_file(tmp_path / "model.safetensors"), twin.model)
    assert back.keys() == twin.weights.keys()
    assert all(torch.equal(back[key], weight) for key, weight in twin.weights.items())


def test_a_block_of_experts_equals_theirs(pair):
    """Our own layer, forward and backward: outputs, and the gradients of input and weights."""
    name, twin, theirs = pair
    config = twin.config
    block = assemble(make_plan(config, None), Mesh(MeshShape(), 0)).stages[0].layers[1].mlp
    torch.manual_seed(0)
    x = torch.randn(12, 2, config.model.hidden)
    ours, other = x.clone().requires_grad_(), x.transpose(0, 1).contiguous().requires_grad_()
    stage = assemble(make_plan(config, None), Mesh(MeshShape(), 0)).stages[0]
    context = stage.context(torch.zeros(2, dtype=torch.int64), 12, training=True)
    y, expected = block(ours, context), theirs.model.layers[1].mlp(other)
    torch.testing.assert_close(y.transpose(0, 1), expected, rtol=1e-5, atol=1e-6)
    dy = torch.randn_like(expected)
    theirs.zero_grad()
    y.backward(dy.transpose(0, 1))
    expected.backward(dy)
    torch.testing.assert_close(ours.grad.transpose(0, 1), other.grad, rtol=1e-5, atol=1e-6)
    mlp = theirs.model.layers[1].mlp
    for mine, its in (
        (block.router.weight, mlp.gate.weight),
        (block.up, mlp.experts.gate_up_proj),
        (block.down, mlp.experts.down_proj),
    ):
        torch.testing.assert_close(mine.grad.view(its.shape), its.grad, rtol=1e-4, atol=1e-6)
    if name == "qwen2":
        torch.testing.assert_close(block.gate.grad, mlp.shared_expert_gate.weight.grad, rtol=1e-4, atol=1e-6)


def test_routing_by_groups_equals_deepseek_v3():
    config = ExpertsConfig(count=16, top_k=4, score="sigmoid", groups=4, group_top_k=2, scale=2.5, bias_rate=0.001)
    theirs = DeepseekV3TopkRouter(
        DeepseekV3Config(n_routed_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2, hidden_size=8,
                         routed_scaling_factor=2.5, norm_topk_prob=True)
    )  # fmt: skip
    torch.manual_seed(0)
    torch.nn.init.normal_(theirs.weight)
    theirs.e_score_correction_bias.normal_(std=0.3)
    x = torch.randn(200, 8)
    logits, weights, chosen = theirs(x)
    mine, mine_weights = choose(scores_of(logits, config), config, theirs.e_score_correction_bias)
    order, their_order = mine.argsort(-1), chosen.argsort(-1)
    assert torch.equal(mine.gather(1, order), chosen.gather(1, their_order))
    torch.testing.assert_close(mine_weights.gather(1, order), weights.gather(1, their_order))


def test_experts_without_a_name_there_are_refused():
    config = tiny({**SMALL, "experts": {"count": 4, "score": "sigmoid", "shared_ffn": 8}})
    with pytest.raises(ConfigError, match="sigmoid") as caught:
        to_hugging_face({}, config.model)
    assert len(caught.value.problems) == 2
