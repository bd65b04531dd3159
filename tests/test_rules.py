"""Every rule: where it points and what it proposes; and that what it proposes is legal."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytron.config import (
    SCHEDULE_CHUNKS,
    DataParallelConfig,
    OptimizerConfig,
    ParameterGroup,
    RunConfig,
    flatten,
    from_mapping,
    to_mapping,
)
from raytron.errors import ConfigError
from raytron.plan.plan import make_plan
from raytron.rules import RANGES, RULES, problems

AT_ONCE = {"optimizer.at_once": True, "optimizer.clip_norm": None}
CANONICAL = {"determinism": "canonical", "cluster.threads_per_worker": 1}
EXPERTS = {"model.experts.count": 8}
HALVES = [{"dataset": "a", "weight": 0.5}, {"dataset": "b", "weight": 0.5}]
CASES = [
    ({"data.objective": "masked"}, "data.objective", "attention to both sides", "use causal, or make such samples"),
    ({"data.format": "preference"}, "data.format", "learn the rejected side", "train on text or chat"),
    ({"data.fim.spm_rate": 0.2}, "data.fim.spm_rate", "0.2 has no effect", "set data.fim.rate"),
    (
        {"data.fim.rate": 0.5, "data.fim.prefix": "<|fim_suffix|>", "data.dataset": "tokens"},
        "data.fim",
        "are not three",
        "name three tokens",
    ),
    ({"data.fim.rate": 0.5}, "data.fim.rate", "trained on the corpus has no tokens", "set data.tokenizer.path"),
    (
        {"data.too_long": "drop"},
        "data.too_long",
        "drop has no effect where documents are cut",
        "data.packing to best_fit",
    ),
    (
        {"model.heads": 7},
        "model.heads",
        "256 hidden channels cannot be cut in 7 equal parts",
        "use 1, 2, 4, 8, 16 or 32",
    ),
    ({"model.kv_heads": 3}, "model.kv_heads", "8 heads cannot share 3 KV heads", "use 1, 2, 4 or 8"),
    (
        {"model.heads": 16, "mesh.tp": 3, "model.ffn": 768, "mesh.sequence_parallel": False},
        "mesh.tp",
        "16 heads cannot be cut in 3 equal parts",
        "use 1, 2, 4, 8 or 16",
    ),
    (
        {
            "model.heads": 12,
            "model.hidden": 384,
            "model.kv_heads": 6,
            "mesh.tp": 4,
            "model.ffn": 768,
            "mesh.sequence_parallel": False,
        },
        "mesh.tp",
        "6 KV heads can neither be cut in 4",
        "use 1, 2, 3, 6 or 12",
    ),
    (
        {"model.ffn": 706, "mesh.tp": 4},
        "mesh.tp",
        "706 feed-forward channels",
        "use 1 or 2, or set model.ffn to 704 or 708",
    ),
    ({"sequence_length": 255, "mesh.tp": 2}, "sequence_length", "under sequence parallelism", "use 254 or 256"),
    ({"sequence_length": 4096, "model.positions": "learned"}, "sequence_length", "2048 learned", "use at most 2048"),
    (
        {"mesh.cp": 4, "mesh.tp": 2, "sequence_length": 252},
        "sequence_length",
        "252 tokens cannot be cut equally: 2 chunks for each of 4 ranks of a ring, 2 shares",
        "use 248 or 256",
    ),
    ({"mesh.cp": 2, "sequence_length": 254}, "sequence_length", "2 chunks for each of 2 ranks", "use 252 or 256"),
    (
        {"mesh.cp": 2, "mesh.cp_all_to_all": 2, "sequence_length": 255},
        "sequence_length",
        "2 parts for the",
        "254 or 256",
    ),
    ({"mesh.cp": 4, "mesh.cp_all_to_all": 3}, "mesh.cp_all_to_all", "4 context-parallel ranks", "use 1, 2 or 4"),
    (
        {"mesh.cp": 16, "mesh.cp_all_to_all": 16, "model.kv_heads": 4},
        "mesh.cp_all_to_all",
        "8 heads and 4 KV heads of a rank cannot be exchanged equally over 16",
        "use 1, 2, 4 or 8; a ring",
    ),
    ({"mesh.ep": 2}, "mesh.ep", "2 has no effect on a model without experts", "leave it at 1, or set"),
    ({"model.experts.shared_ffn": 8}, "model.experts.shared_ffn", "8 has no effect", "model.experts.count to 2"),
    ({**EXPERTS, "model.experts.groups": 3}, "model.experts.groups", "8 experts cannot be cut in 3", "1, 2, 4 or 8"),
    ({**EXPERTS, "model.experts.group_top_k": 3}, "model.experts.group_top_k", "3 of 1 group", "at most 1"),
    ({**EXPERTS, "model.experts.top_k": 9}, "model.experts.top_k", "9 of 8 experts", "use at most 8"),
    (
        {**EXPERTS, "model.experts.groups": 4, "model.experts.top_k": 3},
        "model.experts.top_k",
        "3 of 2 experts, 1 group of 2",
        "use at most 2, or raise model.experts.group_top_k to 2",
    ),
    ({**EXPERTS, "model.experts.top_k": 1}, "model.experts.normalize", "learns nothing", "use false"),
    ({**EXPERTS, "model.experts.drop": "position"}, "model.experts.drop", "no capacity", "capacity_factor"),
    ({**EXPERTS, "model.experts.shared_gate": True}, "model.experts.shared_gate", "no shared", "shared_ffn"),
    ({**EXPERTS, "model.experts.first_dense": 4}, "model.experts.first_dense", "none of 4 layers", "use at most 3"),
    ({**EXPERTS, "model.experts.every": 5}, "model.experts.every", "none of 4 layers", "use at most 4"),
    ({**EXPERTS, "model.bias": True}, "model.bias", "experts have no biases", "use false"),
    ({**EXPERTS, "mesh.ep": 3, "mesh.dp": 4}, "mesh.ep", "8 experts and 4 ranks (dp · cp · tp)", "use 1, 2 or 4"),
    ({**EXPERTS, "mesh.ep": 4, "mesh.dp": 4, "mesh.etp": 2}, "mesh.ep", "2 ranks (dp · cp · tp / etp)", "use 1 or 2"),
    ({**EXPERTS, "mesh.etp": 4, "mesh.dp": 2}, "mesh.etp", "2 ranks (dp · cp · tp) cannot be folded", "use 1 or 2"),
    (
        {**EXPERTS, "model.experts.ffn": 33, "mesh.etp": 2, "mesh.dp": 2},
        "mesh.etp",
        "33 channels of an expert",
        "use 1",
    ),
    (
        {**EXPERTS, "model.experts.shared_ffn": 33, "mesh.tp": 2},
        "model.experts.shared_ffn",
        "33 channels of the shared expert",
        "use 32 or 34",
    ),
    (
        {**EXPERTS, "sequence_length": 255, "mesh.tp": 2, "mesh.sequence_parallel": False},
        "sequence_length",
        "255 tokens cannot be cut in 2",
        "use 254 or 256",
    ),
    ({"mesh.pp": 8}, "mesh.pp", "4 layers cannot fill 8 stages", "at most 4 stages, or at least 8 layers"),
    ({"mesh.pp": 2, "pipeline.split": [1, 1, 2]}, "pipeline.split", "3 entries for 2 stages", "give 2 entries"),
    ({"mesh.pp": 2, "pipeline.split": [5, -1]}, "pipeline.split", "a negative number of layers", "0 or more"),
    ({"mesh.pp": 3, "pipeline.split": [2, 0, 2]}, "pipeline.split", "leaves rank 1 with nothing", "a layer"),
    ({"mesh.pp": 2, "pipeline.layout": "Ettt|tL"} | {"model.layers": 5}, "pipeline.layout", "3 + 1 = 4", "sum to 5"),
    ({"mesh.pp": 2, "pipeline.layout": "E(t|)*3tL"}, "pipeline.layout", "4 entries for 2 stages", "give 2 entries"),
    ({"observe.trace_steps": [4, 2]}, "observe.trace_steps", "no first and last step", "such as [2, 4]"),
    ({"mesh.pp": 2, "pipeline.layout": "Et|ttt"}, "pipeline.layout", "the loss head (L) does not", "put L last"),
    (
        {"mesh.pp": 2, "pipeline.layout": "Et*2|t*2L", "pipeline.split": [2, 2]},
        "pipeline.layout",
        "stands beside pipeline.split",
        "one of them to null",
    ),
    ({"mesh.pp": 2, "pipeline.split": [1, 2]}, "pipeline.split", "1 + 2 = 3 layers", "sum to 4"),
    ({"micro_batch_size": 3}, "global_batch_size", "16 sequences", "use 15 or 18"),
    (
        {"elastic.min_workers": 4, "elastic.max_workers": 2, "mesh.dp": 4},
        "elastic.min_workers",
        "4 is more",
        "at most 2",
    ),
    (
        {"elastic.max_workers": 2, "mesh.dp": 4},
        "elastic.max_workers",
        "the mesh has 4 workers, and at most 2",
        "4 or more",
    ),
    ({"elastic.grow_after_s": 5}, "elastic.grow_after_s", "does not change", "set elastic.min_workers"),
    ({"mesh.dp": 8, "mesh.replicate": 3}, "mesh.replicate", "8 data-parallel ranks", "use 1, 2, 4 or 8"),
    ({"mesh.dp": 4, "mesh.replicate": 2, "data_parallel.zero": 0}, "mesh.replicate", "ZeRO 0", "1, 2 or 3"),
    ({"data_parallel.prefetch": -1}, "data_parallel.prefetch", "too small", "0 or more"),
    ({"determinism": "canonical"}, "cluster.threads_per_worker", "one number of threads", "use 1"),
    ({**CANONICAL, "data_parallel.reduce_dtype": "bf16"}, "data_parallel.reduce_dtype", "rounded", "use fp32"),
    ({"optimizer.at_once": True}, "optimizer.clip_norm", "does not wait for the gradient norm", "use null"),
    ({**AT_ONCE, "precision.dtype": "fp16"}, "optimizer.at_once", "overflow", "bf16"),
    ({**AT_ONCE, **CANONICAL}, "optimizer.at_once", "largest gradient", "use false"),
    ({**AT_ONCE, "guard.on_nonfinite": "stop"}, "guard.on_nonfinite", "not run again", "use skip"),
    ({**AT_ONCE, "guard.on_spike": "skip"}, "guard.on_spike", "not run again", "use keep"),
    ({"guard.spike": 0}, "guard.spike", "too small", "more than 0"),
    ({"guard.spike": None, "guard.on_spike": "skip"}, "guard.on_spike", "nothing counts as a leap", "set guard.spike"),
    ({"guard.rollback_steps": 5}, "guard.rollback_steps", "where nothing is rolled back", "on_spike to rollback"),
    ({"guard.spike_window": 5}, "guard.spike_window", "too small", "10 or more"),
    ({"pipeline.virtual_stages": 2}, "pipeline.virtual_stages", "1f1b has one model chunk", "to interleaved"),
    (
        {"pipeline.schedule": "interleaved", "pipeline.virtual_stages": 2},
        "pipeline.schedule",
        "more than one pipeline",
        "1f1b",
    ),
    (
        {"pipeline.schedule": "interleaved", "mesh.pp": 2, "pipeline.virtual_stages": 1},
        "pipeline.virtual_stages",
        "more than one model",
        "use 2 or more",
    ),
    (
        {"pipeline.schedule": "zb-v", "mesh.pp": 2, "model.layers": 8, "pipeline.virtual_stages": 4},
        "pipeline.virtual_stages",
        "zb-v has two model chunks on a rank, and 4 are",
        "use 2, or set pipeline.schedule to interleaved, looped-bfs, interleaved-zb or auto",
    ),
    (
        {"pipeline.schedule": "dualpipe-v", "mesh.pp": 2, "global_batch_size": 3},
        "global_batch_size",
        "at least 4 micro-batches (2 · pp), and there are 3",
        "use 4 or more, or pipeline.schedule zb-v",
    ),
    ({"model.hidden": 264}, "model.head_dim", "a head has 33", "use 32 or 34"),
    ({"data.tokenizer.vocab": 5000}, "data.tokenizer.vocab", "5000 tokens", "use at most 4096"),
    ({"memory.recompute_every": 2}, "memory.recompute_every", "nothing is recomputed", "selective or full"),
    ({"memory.recompute_stages": [0]}, "memory.recompute_stages", "nothing is recomputed", "or this to null"),
    (
        {"memory.recompute": "full", "memory.recompute_stages": [0, 4]},
        "memory.recompute_stages",
        "no stage 4",
        "0 to 0",
    ),
    (
        {"memory.recompute": "selective", "memory.recompute_parts": []},
        "memory.recompute_parts",
        "names no part",
        "attention, norm",
    ),
    ({"memory.loss_chunks": 300}, "memory.loss_chunks", "256 tokens, which are not enough for 300", "at most 256"),
    ({"lr.warmup_steps": 100}, "lr.warmup_steps", "leaves nothing of the 100 steps", "use at most 99, or raise steps"),
    ({"lr.final": 1.0}, "lr.final", "above the peak", "use at most 0.0003"),
    ({"model.dropout": 1.0}, "model.dropout", "too large", "less than 1"),
    ({"data.validation_fraction": 0}, "data.validation_fraction", "too small", "more than 0"),
    ({"optimizer.beta2": 1}, "optimizer.beta2", "too large", "less than 1"),
    ({"optimizer.momentum": 1}, "optimizer.momentum", "too large", "less than 1"),
    ({"optimizer.groups": [{"match": "*", "lr": -1}]}, "optimizer.groups[0].lr", "-1 is too small", "0 or more"),
    (
        {"optimizer.groups": [{"weight_decay": -0.1}]},
        "optimizer.groups[0].weight_decay",
        "too small",
        "use 0 or more, or null",
    ),
    (
        {"optimizer.groups": [{"match": "*", "lr": 2}, {"match": "embed.*"}]},
        "optimizer.groups[1].match",
        "comes after '*'",
        "put it first",
    ),
    (
        {"precision.stochastic_rounding": True},
        "precision.stochastic_rounding",
        "nothing is rounded",
        "bf16 for precision.dtype or moments",
    ),
    ({"precision.loss_scale": 0}, "precision.loss_scale", "too small", "more than 0"),
    ({"batch_ramp.samples": 8}, "batch_ramp.start", "is null", "name the first"),
    ({"batch_ramp.start": 16}, "batch_ramp.start", "no rise to the global batch of 16", "less than 16, or null"),
    (
        {"batch_ramp.start": 4, "batch_ramp.increment": 5, "batch_ramp.samples": 64},
        "batch_ramp.increment",
        "steps of 5 don't lead from 4 to 16",
        "use 1, 2, 3, 4, 6 or 12",
    ),
    (
        {"batch_ramp.start": 4, "batch_ramp.increment": 4, "batch_ramp.samples": 2},
        "batch_ramp.samples",
        "too few for 3 batch sizes",
        "use 4 or more",
    ),
    (
        {"batch_ramp.start": 3, "batch_ramp.increment": 1, "batch_ramp.samples": 64, "mesh.dp": 4},
        "batch_ramp.start",
        "on the way to 16: 3 sequences in micro-batches of 1 do not give each of 4",
        "where it makes 3 use 4 or more, or mesh.dp of at most 3",
    ),
    (
        {"batch_ramp.start": 4, "batch_ramp.increment": 3, "batch_ramp.samples": 64, "micro_batch_size": 2},
        "batch_ramp.increment",
        "on the way to 16: 7 sequences cannot be cut",
        "where it makes 7 use 6 or 8",
    ),
    ({"observe.gradient_noise": True}, "observe.gradient_noise", "there is one", "mesh.dp of 2 or more"),
    (
        {"observe.gradient_noise": True, "mesh.dp": 2, "data_parallel.zero": 2},
        "observe.gradient_noise",
        "no rank ever holds its own gradient",
        "data_parallel.zero of 0 or 1",
    ),
    (
        {**CANONICAL, "data_parallel.zero": 3, "data_parallel.reduce": "each_microbatch"},
        "data_parallel.reduce",
        "to the end of a step",
        "leave it at null",
    ),
    ({"evaluate.prompt": " "}, "evaluate.prompt", "is empty", "or null"),
    ({"run_dir": ""}, "run_dir", "is empty", "give a text"),
    ({"data.sources": []}, "data.sources", "no sources", "python-stdlib"),
    ({"resume.allow": ["lr.peek"]}, "resume.allow", "no key", "lr.peak"),
    # one of a thing, and remedies that are not refused in their turn
    ({"mesh.cp_all_to_all": 2}, "mesh.cp_all_to_all", "1 context-parallel rank cannot", "use 1"),
    ({"mesh.replicate": 2}, "mesh.replicate", "1 data-parallel rank cannot", "use 1"),
    ({"micro_batch_size": 3}, "global_batch_size", "micro-batches of 3", "use 15 or 18"),
    (
        {"mesh.dp": 17},
        "global_batch_size",
        "16 sequences in micro-batches of 1 do not",
        "17 or more, or mesh.dp of at most 16",
    ),
    (
        {"mesh.dp": 5, "micro_batch_size": 4},
        "global_batch_size",
        "16 sequences in micro-batches of 4 do not",
        "use 20 or more, or mesh.dp of at most 4, or a smaller micro_batch_size",
    ),
    (
        {"pipeline.schedule": "dualpipe-v", "mesh.pp": 2, "mesh.dp": 3, "global_batch_size": 11},
        "global_batch_size",
        "and there are 3 on the last data-parallel rank",
        "use 12 or more",
    ),
    (
        {**EXPERTS, "mesh.ep": 2, "mesh.dp": 2, "mesh.replicate": 2},
        "mesh.ep",
        "8 experts and 1 rank (dp · cp · tp / replicate) cannot",
        "use 1",
    ),
    (
        {"model.experts.count": 1},
        "model.experts.top_k",
        "2 of 1 expert",
        "use at most 1 with model.experts.normalize false",
    ),
    (
        {**EXPERTS, "model.experts.first_dense": 9, "model.experts.every": 3},
        "model.experts.first_dense",
        "none of 4 layers",
        "use at most 1",
    ),
    (
        {**EXPERTS, "model.experts.first_dense": 9, "model.experts.every": 5},
        "model.experts.every",
        "none of 4 layers",
        "use at most 4, and 0 for model.experts.first_dense",
    ),
    ({"mesh.pp": 2, "pipeline.split": [4]}, "pipeline.split", "1 entry for 2 stages", "give 2 entries"),
    ({"mesh.pp": 2, "pipeline.split": []}, "pipeline.split", "0 entries for 2 stages", "give 2 entries"),
    (
        {"pipeline.schedule": "gpipe", "pipeline.virtual_stages": 2},
        "pipeline.virtual_stages",
        "gpipe has one model chunk",
        "dualpipe-v or auto with mesh.pp of 2 or more",
    ),
    (
        {"pipeline.schedule": "auto", "pipeline.virtual_stages": 2},
        "pipeline.virtual_stages",
        "no schedule has 2 model chunks on the only",
        "use 1 or null, or set mesh.pp",
    ),
    (
        {"pipeline.schedule": "auto", "mesh.pp": 2, "pipeline.split": [1, 1, 2]},
        "pipeline.split",
        "3 entries for 2 stages",
        "give 2 entries",
    ),
    ({"batch_ramp.start": 4}, "batch_ramp.samples", "too few for 12 batch sizes", "use 12 or more"),
    ({"batch_ramp.start": 15}, "batch_ramp.samples", "too few for 1 batch size below 16", "use 15 or more"),
    (
        {"batch_ramp.start": 4, "batch_ramp.increment": 5, "batch_ramp.samples": 64, "micro_batch_size": 4},
        "batch_ramp.increment",
        "steps of 5 don't lead",
        "use 4 or 12",
    ),
    # what has no effect
    (
        {"checkpoint.keep_last": None, "checkpoint.keep_every": 100},
        "checkpoint.keep_every",
        "where every checkpoint is kept",
        "set checkpoint.keep_last",
    ),
    ({"checkpoint.keep_best": 2}, "checkpoint.keep_best", "2 has no effect where no", "set evaluate.every"),
    (
        {"optimizer.name": "sgd", "optimizer.beta2": 0.9},
        "optimizer.beta2",
        "0.9 has no effect with this optimizer",
        "leave it at 0.95, or set optimizer.name to adamw, muon or lion",
    ),
    ({"optimizer.name": "lion", "optimizer.eps": 1e-6}, "optimizer.eps", "no effect", "to adamw or muon"),
    ({"optimizer.momentum": 0.5}, "optimizer.momentum", "no effect with this", "to muon or sgd"),
    ({"optimizer.nesterov": False}, "optimizer.nesterov", "false has no effect", "leave it at true, or"),
    ({"optimizer.newton_schulz": "bf16"}, "optimizer.newton_schulz", "bf16 has no effect", "to muon"),
    (
        {"optimizer.weight_decay": 0, "optimizer.decay_all": True},
        "optimizer.decay_all",
        "where nothing decays",
        "set optimizer.weight_decay",
    ),
    (
        {"optimizer.groups": [{"match": "embed.*", "freeze": True, "lr": 2}]},
        "optimizer.groups[0].lr",
        "2 has no effect on parameters that are frozen",
        "leave it at 1, or set freeze to false",
    ),
    ({"precision.loss_scale": 8}, "precision.loss_scale", "on other types than fp16", "leave it at 65536.0"),
    (
        {"precision.dtype": "bf16", "precision.loss_scale_window": 8},
        "precision.loss_scale_window",
        "on other types",
        "1000",
    ),
    (
        {"memory.recompute": "full", "memory.recompute_parts": ["norm"]},
        "memory.recompute_parts",
        "['norm'] has no effect where memory.recompute is not selective",
        "set memory.recompute to selective",
    ),
    (
        {"memory.recompute": "selective", "memory.recompute_parts": ["dropout"]},
        "memory.recompute_parts",
        "the model has no dropout",
        "name other parts too",
    ),
    ({"memory.offload_min_mb": 2}, "memory.offload_min_mb", "no activations are offloaded", "leave it at 1.0"),
    (
        {"data_parallel.zero": 0, "data_parallel.prefetch": 2},
        "data_parallel.prefetch",
        "under ZeRO 0",
        "data_parallel.zero to 1, 2 or 3",
    ),
    (
        {"data_parallel.zero": 2, "data_parallel.reduce": "last_microbatch"},
        "data_parallel.reduce",
        "no effect below ZeRO 3",
        "data_parallel.zero to 3",
    ),
    (
        {**EXPERTS, "mesh.expert_dispatch": "all_gather"},
        "mesh.expert_dispatch",
        "whole experts, and all of them",
        "mesh.ep or mesh.etp",
    ),
    ({"model.max_positions": 64}, "model.max_positions", "no positions are learned", "model.positions to learned"),
    (
        {"model.positions": "none", "model.rope_theta": 5e5},
        "model.rope_theta",
        "other positions than rope",
        "leave it at 10000.0",
    ),
    ({"batch_ramp.increment": 4}, "batch_ramp.increment", "the batch does not grow", "set batch_ramp.start"),
    ({"lr.changes": [{"peak": 1e-4}]}, "lr.changes[0]", "does not say when it begins", "set start_step"),
    ({"lr.changes": [{"start_step": 5}]}, "lr.changes[0]", "changes nothing", "give peak"),
    ({"lr.changes": [{"start_step": -1, "peak": 1}]}, "lr.changes[0].start_step", "-1 is too small", "0 or later"),
    (
        {"lr.changes": [{"start_step": 5, "peak": 1}, {"start_step": 5, "peak": 2}]},
        "lr.changes[1].start_step",
        "5 is not after 5",
        "order changes",
    ),
    ({"lr.changes": [{"start_step": 5, "peak": 0}]}, "lr.changes[0].peak", "0.0 is too small", "more than 0"),
    ({"lr.changes": [{"start_step": 5, "peak": 1e-5}]}, "lr.changes[0].peak", "below the final rate", "at most 1e-05"),
    (
        {"lr.warmup_steps": 9, "lr.changes": [{"start_step": 5, "decay_steps": 9}]},
        "lr.changes[0].decay_steps",
        "9 steps are over before the warmup of 9",
        "at least 10",
    ),
    (
        {"lr.changes": [{"start_step": 5, "stable_fraction": 0.5}]},
        "lr.changes[0].stable_fraction",
        "other decays than wsd",
        "set decay to wsd",
    ),
    ({"observe.port": 65536}, "observe.port", "65536 is too large", "at most 65535"),
    ({"observe.host": "0.0.0.0"}, "observe.host", "no effect where nothing listens", "set observe.port"),
    ({"observe.port": 0, "observe.host": " "}, "observe.host", "is empty", "give a text"),
    ({"lr.stable_fraction": 0.5}, "lr.stable_fraction", "other decays than wsd", "set lr.decay to wsd"),
    ({"evaluate.batches": 0, "evaluate.every": 5}, "evaluate.every", "evaluate.batches is 0", "leave it at null"),
    ({"data.blend": HALVES, "data.dataset": "c"}, "data.blend", "one data set or a blend", "data.dataset to null"),
    ({"data.blend": HALVES, "data.sources": "text"}, "data.sources", "tokenized already", "leave data.blend empty"),
    ({"data.blend": HALVES, "data.max_mb": 5}, "data.max_mb", "tokenized already", "leave it at null"),
    (
        {"data.blend": [*HALVES, {"dataset": "c", "weight": 0.25}]},
        "data.blend",
        "the weights sum to 1.25, not to 1",
        "use 0.4, 0.4, 0.2",
    ),
    (
        {"data.blend": [{"dataset": "a", "weight": 0.9995}, {"dataset": "b", "weight": 0.0005}]},
        "data.blend",
        "the weight 0.0005 of source 1 is less than one sample in a block of 1024",
        "use 0, or at least 0.0009766, or data.blend_block of 2048",
    ),
    ({"data.blend": [{"dataset": "a", "weight": -1}]}, "data.blend", "a weight of -1 is too small", "0 or more"),
    ({"data.blend": [{"dataset": " "}]}, "data.blend[0].dataset", "is empty", "name the folder"),
    (
        {"data.blend": [{"dataset": "a"}, {"dataset": "b", "weight": 0}]},
        "data.blend[1].weight",
        "is 0 in every stage",
        "give it a weight, or remove it",
    ),
    (
        {"data.blend": [{"dataset": "a", "max_epochs": 0}]},
        "data.blend[0].max_epochs",
        "0 is too small",
        "more than 0, or null",
    ),
    ({"data.blend_block": 64}, "data.blend_block", "no effect without a blend", "leave it at 1024"),
    (
        {"data.blend": [{"dataset": "a", "sources": ["b"]}], "data.tokenizer.path": "t"},
        "data.blend[0]",
        "names a tokenized data set and text",
        "leave dataset or sources empty",
    ),
    (
        {"data.blend": [{"dataset": "a", "weight": 0.5}, {"sources": ["b"], "weight": 0.5}]},
        "data.tokenizer.path",
        "no tokenizer is given",
        "such as DATASET/tokenizer.json",
    ),
    (
        {"data.source": "text", "data.dataset": "a"},
        "data.source",
        "names a data set that is tokenized already",
        "set data.dataset to null",
    ),
    (
        {"data.source": "text", "data.blend": HALVES},
        "data.source",
        "each entry of a blend says for itself",
        "name the text in `sources`",
    ),
    (
        {"data.source": "text", "data.packing": "best_fit"},
        "data.packing",
        "packs documents by their tokens",
        "use chop or pad, or set data.source to tokens",
    ),
    (
        {"data.source": "text", "data.packing": "pad", "data.too_long": "drop"},
        "data.too_long",
        "not known before their text is tokenized",
        "use cut",
    ),
    (
        {"data.source": "text", "data.format": "chat"},
        "data.format",
        "loss spans of whole conversations",
        "use text, or set data.source to tokens",
    ),
    (
        {"data.source": "text", "data.shard_mb": 8},
        "data.shard_mb",
        "where no data set is made",
        "data.source to tokens",
    ),
    (
        {"data.source": "text", "data.metadata_keys": ["n"]},
        "data.metadata_keys",
        "where no data set is made",
        "data.source to tokens",
    ),
    (
        {"data.text_fill": 0.9},
        "data.text_fill",
        "where no text is tokenized as it is read",
        "set data.source to text",
    ),
    ({"data.source": "text", "data.text_fill": 0}, "data.text_fill", "0 is too small", "at least 0.1"),
    ({"data.stages": [{"start_step": 5, "weights": [1]}]}, "data.stages", "without a blend", "leave it at []"),
    (
        {"data.blend": HALVES, "data.stages": [{"weights": [0.5, 0.5]}]},
        "data.stages[0]",
        "does not say when it begins",
        "one of start_step and start_sample",
    ),
    (
        {"data.blend": HALVES, "data.stages": [{"start_step": 5, "start_sample": 9, "weights": [0.5, 0.5]}]},
        "data.stages[0]",
        "both a step and a sample",
        "one of start_step and start_sample",
    ),
    (
        {
            "data.blend": HALVES,
            "data.stages": [{"start_step": 5, "weights": [0.5, 0.5]}, {"start_sample": 80, "weights": [0.5, 0.5]}],
        },
        "data.stages[1].start_sample",
        "begins with sample 80, and the stage before it with sample 80",
        "order stages",
    ),
    (
        {"data.blend": HALVES, "data.stages": [{"start_step": 0, "weights": [0.5, 0.5]}]},
        "data.stages[0].start_step",
        "begins with sample 0",
        "after the first sample",
    ),
    (
        {"data.blend": HALVES, "data.stages": [{"start_step": 5, "weights": [1]}]},
        "data.stages[0].weights",
        "1 weight for 2 entries of data.blend",
        "one for each",
    ),
    (
        {"data.blend": HALVES, "data.stages": [{"start_step": 5, "weights": [0.5, 1.5]}]},
        "data.stages[0].weights",
        "the weights sum to 2",
        "use 0.25, 0.75",
    ),
    (
        {"data.validation": [{"name": "a b", "dataset": "a"}]},
        "data.validation[0].name",
        "'a b' is no name",
        "letters, digits",
    ),
    (
        {"data.validation": [{"name": "a", "dataset": "a"}, {"name": "a", "dataset": "b"}]},
        "data.validation[1].name",
        "'a' is taken",
        "a name of its own",
    ),
    ({"data.validation": [{"name": "a"}]}, "data.validation[0].dataset", "is empty", "name the folder"),
    (
        {"data.validation": [{"name": "a", "dataset": "a"}], "evaluate.batches": 0},
        "data.validation",
        "evaluate.batches is 0",
        "set evaluate.batches",
    ),
    (
        {"observe.trace_steps": [200, 201]},
        "observe.trace_steps",
        "ends after step 100, before step 200",
        "begin at 100",
    ),
]


@pytest.mark.parametrize(("changes", "where", "what", "remedy"), CASES, ids=[case[1] + "-" + case[2] for case in CASES])
def test_a_rule_says_where_what_and_remedy(changes, where, what, remedy):
    found = problems(RunConfig().replace(**changes))
    assert len(found) == 1, found
    assert found[0].where == where
    assert what in found[0].what
    assert remedy in found[0].remedy


def test_the_defaults_are_legal():
    assert problems(RunConfig()) == []


def test_all_are_reported_at_once():
    found = problems(RunConfig().replace(**{"steps": 0, "mesh.ep": 2, "model.dropout": 2, "micro_batch_size": 3}))
    assert {problem.where for problem in found} == {"steps", "mesh.ep", "model.dropout", "global_batch_size"}


def test_values_of_a_wrong_type_do_not_hide_the_rest():
    broken = RunConfig(steps="many", run_dir="", data_parallel=DataParallelConfig(zero=4))  # type: ignore[arg-type]
    found = {problem.where: problem.remedy for problem in problems(broken)}
    assert found == {
        "steps": "give a whole number",
        "data_parallel.zero": "give one of 0, 1, 2, 3",
        "run_dir": "give a text",
    }


def test_lists_of_sections_are_read_written_and_checked():
    groups = [{"match": "embed.*", "lr": 0.5}, {"match": "layers.0.*", "freeze": True}]
    config = RunConfig().replace(**{"optimizer.groups": groups})
    assert from_mapping(to_mapping(config)) == config
    with pytest.raises(ConfigError) as caught:
        from_mapping({"optimizer": {"groups": [{"match": "*", "rate": 1}, {"lr": "fast"}]}})
    assert [problem.where for problem in caught.value.problems] == [
        "optimizer.groups[0].rate",
        "optimizer.groups[1].lr",
    ]
    broken = OptimizerConfig(groups=(ParameterGroup(lr="fast"),))  # type: ignore[arg-type]
    assert [problem.where for problem in problems(RunConfig(optimizer=broken))] == ["optimizer.groups[0].lr"]


def test_auto_takes_as_many_chunks_as_it_is_given_stages_or_told():
    auto = RunConfig().replace(**{"pipeline.schedule": "auto", "mesh.pp": 2, "model.layers": 10})
    told = make_plan(auto.replace(**{"pipeline.virtual_stages": 5}), None)
    assert told.choice is not None
    assert {candidate.chunks for candidate in told.choice.candidates} == {5}
    given = make_plan(auto.replace(**{"pipeline.layout": "E" + "|".join(["t"] * 10) + "L"}), None)
    assert [end - begin for begin, end in given.stages] == [1] * 10


def test_a_group_after_others_that_match_all_of_it_is_refused():
    groups = [{"match": "layers.*"}, {"match": "layers.0.*", "lr": 2}]
    with pytest.raises(ConfigError) as caught:
        make_plan(RunConfig().replace(**{"optimizer.groups": groups}), None)
    (problem,) = caught.value.problems
    assert problem.where == "optimizer.groups[1].match"
    assert problem.remedy.startswith("put it first")


def test_every_key_named_in_a_rule_exists():
    keys = set(flatten(to_mapping(RunConfig())))
    assert {rule.key for rule in RANGES} <= keys
    assert {key for reads, _ in RULES for key in reads.split()} <= keys


@settings(max_examples=150, deadline=None)
@given(
    st.fixed_dictionaries(
        {
            "model.heads": st.integers(1, 12),
            "model.kv_heads": st.none() | st.integers(1, 6),
            "model.hidden": st.sampled_from([64, 96, 120]),
            "model.ffn": st.sampled_from([96, 100, 128]),
            "model.layers": st.integers(1, 9),
            "mesh.tp": st.integers(1, 6),
            "mesh.cp": st.integers(1, 6),
            "mesh.cp_all_to_all": st.integers(1, 3),
            "sequence_length": st.sampled_from([240, 252, 256]),
            "mesh.pp": st.integers(1, 4),
            "mesh.dp": st.integers(1, 3),
            "pipeline.virtual_stages": st.none() | st.integers(1, 3),
            "pipeline.schedule": st.sampled_from([name for name in SCHEDULE_CHUNKS if name != "auto"]),
            "global_batch_size": st.integers(1, 24),
            "micro_batch_size": st.integers(1, 2),
        }
    )
)
def test_what_the_rules_admit_can_be_planned(changes):
    config = RunConfig().replace(**changes, **{"mesh.sequence_parallel": False})
    if problems(config):
        return
    plan = make_plan(config, None)
    assert plan.stages[-1][1] == config.model.layers
    assert sum(len(row) for row in plan.evaluation.rows) == config.microbatches * len(plan.stages)
    assert str(plan)
