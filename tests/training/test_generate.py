"""A checkpoint of any run can be looked at on one device."""

from raytron.config import RunConfig, flatten, to_mapping
from raytron.rules import problems
from raytron.training.alone import alone
from raytron.training.generate import plain

CUT = {
    "mesh.pp": 2, "mesh.dp": 2, "mesh.cp": 4, "mesh.cp_all_to_all": 2, "mesh.tp": 2, "data_parallel.zero": 2,
    "pipeline.schedule": "interleaved", "pipeline.virtual_stages": 2, "micro_batch_size": 2, "memory.recompute": "full",
    "precision.dtype": "bf16", "optimizer.name": "muon", "data.document_mask": True,
}  # fmt: skip


def test_alone_is_the_same_model_on_one_device():
    config = RunConfig().replace(**CUT)
    assert problems(config) == []
    left = {"data_parallel.zero", "data.document_mask"}
    assert changed(plain(config)) == left
    assert changed(alone(config)) == {*left, "precision.dtype", "optimizer.name"}
    assert problems(alone(config)) == problems(plain(config)) == []


def changed(config):
    """The keys that are not as they are by default."""
    default = flatten(to_mapping(RunConfig()))
    return {key for key, value in flatten(to_mapping(config)).items() if value != default[key]}


def test_what_is_only_seen_between_devices_is_not_asked_of_one():
    sharded = {"data_parallel.zero": 3, "data_parallel.reduce": "last_microbatch", "data_parallel.prefetch": 2}
    config = RunConfig().replace(**{"mesh.dp": 2, "observe.gradient_noise": True}, **sharded)
    assert problems(config) == []
    assert problems(alone(config)) == []
