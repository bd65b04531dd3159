"""A checkpoint of any run can be looked at on one device."""

from raytron.config import RunConfig, flatten, to_mapping
from raytron.rules import problems
from raytron.training.generate import alone

CUT = {
    "mesh.pp": 2, "mesh.dp": 2, "mesh.cp": 4, "mesh.cp_all_to_all": 2, "mesh.tp": 2, "data_parallel.zero": 2,
    "pipeline.schedule": "interleaved", "pipeline.virtual_stages": 2, "micro_batch_size": 2, "memory.recompute": "full",
    "precision.dtype": "bf16", "optimizer.name": "muon", "data.document_mask": True,
}  # fmt: skip


def test_alone_is_the_same_model_on_one_device():
    config = RunConfig().replace(**CUT)
    assert problems(config) == []
    assert problems(alone(config)) == []
    assert alone(config).model == config.model
    assert alone(config).mesh == RunConfig().mesh
    left = {
        key
        for key, value in flatten(to_mapping(alone(config))).items()
        if value != flatten(to_mapping(RunConfig()))[key]
    }
    assert left == {"data_parallel.zero", "data.document_mask"}


def test_what_is_only_seen_between_devices_is_not_asked_of_one():
    config = RunConfig().replace(**{"mesh.dp": 2, "observe.gradient_noise": True})
    assert problems(config) == []
    assert problems(alone(config)) == []
