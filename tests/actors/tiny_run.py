"""The smallest run that has two pipeline stages and checkpoints on its way."""

TINY = {
    "steps": 6,
    "global_batch_size": 4,
    "micro_batch_size": 2,
    "sequence_length": 16,
    "model": {"layers": 2, "hidden": 32, "heads": 2, "ffn": 48, "vocab": 300},
    "mesh": {"pp": 2},
    "checkpoint": {"every": 2},
    "evaluate": {"batches": 1},
    "cluster": {"cpus_per_worker": 0.5, "timeout_s": 30, "device": "cpu"},
}
