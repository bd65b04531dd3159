"""The one configuration of a run: frozen dataclasses, read from YAML, checked in one place.

A configuration is complete: every key has its value here, none at the point of use. Checking never changes a value.
`load` reads a file and `key=value` overrides, and refuses unknown keys with the nearest name; `problems` returns every
rule that a configuration breaks, each as where / what / remedy. Rules that need the cluster or the data are checked by
`raytron.plan.plan.make_plan` and by the data set when it is opened.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from raytron.deal import Deal
from raytron.errors import ConfigError, Problem
from raytron.reading import LONGEST, build, merged, parse

NormName = Literal["rmsnorm", "layernorm"]
PositionName = Literal["rope", "learned", "none"]
ActivationName = Literal["swiglu", "geglu", "reglu", "gelu", "gelu_tanh", "relu", "relu2", "silu"]
ScheduleName = Literal[
    "gpipe", "1f1b", "interleaved", "looped-bfs", "interleaved-zb", "zb-h1", "zb-h2", "zb-v", "v-half", "v-min",
    "dualpipe-v", "auto",
]  # fmt: skip
SCHEDULE_CHUNKS: dict[str, tuple[int, int | None]] = {  # least and most model chunks on a pipeline rank; None: any
    "gpipe": (1, 1), "1f1b": (1, 1), "interleaved": (2, None), "looped-bfs": (2, None), "interleaved-zb": (2, None),
    "zb-h1": (1, 1), "zb-h2": (1, 1), "zb-v": (2, 2), "v-half": (2, 2), "v-min": (2, 2), "dualpipe-v": (2, 2),
    "auto": (1, None),
}  # fmt: skip
V_SHAPED = ("zb-v", "v-half", "v-min", "dualpipe-v")  # a rank's two chunks are stages r and 2·pp - 1 - r
OptimizerName = Literal["adamw", "muon", "lion", "sgd"]
RecomputeName = Literal["none", "selective", "full"]
RecomputePart = Literal["attention", "norm", "activation", "dropout"]
DecayName = Literal["cosine", "linear", "wsd", "inverse_sqrt", "constant"]
GATED_ACTIVATIONS = ("swiglu", "geglu", "reglu")


@dataclass(frozen=True)
class ExpertsConfig:
    """A mixture of experts in place of some feed-forward layers (Shazeer et al., arXiv 1701.06538)."""

    count: int = 0  # routed experts of a layer; 0: every feed-forward layer is dense
    top_k: int = 2  # experts that each token goes to
    ffn: int | None = None  # width of one expert; None: model.ffn
    shared_ffn: int = 0  # width of the expert that every token goes through; 0: none
    shared_gate: bool = False  # the shared expert's output is weighed by a sigmoid of the token (Qwen2-MoE)
    first_dense: int = 0  # this many layers stay dense, then
    every: int = 1  # every n-th of the others has experts: 2 means the second, the fourth, …
    score: Literal["softmax", "sigmoid"] = "softmax"  # of the router's logits
    normalize: bool = True  # the weights of a token's chosen experts sum to 1
    scale: float = 1.0  # factor on those weights
    groups: int = 1  # experts in groups, of which
    group_top_k: int = 1  # a token may choose from this many (DeepSeek-V2, arXiv 2405.04434)
    capacity_factor: float | None = None  # an expert takes at most factor · tokens · top_k / count; None: dropless
    drop: Literal["probability", "position"] = "probability"  # who stays where an expert is full
    aux_loss: float = 0.0  # weight of the load balance loss of each sequence (Fedus et al., arXiv 2101.03961)
    z_loss: float = 0.0  # weight of the router's z-loss (Zoph et al., arXiv 2202.08906)
    bias_rate: float = 0.0  # step of the balancing bias without a loss (Wang et al., arXiv 2408.15664); 0: no bias


@dataclass(frozen=True)
class ModelConfig:
    """A decoder. The defaults are Llama's choices; GPT-2, Qwen and Mistral are other values of the same keys."""

    layers: int = 4
    hidden: int = 256
    heads: int = 8
    kv_heads: int | None = None  # None: as many as heads (multi-head attention)
    head_dim: int | None = None  # None: hidden / heads
    ffn: int = 704  # width of the feed-forward layer (of each of its two halves, where gated)
    vocab: int = 4096  # token ids are in [0, vocab)
    norm: NormName = "rmsnorm"
    norm_eps: float = 1e-5
    positions: PositionName = "rope"
    max_positions: int = 2048  # rows of a learned position table
    rope_theta: float = 10_000.0
    activation: ActivationName = "swiglu"  # of experts too
    qkv_bias: bool = False
    bias: bool = False  # on the attention output and the feed-forward layers
    qk_norm: bool = False  # RMS norm of each query and key head
    window: int | None = None  # sliding attention window in tokens; None: full causal attention
    tied_embeddings: bool = False
    dropout: float = 0.0  # embedding and residual dropout probability
    attention_dropout: float = 0.0
    init_std: float = 0.02
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)

    @property
    def num_kv_heads(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def dim_per_head(self) -> int:
        return self.hidden // self.heads if self.head_dim is None else self.head_dim

    @property
    def gated(self) -> bool:
        """Whether the feed-forward layer has a gate beside its up projection."""
        return self.activation in GATED_ACTIVATIONS

    @property
    def expert_ffn(self) -> int:
        """Width of one expert."""
        return self.ffn if self.experts.ffn is None else self.experts.ffn

    def has_experts(self, layer: int) -> bool:
        """Whether layer number `layer`, from 0, has experts in place of a dense feed-forward layer."""
        after = layer - self.experts.first_dense
        return self.experts.count > 0 and after >= 0 and (after + 1) % self.experts.every == 0

    @property
    def expert_layers(self) -> int:
        """How many layers have experts."""
        return sum(map(self.has_experts, range(self.layers)))


@dataclass(frozen=True)
class MeshConfig:
    """How many ways each axis cuts the work. World size = pp · dp · cp · tp; tp is innermost, pp outermost.

    Experts fold dp · cp · tp anew, on a grid of their own: expert data parallel · ep · etp, etp innermost.
    """

    pp: int = 1
    dp: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1  # ranks that share out the experts of a layer
    etp: int = 1  # ranks that cut each expert's width
    expert_dispatch: Literal["all_to_all", "all_gather"] = "all_to_all"  # how tokens reach the ranks of their experts
    replicate: int = 1  # dp = replicate × shard: optimizer state (and, by ZeRO level, more) is cut over the shard only
    cp_all_to_all: int = 1  # cp = ring × all-to-all: this many neighbours exchange heads for sequence (Ulysses)
    sequence_parallel: bool = True  # cut norms, dropout and residuals along the sequence over tp (no effect at tp=1)


@dataclass(frozen=True)
class PipelineConfig:
    schedule: ScheduleName = "1f1b"
    virtual_stages: int | None = None  # model chunks per pipeline rank; None: the fewest that the schedule takes
    split: tuple[int, ...] | None = None  # layers of each stage, first to last; None: balanced by cost
    layout: str | None = None  # stages as text, such as "Et|tt|tt|tL": E embedding, t layer, L loss head; or `split`
    memory_gb: float | None = None  # auto: GiB that a worker may fill; None: 90 % of what the cluster's devices have

    @property
    def chunks(self) -> int:
        """Model chunks on each pipeline rank."""
        return SCHEDULE_CHUNKS[self.schedule][0] if self.virtual_stages is None else self.virtual_stages


@dataclass(frozen=True)
class DataParallelConfig:
    zero: Literal[0, 1, 2, 3] = 1  # 0: all-reduce; sharded are 1: optimizer state; 2: gradients too; 3: weights too
    reduce: Literal["each_microbatch", "last_microbatch"] | None = None  # ZeRO 3: after which; None: as the level does
    bucket_mb: float = 25.0  # gradient bucket size in MiB of fp32
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"  # in which gradients travel; micro-batches are summed in fp32
    prefetch: int = 1  # blocks whose weights are gathered ahead of use: after an update, and always under ZeRO 3
    offload: bool = False  # gradient shares, masters and optimizer state live in host memory, and are updated there

    @property
    def reduces_each(self) -> bool:
        """Whether gradients are reduced after each micro-batch, so that their sums go in between; else after the last."""
        return self.zero >= 2 and self.reduce != "last_microbatch"


@dataclass(frozen=True)
class PrecisionConfig:
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"  # of weights and activations; masters are fp32 with every type
    moments: Literal["fp32", "bf16"] = "fp32"  # of the optimizer's running averages
    stochastic_rounding: bool = False  # of bf16 moments and of weights cast from masters
    loss_scale: float = 65536.0  # fp16: the first loss scale, then halved at overflow and
    loss_scale_window: int = 1000  # doubled after this many steps without one


@dataclass(frozen=True)
class MemoryConfig:
    """Work done twice, or bytes moved to the host, for less device memory."""

    recompute: RecomputeName = "none"  # selective: the parts named next; full: whole blocks
    recompute_parts: tuple[RecomputePart, ...] = ("attention", "norm", "activation", "dropout")  # of each block
    recompute_every: int = 1  # of every n blocks in a stage, the first is recomputed
    recompute_stages: tuple[int, ...] | None = None  # the stages that it holds for; None: all
    offload_activations: bool = False  # what a block keeps for its backward waits in (pinned) host memory
    offload_min_mb: float = 1.0  # MiB of a tensor that is worth moving
    loss_chunks: int = 1  # logits and loss are computed in this many pieces along the sequence


@dataclass(frozen=True)
class ParameterGroup:
    """What holds for parameters by name, such as layers.0.mlp.up.weight; of several groups that match, the first."""

    match: str = "*"  # glob on the full name
    lr: float = 1.0  # factor on the learning rate
    weight_decay: float | None = None  # in place of the optimizer's; None: as elsewhere
    freeze: bool = False  # no update, and no part in the gradient norm


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101), decay decoupled from the gradient, or another by name."""

    name: OptimizerName = "adamw"  # muon: hidden matrices by Muon, all else by AdamW
    beta1: float = 0.9  # adamw, lion
    beta2: float = 0.95
    eps: float = 1e-8  # adamw
    momentum: float = 0.95  # muon, sgd
    nesterov: bool = True
    newton_schulz_steps: int = 5  # muon: iterations, computed in
    newton_schulz: Literal["fp32", "bf16"] = "fp32"
    weight_decay: float = 0.1
    decay_all: bool = False  # True: also decay norms, biases and embeddings
    clip_norm: float | None = 1.0  # global gradient norm limit; None: no clipping
    at_once: bool = False  # no rank waits for all others before it updates; takes a copy of masters and moments
    groups: tuple[ParameterGroup, ...] = ()


@dataclass(frozen=True)
class LearningRateChange:
    """Another learning rate from one step on, in the keys that are given; earlier steps stay as they were."""

    start_step: int | None = None  # begins after so many steps
    peak: float | None = None
    final: float | None = None
    decay: DecayName | None = None
    decay_steps: int | None = None
    stable_fraction: float | None = None

    @property
    def given(self) -> dict[str, Any]:
        """The keys that change, and their values."""
        keys = (item.name for item in dataclasses.fields(self) if item.name != "start_step")
        return {key: value for key in keys if (value := getattr(self, key)) is not None}


@dataclass(frozen=True)
class LearningRateConfig:
    peak: float = 3e-4
    final: float = 3e-5  # where cosine, linear and wsd end
    warmup_steps: int = 0
    decay: DecayName = "cosine"
    decay_steps: int | None = None  # the horizon; None: `steps` as they stand when the run begins, then fixed
    stable_fraction: float = 0.8  # wsd: share of the steps after warmup that stay at the peak
    changes: tuple[LearningRateChange, ...] = ()  # on the way; a live run adds those that it is asked for (Run.set_lr)

    def at(self, step: int) -> LearningRateConfig:
        """As it stands after `step` steps."""
        changed = self
        for change in self.changes:
            if change.start_step is not None and change.start_step <= step:
                changed = dataclasses.replace(changed, **change.given)
        return changed


@dataclass(frozen=True)
class BatchRampConfig:
    """The global batch grows: from `start`, by `increment`, to global_batch_size after `samples` consumed sequences."""

    start: int | None = None  # sequences of the first steps; None: the full batch from the beginning
    increment: int = 1  # sequences; the rise is a multiple of it
    samples: int = 0  # sequences, of all ranks, over which the rise is spread evenly


@dataclass(frozen=True)
class TokenizerConfig:
    path: str | None = None  # tokenizer.json, a SentencePiece .model, tiktoken ranks, or `byte`; None: train a BPE
    vocab: int = 4096  # size of a byte-level BPE trained on the corpus, the end-of-document token included
    train_mb: float = 8.0  # MiB of text that it is trained on
    eod: str = "<|endoftext|>"  # token that ends each document
    pattern: str | None = None  # of tiktoken ranks: gpt2, cl100k, o200k, llama3, or a regular expression
    backend: Literal["auto", "tokenizers", "gigatoken"] = "auto"  # auto: gigatoken where it gives equal ids


@dataclass(frozen=True)
class SourceConfig:
    """One data set of a blend, or text that is tokenized as it is read."""

    dataset: str = ""  # a tokenized data set; or
    sources: tuple[str, ...] = ()  # text, as in data.sources
    weight: float = 1.0  # share of the samples, all shares together 1; 0: none until a stage gives it some
    max_epochs: float | None = None  # how often a run may read it at most; None: without limit


@dataclass(frozen=True)
class DataStageConfig:
    """Other weights of a blend from one sample on; earlier samples stay as they were."""

    start_step: int | None = None  # begins after so many steps; or
    start_sample: int | None = None  # with the sample of this id
    weights: tuple[float, ...] = ()  # one for each entry of data.blend, all together 1


@dataclass(frozen=True)
class ValidationConfig:
    """One validation set, whose loss is told by its name."""

    name: str = ""
    dataset: str = ""  # a tokenized data set
    split: Literal["validation", "train"] = "validation"  # of it; train: where all of a data set was kept apart


@dataclass(frozen=True)
class FimConfig:
    """Fill in the middle: documents whose middle comes last (Bavarian et al., arXiv 2207.14255), in training samples."""

    rate: float = 0.0  # share of documents
    spm_rate: float = 0.5  # of those, the share with the suffix before the prefix
    prefix: str = "<|fim_prefix|>"  # tokens, of the data set's tokenizer, that stand before
    middle: str = "<|fim_middle|>"  # each part
    suffix: str = "<|fim_suffix|>"


@dataclass(frozen=True)
class DataConfig:
    dataset: str | None = None  # a tokenized data set; None: prepared from `sources` into run_dir/data
    blend: tuple[SourceConfig, ...] = ()  # several data sets by weight, in place of `dataset` and `sources`
    blend_block: int = 1024  # samples among which each source of a blend has its exact share
    stages: tuple[DataStageConfig, ...] = ()  # a curriculum: later weights of the blend
    validation: tuple[ValidationConfig, ...] = ()  # the first is the main one; (): the data's own validation splits
    # tokens: `sources` are made into a data set first; text: they are tokenized as samples of them are read
    source: Literal["tokens", "text"] = "tokens"
    text_fill: float | None = None  # text: share of a sample that it is cut for; None: measured, so that little is lost
    sources: tuple[str, ...] = ("python-stdlib",)  # files, folders, globs, URLs of those, or the word python-stdlib
    format: Literal["text", "chat", "preference"] = "text"  # of a record; chat: messages, the assistant's are learned;
    # preference: `chosen` and `rejected`, messages or answers to a `prompt`, which become two documents
    text_key: str = "text"  # text: field or column of JSONL, Parquet and Arrow sources
    messages_key: str = "messages"  # chat: field or column of a list of {role, content}
    chat_template: str | None = None  # of messages: a Jinja file; None: the tokenizer's own, or ChatML
    metadata_keys: tuple[str, ...] = ()  # other fields or columns that are kept beside each document
    on_bad_record: Literal["stop", "skip"] = "stop"  # skip: bad records are left out, and counted in the manifest
    # chop: documents end to end, cut every sequence_length tokens; best_fit: whole documents, packed with little padding;
    # pad: one a sample. The last two keep documents apart
    packing: Literal["chop", "best_fit", "pad"] = "chop"
    too_long: Literal["cut", "drop"] = "cut"  # documents longer than a sample, where documents are kept whole
    document_mask: bool = False  # attention does not cross the end of a document, and positions begin anew after it
    objective: Literal["causal", "masked", "span_corruption"] = "causal"  # what a sample asks of the model
    fim: FimConfig = field(default_factory=FimConfig)
    # direct: each worker reads memory maps of local shards, byte ranges of remote ones; ray_data: tasks of Ray Data read
    feed: Literal["direct", "ray_data"] = "direct"
    prefetch: int = 2  # steps whose samples are read ahead, in a thread of each worker; 0: none
    validation_fraction: float = 0.02  # share of documents, chosen by hash, kept for evaluation
    shard_mb: float = 256.0  # size of an Arrow shard in MiB of tokens
    max_mb: float | None = None  # stop after this much text; None: all of it
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)

    @property
    def apart(self) -> bool:
        """Whether the documents of a sample are kept apart."""
        return self.document_mask or self.packing != "chop"

    @property
    def reads_text(self) -> bool:
        """Whether any text is tokenized as it is read."""
        return self.source == "text" or any(source.sources for source in self.blend)


@dataclass(frozen=True)
class CheckpointConfig:
    every: int | None = 100  # steps between checkpoints; None: only at the end
    background: bool = True  # ranks train on while checkpoints are written (from a copy in host memory)
    directory: str | None = None  # a folder or an object store (s3://bucket/prefix); None: run_dir/checkpoints
    keep_last: int | None = 3  # committed generations to keep; None: all
    keep_every: int | None = None  # those whose step is a multiple of this stay, too
    keep_best: int | None = None  # so many with the lowest validation loss stay, too


@dataclass(frozen=True)
class EvaluateConfig:
    every: int | None = None  # steps between evaluations; None: only at the end
    batches: int = 4  # validation batches of global_batch_size sequences; 0: no evaluation
    prompt: str | None = None  # continued greedily when the run ends
    prompt_tokens: int = 32  # length of that continuation


@dataclass(frozen=True)
class GuardConfig:
    """What to do about numbers that can't be right, and about ranks that are wrong or slow."""

    on_nonfinite: Literal["skip", "rollback", "stop"] = "skip"  # where a second run of the step is not finite either
    on_spike: Literal["keep", "skip", "rollback", "stop"] = "keep"  # where loss or gradient norm leap in it, too
    spike: float | None = 20.0  # robust standard deviations above the median that are a leap; None: nothing is
    spike_window: int = 100  # steps that the median is of
    rollback_steps: int = 20  # to go back at least
    max_skipped: int = 20  # steps skipped in a row, for one of these causes, before the run stops
    straggler_ratio: float | None = 1.5  # times as long as its peers a rank is busy to be called slow; None: none is
    evict_stragglers: bool = False  # whether slow ranks are replaced, or only told of
    digest_every: int | None = 100  # steps between comparisons of replicas' parameters, to the bit; None: never


@dataclass(frozen=True)
class ObserveConfig:
    peak_tflops: float | None = None  # of one device, for MFU; None: known devices by name, else no MFU
    layer_norms: int | None = None  # steps between records of each layer's gradient norm; None: never
    gradient_noise: bool = False  # record what the gradient noise scale is made of (needs dp > 1)
    tensorboard: bool = False
    ray_metrics: bool = True
    trace_steps: tuple[int, ...] | None = None  # [first, last] step whose actions are traced, into run_dir/trace
    port: int | None = (
        None  # of the run's status endpoint, where its controller is; 0: any free one; None: there is none
    )
    host: str = "127.0.0.1"  # that it listens on; others than loopback only where Ray has a token


@dataclass(frozen=True)
class ClusterConfig:
    address: str | None = None  # None: RAY_ADDRESS, a surrounding Ray job, or else a local Ray of the run's own
    device: Literal["auto", "cpu", "cuda"] = "auto"
    cpus_per_worker: float = 1.0
    threads_per_worker: int | None = None  # torch threads; None: cpu cores shared out evenly
    detached: bool = False  # the run outlives the process that launched it
    timeout_s: float = 120.0  # of one collective; a rank silent for longer counts as lost
    placement_timeout_s: float = 600.0  # how long to wait for room on the cluster before the run fails


@dataclass(frozen=True)
class RecoveryConfig:
    """How a run comes back after it has lost workers."""

    memory_every: int | None = 1  # steps between copies of the state in (other nodes') host memory; None: no copies
    spares: int = 0  # workers that wait, started, to take a lost one's place
    heartbeat_s: float = 4.0  # a worker that does not answer for longer counts as lost
    lease_s: float = 120.0  # workers whose controller is silent for longer end themselves
    notices: Literal["auto", "none", "ec2", "gce", "azure"] = (
        "auto"  # whose word is heard that a machine will be taken away
    )
    on_out_of_memory: Literal["stop", "recompute"] = "stop"  # recompute: go on, once, with a stronger memory.recompute
    max_restarts: int = 20  # losses within window_s before the run gives up; preempted machines don't count
    window_s: float = 3600.0


@dataclass(frozen=True)
class ElasticConfig:
    """A run that goes on with the workers that are left, and takes in those that come. Without bounds it does neither."""

    min_workers: int | None = None  # with fewer it waits for more; None: 1, if max_workers is set
    max_workers: int | None = None  # more wait as spares; None: as many as there are, if min_workers is set
    grow_after_s: float = 30.0  # for so long there has to be room before a run takes it
    pays_within_s: float = 600.0  # and the stop that growing takes has to be made up for in so long

    @property
    def on(self) -> bool:
        """Whether the number of workers may change."""
        return self.min_workers is not None or self.max_workers is not None

    @property
    def fewest(self) -> int:
        """Workers that the run needs at least."""
        return self.min_workers or 1

    def most(self, workers: int) -> int:
        """How many of some workers the run may use."""
        return workers if self.max_workers is None else min(workers, self.max_workers)


@dataclass(frozen=True)
class ResumeConfig:
    allow: tuple[str, ...] = ()  # keys that may differ from the run directory's although they change the result


@dataclass(frozen=True)
class RunConfig:
    """Everything that a run is made from."""

    name: str = "run"
    run_dir: str = "runs/run"
    steps: int = 100
    seed: int = 0
    global_batch_size: int = 16  # sequences per optimizer step, over all ranks
    micro_batch_size: int = 1  # sequences per forward pass of one rank
    sequence_length: int = 256  # tokens per sequence
    determinism: Literal["mesh", "canonical"] = "mesh"  # canonical: equal to the bit over dp, too
    model: ModelConfig = field(default_factory=ModelConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    data_parallel: DataParallelConfig = field(default_factory=DataParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lr: LearningRateConfig = field(default_factory=LearningRateConfig)
    batch_ramp: BatchRampConfig = field(default_factory=BatchRampConfig)
    data: DataConfig = field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    observe: ObserveConfig = field(default_factory=ObserveConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    elastic: ElasticConfig = field(default_factory=ElasticConfig)
    resume: ResumeConfig = field(default_factory=ResumeConfig)

    def deal(self, sequences: int | None = None) -> Deal:
        """How the micro-batches of a step are dealt to data-parallel ranks. sequences: of the step; None:
        global_batch_size."""
        return Deal((sequences or self.global_batch_size) // self.micro_batch_size, self.mesh.dp)

    @property
    def microbatches(self) -> int:
        """The most micro-batches that a data-parallel rank runs in a step (gradient accumulation)."""
        return self.deal().most

    @property
    def lockstep(self) -> bool:
        """Whether data-parallel ranks talk to each other within a micro-batch: gathering weights (ZeRO 3), reducing
        gradients early (ZeRO 2), exchanging tokens of experts. Then all run equally many; who has fewer adds empty ones."""
        mesh, zero = self.mesh, self.data_parallel.zero
        early = zero == 3 or (zero == 2 and self.determinism == "mesh")
        return (early and mesh.dp > mesh.replicate) or mesh.cp * mesh.tp % (mesh.ep * mesh.etp) > 0

    def microbatches_run(self, dp: int, sequences: int | None = None) -> int:
        """Micro-batches, empty ones included, that the data-parallel rank `dp` runs in a step."""
        deal = self.deal(sequences)
        return deal.most if self.lockstep else len(deal.of(dp))

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Every global batch size that the run goes through, ascending; the last is global_batch_size."""
        ramp, full = self.batch_ramp, self.global_batch_size
        return (full,) if ramp.start is None else (*range(ramp.start, full, ramp.increment), full)

    def batch_size_at(self, consumed: int) -> int:
        """Sequences of the step that begins when `consumed` sequences are done: each level below the full one lasts for an
        equal number of sequences."""
        rise = len(self.batch_sizes) - 1
        if consumed >= self.batch_ramp.samples or rise == 0:
            return self.global_batch_size
        return self.batch_sizes[consumed * rise // self.batch_ramp.samples]

    def samples_after(self, steps: int) -> int:
        """Sequences that the first `steps` steps consume."""
        consumed, left = 0, steps
        rise = len(self.batch_sizes) - 1
        for level, size in enumerate(self.batch_sizes[:-1], start=1):
            level_end = -(-level * self.batch_ramp.samples // rise)  # the first count that belongs to the next level
            taken = min(left, max(0, -(-(level_end - consumed) // size)))
            consumed, left = consumed + taken * size, left - taken
        return consumed + left * self.global_batch_size

    @property
    def lr_horizon(self) -> int:
        """Steps over which the learning rate decays."""
        return self.steps if self.lr.decay_steps is None else self.lr.decay_steps

    def replace(self, **overrides: Any) -> RunConfig:
        """A copy with dotted keys replaced: `config.replace(**{"mesh.tp": 2, "steps": 10})`."""
        return from_mapping(merged(to_mapping(self), overrides))


def load(source: str | Path | Mapping[str, Any], overrides: Iterable[str] = ()) -> RunConfig:
    """Reads a YAML file (or a mapping), then applies `key=value` overrides with dotted keys and YAML values.

    Raises ConfigError with every unknown key, wrong type and unreadable override at once; does not check the rules
    between values (`problems` does).
    """
    raw: Any = source
    if isinstance(source, str | Path):
        path = Path(source)
        try:
            with path.open(encoding="utf-8") as file:
                raw = parse(file.read(LONGEST + 1))
        except OSError as error:
            reason = error.strerror or str(error)
            raise ConfigError([Problem(str(path), reason, "give the path of a YAML file")]) from None
        except ValueError as error:
            raise ConfigError([Problem(str(path), f"not valid YAML: {error}", "mend the file")]) from None
    if raw is None:
        raw = {}
    if not isinstance(raw, Mapping):
        raise ConfigError([Problem(str(source)[:80], "holds no mapping of keys", "write `key: value` lines")])
    return from_mapping(merged(raw, parse_overrides(overrides)))


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """`key=value` texts, with dotted keys and YAML values, by key. Raises ConfigError for all that can't be read."""
    changes: dict[str, Any] = {}
    found: list[Problem] = []
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not key:
            found.append(Problem(item, "is not of the form key=value", "write e.g. mesh.tp=2"))
            continue
        try:
            changes[key] = parse(text)
        except ValueError:
            found.append(Problem(key, f"the value {text[:200]!r} is not valid YAML", "quote it"))
    if found:
        raise ConfigError(found)
    return changes


def from_mapping(raw: Mapping[str, Any]) -> RunConfig:
    """Builds a RunConfig from nested mappings. Raises ConfigError with every key that is unknown or of a wrong type."""
    found: list[Problem] = []
    config = build(RunConfig, raw, found)
    if found:
        raise ConfigError(found)
    assert isinstance(config, RunConfig)
    return config


def to_mapping(config: Any) -> dict[str, Any]:
    """The nested plain mapping of a configuration or one of its parts, tuples as lists."""
    out: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            value = to_mapping(value)
        elif isinstance(value, tuple):
            value = [to_mapping(inner) if dataclasses.is_dataclass(inner) else inner for inner in value]
        out[item.name] = value
    return out


def to_yaml(config: RunConfig) -> str:
    """The complete configuration as YAML; `load` of it gives the same configuration."""
    return yaml.safe_dump(to_mapping(config), sort_keys=False, allow_unicode=True)


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping with dotted keys."""
    out: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            out.update(flatten(value, f"{prefix}{key}."))
        else:
            out[f"{prefix}{key}"] = value
    return out


def divisors(number: int) -> list[int]:
    """All positive divisors, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]
