"""Names told before the model is made are those of the model; globs over them, and the layers that they belong to."""

import pytest

from raytron.config import ModelConfig, ParameterGroup, from_mapping
from raytron.errors import ConfigError
from raytron.model.assemble import assemble
from raytron.parallel.mesh import Mesh
from raytron.plan.mesh import MeshShape
from raytron.plan.names import group_of, layer_of, layers_of, parameter_names, unmatched
from raytron.plan.plan import make_plan

SMALL = {"layers": 3, "hidden": 16, "heads": 2, "ffn": 16, "vocab": 31}
MODELS = {
    "llama": {},
    "gpt2": {"norm": "layernorm", "positions": "learned", "activation": "gelu_tanh", "qkv_bias": True, "bias": True,
             "tied_embeddings": True},
    "experts": {"experts": {"count": 4, "every": 2, "first_dense": 1}},
    "shared expert": {"experts": {"count": 4, "shared_ffn": 16, "shared_gate": True}},
    "qwen3": {"qk_norm": True, "qkv_bias": True, "kv_heads": 1},
}  # fmt: skip


def config_of(model):
    return from_mapping({"model": {**SMALL, **model}, "data": {"dataset": "none"}})


@pytest.mark.parametrize("model", list(MODELS))
def test_the_model_has_these_names(model):
    config = config_of(MODELS[model])
    assembly = assemble(make_plan(config, None), Mesh(MeshShape(), 0))
    assert {param.full_name for param in assembly.params} == set(parameter_names(config.model))
    assert len(assembly.params) == len(parameter_names(config.model))


def test_layers():
    assert layers_of(ModelConfig(layers=2)) == ("embed", "layers.0", "layers.1", "norm", "head")
    assert layer_of("layers.11.mlp.norm.weight") == "layers.11"


def test_the_first_group_that_matches_holds():
    groups = (ParameterGroup("layers.*.norm.*", lr=2.0), ParameterGroup("layers.*", freeze=True))
    assert group_of("layers.0.mlp.norm.weight", groups).lr == 2.0
    assert group_of("layers.0.mlp.up.weight", groups).freeze
    assert group_of("head.weight", groups) == ParameterGroup()


def test_a_glob_that_matches_nothing_is_told_with_names_like_it():
    groups = (ParameterGroup("layers.*"), ParameterGroup("layers.*.atention.q.*"))
    (problem,) = unmatched(groups, ModelConfig())
    assert problem.where == "optimizer.groups[1].match"
    assert ".attention.q.weight" in problem.remedy


def test_a_plan_refuses_groups_that_match_or_leave_nothing():
    for groups, where in (
        ([{"match": "layer.*"}], "optimizer.groups[0].match"),
        ([{"freeze": True}], "optimizer.groups"),
    ):
        with pytest.raises(ConfigError) as caught:
            make_plan(config_of({}).replace(**{"optimizer.groups": groups}), None)
        assert [problem.where for problem in caught.value.problems] == [where]
