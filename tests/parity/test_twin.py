"""The single-device truth equals Hugging Face's models, given the same weights."""

import pytest
import torch
from models import batch_of, tiny
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from raytron.model.hf import from_hugging_face, to_hugging_face
from raytron.optim.lr import learning_rate
from raytron.testing.twin import Twin


def hugging_face(config):
    m = config.model
    common = {"vocab_size": m.vocab, "attn_implementation": "eager", "tie_word_embeddings": m.tied_embeddings}
    if m.positions == "learned":
        return GPT2LMHeadModel(
            GPT2Config(n_embd=m.hidden, n_layer=m.layers, n_head=m.heads, n_inner=m.ffn, n_positions=m.max_positions,
                       resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **common)
        )  # fmt: skip
    llama = {
        "hidden_size": m.hidden, "num_hidden_layers": m.layers, "num_attention_heads": m.heads,
        "num_key_value_heads": m.num_kv_heads, "head_dim": m.dim_per_head, "intermediate_size": m.ffn,
        "rms_norm_eps": m.norm_eps, "max_position_embeddings": 64, **common,
    }  # fmt: skip
    if m.qk_norm:
        kinds = ["sliding_attention"] * m.layers
        return Qwen3ForCausalLM(
            Qwen3Config(
                use_sliding_window=True, sliding_window=m.window, layer_types=kinds, max_window_layers=0, **llama
            )
        )
    return LlamaForCausalLM(LlamaConfig(**llama))


def loaded(config, twin):
    theirs = hugging_face(config)
    weights = {name: weight.detach() for name, weight in twin.weights.items()}
    report = theirs.load_state_dict(to_hugging_face(weights, config.model), strict=False)
    assert not report.unexpected_keys
    assert not [key for key in report.missing_keys if "masked_bias" not in key]
    return theirs


QWEN3_PLAIN = {"layers": 3, "hidden": 32, "heads": 4, "kv_heads": 2, "head_dim": 16, "ffn": 48, "vocab": 67,
               "qk_norm": True, "window": 5, "tied_embeddings": True}  # fmt: skip


@pytest.mark.parametrize("model", ["llama", "gpt2", QWEN3_PLAIN], ids=["llama", "gpt2", "qwen3"])
def test_logits_equal(model):
    config = tiny(model)
    twin = Twin(config)
    theirs = loaded(config, twin).eval()
    tokens = torch.from_numpy(batch_of(config).tokens)
    with torch.no_grad():
        assert (twin.logits(tokens) - theirs(tokens).logits).abs().max() < 1e-5


@pytest.mark.parametrize("model", ["llama", "gpt2", "qwen3"])
def test_names_lead_there_and_back(model):
    config = tiny(model)
    weights = {name: weight.detach() for name, weight in Twin(config).weights.items()}
    back = from_hugging_face(to_hugging_face(weights, config.model), config.model)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_training_losses_equal(model):
    """20 steps of their model under torch's AdamW, with the loss weighted by real tokens."""
    config = tiny(model, **{"optimizer.weight_decay": 0.0})
    twin = Twin(config)
    theirs = loaded(config, twin)
    optimizer = torch.optim.AdamW(theirs.parameters(), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    expected = []
    for step in range(20):
        batch = batch_of(config, step)
        labels = torch.where(torch.from_numpy(batch.weights) > 0, torch.from_numpy(batch.labels), -100)
        logits = theirs(torch.from_numpy(batch.tokens)).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = learning_rate(config.lr, config.lr_horizon, step)
        optimizer.step()
        expected.append(loss.item())
    losses = twin.train(batch_of(config, step) for step in range(20))
    assert losses == pytest.approx(expected, abs=1e-5)
    assert len(set(losses)) == 20
