"""The configuration of a run: one tree of frozen dataclasses, and checks that say value, rule and remedy.

A preset (presets.py) or a YAML or JSON file (config_file.py) gives a complete `Config`; `--section.field VALUE` changes
single fields. A field's own rules are checked here; what has to fit together is checked by checks.py.
"""

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args

import tyro

from megagrow.earlier_growth import EarlierGrowth
from megagrow.rules import MAX_SIZE, divisors, require, require_not_negative, require_size
from megagrow.salt_config import SaltConfig


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are changed for contexts longer than those that a model was first trained on.

    `linear` divides all of them by `factor` (Chen et al., 2023, arXiv 2306.15595), `llama3` the low ones only (Llama 3,
    2024, arXiv 2407.21783), `yarn` by parts (Peng et al., 2023, arXiv 2309.00071); the names are those of config.json.
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    original_max_positions: int = 0  # context before the change; llama3 and yarn need it
    low_freq_factor: float = 1.0  # llama3: periods longer than original / this are divided
    high_freq_factor: float = 4.0  # llama3: periods shorter than original / this are kept
    beta_fast: float = 32.0  # yarn: turns over the original context from which on a frequency is kept
    beta_slow: float = 1.0  # yarn: turns below which it is divided
    attention_factor: float = 0.0  # yarn: scale of cosines and sines; 0: 0.1 ln(factor) + 1
    truncate: bool = True  # yarn: the range between the two is rounded to whole dimensions

    def __post_init__(self) -> None:
        for name in ("factor", "low_freq_factor", "high_freq_factor", "attention_factor"):
            value = getattr(self, name)
            require(math.isfinite(value), f"rope_scaling.{name}={value} must be a finite number")
        require(self.factor >= 1, f"rope_scaling.factor={self.factor} must be at least 1")
        require_not_negative(self, "rope_scaling", "original_max_positions", "attention_factor")
        require(
            self.kind == "linear" or self.original_max_positions > 0,
            f"rope_scaling.kind={self.kind} needs rope_scaling.original_max_positions, the context before scaling",
        )
        require(
            self.high_freq_factor > self.low_freq_factor > 0,
            f"rope_scaling.high_freq_factor={self.high_freq_factor} must exceed low_freq_factor={self.low_freq_factor},"
            " and both must be positive",
        )
        require(
            1e-6 <= self.beta_slow <= self.beta_fast <= 1e6,
            f"rope_scaling.beta_fast={self.beta_fast} must be at least rope_scaling.beta_slow={self.beta_slow}, and "
            "both must lie between 1e-6 and 1e6",
        )


@dataclass(frozen=True)
class ModelConfig:
    """One transformer; the fields that differ between families are switches, not subclasses."""

    # Hugging Face model type that it is exported as
    family: Literal["llama", "mistral", "qwen2", "qwen3", "gpt2", "gpt_neox", "bert", "roberta"] = "llama"
    vocab_size: int = 32_000
    hidden_size: int = 512
    num_layers: int = 8
    num_heads: int = 8  # query heads
    num_kv_heads: int = 0  # 0: as many as query heads
    head_dim: int = 0  # 0: hidden_size / num_heads
    ffn_size: int = 1376
    max_seq_length: int = 1024  # positions that the learned table serves; context stated in the export
    # clm: each token sees those before it and predicts the next one. mlm (encoders): each sees all, masked ones are
    # predicted, through a dense layer, a norm and a bias per token of the vocabulary before the output matrix.
    objective: Literal["clm", "mlm"] = "clm"
    norm: Literal["rms_norm", "layer_norm"] = "rms_norm"
    norm_eps: float = 1e-5
    # after: each residual sum is normalised, and so are the embeddings; there is no final norm
    norm_place: Literal["before", "after"] = "before"
    parallel_residual: bool = False  # attention and MLP read the same residual stream, each through a norm of its own
    positions: Literal["rope", "learned"] = "rope"
    position_offset: int = 0  # rows of the position table before that of the first token
    rope_theta: float = 10_000.0
    rope_fraction: float = 1.0  # share of each head's dimensions, from the first on, that is rotated
    rope_scaling: RopeScaling | None = None
    num_token_types: int = 0  # rows of the table of token types (segments); packed text is of type 0
    # gelu, geglu: the tanh approximation, as in GPT-2; gelu_erf: the exact function, as in BERT
    activation: Literal["swiglu", "geglu", "gelu", "gelu_erf"] = "swiglu"
    attention_bias: Literal["none", "qkv", "all"] = "none"  # which linear layers of attention have biases
    mlp_bias: bool = False  # biases on the MLP's linear layers
    qk_norm: bool = False  # RMSNorm over every query and key head, before rotation
    tied_embeddings: bool = False

    def __post_init__(self) -> None:
        require_size(
            self, "model", "vocab_size", "hidden_size", "num_layers", "num_heads", "ffn_size", "max_seq_length"
        )
        require_not_negative(
            self, "model", "num_kv_heads", "head_dim", "position_offset", "num_token_types", "norm_eps"
        )
        if self.num_kv_heads == 0:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        if self.head_dim == 0:
            require(
                self.hidden_size % self.num_heads == 0,
                f"model.num_heads={self.num_heads} does not divide hidden_size={self.hidden_size}; "
                f"use {divisors(self.hidden_size)}, or set model.head_dim",
            )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_heads)
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"model.num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}; "
            f"use {divisors(self.num_heads)}",
        )
        require(
            0 < self.rope_fraction <= 1,
            f"model.rope_fraction={self.rope_fraction} must be greater than 0 and at most 1",
        )
        require(
            self.positions != "rope" or (self.rotary_dim > 0 and self.rotary_dim % 2 == 0),
            f"model.head_dim={self.head_dim} is odd, or so is the share of it that rope_fraction={self.rope_fraction} "
            f"rotates ({self.rotary_dim}); rotary positions turn pairs of dimensions: make it even",
        )
        require_size(self, "model", "num_kv_heads", "head_dim")
        require(
            0 < self.rope_theta < math.inf, f"model.rope_theta={self.rope_theta} must be positive, and a finite number"
        )
        require(
            self.rope_theta > 1 or self.rope_scaling is None or self.rope_scaling.kind != "yarn",
            f"model.rope_theta={self.rope_theta} must be greater than 1 with rope_scaling.kind=yarn, whose ramp lies "
            "between long and short periods",
        )
        require(
            max(self.position_offset, self.num_token_types) <= MAX_SIZE,
            f"model.position_offset={self.position_offset} and model.num_token_types={self.num_token_types} must be at "
            f"most {MAX_SIZE}",
        )
        require(
            not (self.parallel_residual and self.norm_place == "after"),
            "model.parallel_residual needs norms before attention and MLP; use model.norm_place=before",
        )

    @property
    def is_gated(self) -> bool:
        """Whether the MLP multiplies by a gate, which is fused with the up projection."""
        return self.activation in ("swiglu", "geglu")

    @property
    def is_causal(self) -> bool:
        """Whether a token sees no later ones."""
        return self.objective == "clm"

    @property
    def rotary_dim(self) -> int:
        """Dimensions of each head that are rotated, from the first on."""
        return int(self.head_dim * self.rope_fraction)

    @property
    def queries_per_kv(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True)
class DataConfig:
    """Token files (Megatron .bin/.idx, named by their common prefix) and how samples are cut from them."""

    train: str | tuple[str | float, ...] = ""  # prefix of the training tokens, or weights and prefixes: "0.7 A 0.3 B"
    validation: str = ""  # prefix (or prefixes) of the held-out tokens; empty: no evaluation
    tokenizer: str = ""  # sentencepiece .model, tokenizer.json or its folder; copied into exports
    seq_length: int = 128  # inputs per sample; a sample is seq_length + 1 tokens
    seed: int = 1234  # order of samples depends on (seed, epoch) only
    order: Literal["megagrow", "megatron"] = "megagrow"  # of samples; megatron: as its GPTDataset and blends have them
    num_samples: int = 0  # that megatron's order is made for; 0: as many as the run takes
    split: str = ""  # "99,1,0": shares of train's sequences for training, validation, test; with order=megatron only
    change_blend: bool = False  # a resumed run may go on with other datasets or weights in data.train
    mask_documents: bool = False  # training's attention stays inside a document; that of scores does not
    reset_positions: bool = False  # positions begin anew at each document
    # Of encoders (model.objective=mlm), which see `seq_length` tokens of a sample and predict those that are chosen:
    mask_rate: float = 0.15  # share that is chosen; of these 80 % are masked, 10 % random, 10 % as they were
    mask_token: int = -1  # id; -1: the tokenizer's
    special_tokens: tuple[int, ...] = ()  # ids that are never chosen, beside those of the tokenizer

    def __post_init__(self) -> None:
        require_size(self, "data", "seq_length")
        require_not_negative(self, "data", "num_samples")
        require(0 < self.mask_rate <= 1, f"data.mask_rate={self.mask_rate} must be greater than 0 and at most 1")
        require(self.mask_token >= -1, f"data.mask_token={self.mask_token} must be an id, or -1 for the tokenizer's")
        require(
            all(token >= 0 for token in self.special_tokens),
            f"data.special_tokens={list(self.special_tokens)} must be ids, which are not negative",
        )


Schedule = Literal["1F1B", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"]
V_SCHEDULES = ("ZBVZeroBubble", "DualPipeV")  # two stages per rank: one on the way in, one on the way back
SPLIT_BACKWARD = ("InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")  # weight gradients come later than inputs'


@dataclass(frozen=True)
class ParallelConfig:
    """Sizes of the mesh axes, and how each is used; the data axis takes the ranks that the others leave.

    Ranks stand in the order (pipeline, data, context, tensor), tensor varying fastest. Parameters are cut over data x
    context (FSDP2), except that `replicate` groups of data ranks each hold a whole copy (HSDP).
    """

    tensor: int = 1
    pipeline: int = 1
    context: int = 1  # ranks that share each sequence, for long ones
    replicate: int = 1  # copies of the parameters; the number of data ranks: plain data parallelism
    sequence_parallel: bool = False  # cut activations between the blocks' halves along the sequence over `tensor`
    schedule: Schedule = "1F1B"
    stages_per_rank: int = 0  # pipeline stages of each rank; 0: as few as the schedule takes (1F1B 1, the others 2)
    layers_per_stage: tuple[int, ...] = ()  # by stage; empty: even, embedding and head weighing as a layer each

    def __post_init__(self) -> None:
        require_size(self, "parallel", "tensor", "context", "pipeline", "replicate")
        require_not_negative(self, "parallel", "stages_per_rank")
        require(
            all(0 <= count <= MAX_SIZE for count in self.layers_per_stage),
            f"parallel.layers_per_stage={list(self.layers_per_stage[:8])} must hold layers of each stage: 0 or more",
        )
        most = {"1F1B": 1, "ZBVZeroBubble": 2, "DualPipeV": 2}.get(self.schedule, self.stages_per_rank)
        least = 2 if self.schedule in V_SCHEDULES else 1
        require(
            self.pipeline == 1 or self.stages_per_rank == 0 or least <= self.stages_per_rank <= most,
            f"parallel.stages_per_rank={self.stages_per_rank} does not go with schedule={self.schedule}, which takes "
            f"{most or 'one or more'}; leave it at 0, or use Interleaved1F1B",
        )

    @property
    def local_stages(self) -> int:
        """Pipeline stages of each rank: as configured, or as few as the schedule takes."""
        if self.pipeline == 1:
            return 1
        return self.stages_per_rank or (1 if self.schedule == "1F1B" else 2)

    @property
    def num_stages(self) -> int:
        """Pipeline stages over all ranks."""
        return self.pipeline * self.local_stages

    @property
    def model_ranks(self) -> int:
        """Ranks that share one sequence: what is left of the world is divided among data ranks."""
        return self.tensor * self.context * self.pipeline

    def rank_of_stage(self, index: int) -> int:
        """The pipeline rank that runs a stage: s mod pipeline, or back over the ranks in the second half of a V."""
        turn, place = divmod(index, self.pipeline)
        return self.pipeline - 1 - place if self.schedule in V_SCHEDULES and turn % 2 == 1 else place

    @property
    def splits_backward(self) -> bool:
        """Whether the schedule computes gradients of inputs and of weights at different times."""
        return self.pipeline > 1 and self.schedule in SPLIT_BACKWARD


@dataclass(frozen=True)
class TrainConfig:
    """Length, batch and evaluation of the run."""

    steps: int = 1000
    global_batch_size: int = 16  # samples per optimizer step, over all ranks
    microbatch_size: int = 0  # samples per forward; 0: a rank's whole share (its share / stages in a pipeline)
    precision: Literal["fp32", "bf16"] = "fp32"  # of compute; parameters, gradients and optimizer are fp32
    recompute: Literal["none", "selective", "full"] = "none"  # selective keeps the results of matrix products
    compile: bool = False  # torch.compile, block by block
    attention: Literal["sdpa", "flash_attn"] = "sdpa"  # sdpa: torch's own, and FlexAttention for document masks
    kernels: Literal["measured", "all", "none"] = "measured"  # Triton's on a GPU; measured: MEASURED of serving.py
    dropout: float = 0.0  # on embeddings and both residual branches; the mask depends on (seed, step, token) only
    label_smoothing: float = 0.0  # share of each label's probability that is spread over the whole vocabulary
    z_loss: float = 0.0  # weight of the square of the logits' log-sum-exp beside the cross-entropy (PaLM: 1e-4)
    # Tokens whose logits exist at a time, of these at most 256 MiB; 0: as many as half of a GPU's L2 cache holds
    loss_chunk: int = 1024
    seed: int = 1234  # initial weights depend on (seed, parameter name) only
    eval_interval: int = 100  # steps; 0: only at the end
    eval_after_growth: int = 0  # also 1, 2, 4, 8 … steps after growing, up to so many
    eval_batches: int = 4  # fixed batches of global_batch_size held-out samples
    threads: int = 0  # CPU threads per rank; 0: as the environment says

    def __post_init__(self) -> None:
        require_size(self, "train", "steps", "global_batch_size")
        require_not_negative(self, "train", "microbatch_size", "loss_chunk", "eval_interval", "eval_batches", "threads")
        require_not_negative(self, "train", "z_loss", "eval_after_growth")
        require(0 <= self.label_smoothing < 1, f"train.label_smoothing={self.label_smoothing} must be in [0, 1)")
        require(
            self.dropout == 0 or 2**-16 <= self.dropout <= 1 - 2**-16,  # the steps in which it acts
            f"train.dropout={self.dropout} must be 0 or lie between 2^-16 and 1 - 2^-16",
        )


MIN_EPS = 1e-30  # of AdamW: stays above zero in float32, and where growth makes it smaller


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, its schedule, clipping, and what happens to bad steps."""

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # on matrices only
    clip_norm: float = 1.0  # over the whole mesh; 0: off
    schedule: Literal["wsd", "cosine", "constant"] = "wsd"
    warmup_steps: int = 50
    decay_fraction: float = 0.2  # share of the run that WSD's linear decay takes
    min_lr_ratio: float = 0.0  # of lr, at the end of the decay
    max_bad_steps: int = 8  # non-finite or skipped steps in a row before roll-back, then stop (exit 5)
    spike_sigma: float = 0.0  # skip a step whose loss exceeds mean + sigma·std of the window; 0: off
    spike_window: int = 128
    backend: Literal["torch", "apex"] = "torch"  # apex: NVIDIA Apex' FusedAdam
    offload: bool = False  # moments and master weights in host memory, updated by the host

    def __post_init__(self) -> None:
        require_not_negative(self, "optim", "lr", "eps", "weight_decay", "clip_norm", "warmup_steps", "spike_sigma")
        require_not_negative(self, "optim", "min_lr_ratio")
        require(
            self.eps >= MIN_EPS,
            f"optim.eps={self.eps} must be at least {MIN_EPS:g}: entries without a gradient would be divided by zero",
        )
        require_size(self, "optim", "max_bad_steps", "spike_window")
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"optim.{name}={getattr(self, name)} must be in [0, 1)")
        require(
            0 <= self.decay_fraction <= 1,
            f"optim.decay_fraction={self.decay_fraction} must lie between 0 and 1",
        )


Policy = Literal["exact", "asymmetric", "zero_pad", "reset"]
Breaker = Literal["none", "noise", "split"]


@dataclass(frozen=True)
class GrowthConfig:
    """When and how the run's small model becomes `model`."""

    # A width or a depth method, or both joined by "+", as in clone+insert_identity (docs/growth.md); none: no growth
    method: str = "none"
    # What tells replicas apart without changing the function: noise that cancels between two, or unequal shares
    breaker: Breaker = "none"
    breaker_scale: float = 0.3  # noise: std relative to the weights; split: largest difference of a share from 1/n
    source: ModelConfig | None = None  # the small model that this run trains first; None: it comes from init.from
    at_step: int = 0  # grow before this step; 0: at start-up
    # What becomes of the moments (growth/moments.py says what suits which method); empty: reset for ligo, else exact
    optimizer: Literal["", "exact", "asymmetric", "zero_pad", "reset"] = ""
    rewarmup_steps: int = 0  # linear warm-up of the learning rate after growing
    rewarmup_part: Literal["all", "new"] = "all"  # new: only entries that growth added, the others go on as scheduled
    rewarmup_factor: float = 1.3  # of the schedule, that the new part's rate reaches; then it returns to 1 (SPARKLING)
    # full_rank ended lowest of them wherever it was compared (docs/ligo.md); tied is the paper's
    ligo_variant: Literal["tied", "source_layer", "target_layer", "full_rank"] = "full_rank"
    # Where the maps start: a sparse method, or authors (the initial maps of LiGO's authors); empty: rms_random for
    # full_rank, which needs units without a source, else clone
    ligo_init: str = ""
    ligo_noise: float = 0.3  # breaks the symmetry of copies: std of new map rows, relative to 1/sqrt(source size)
    ligo_steps: int = 100  # steps that learn the maps
    # Of the maps' AdamW; falls linearly to zero over ligo_steps. Of 1e-3, 3e-4 and 1e-4 the last ended lowest with
    # full_rank; tied would rather have 3e-4, by 0.003 to 0.011 nats (docs/results.md: llama_both, llama_width)
    ligo_lr: float = 1e-4
    ligo_warmup_steps: int = 0  # linear warm-up of ligo_lr, before it falls
    ligo_weight_decay: float = 0.0  # of all maps
    ligo_beta1: float = 0.9
    ligo_beta2: float = 0.95
    # When, other than at a step; at_plateau needs at_step or at_tokens as well, which is then the latest:
    at_tokens: int = 0  # grow when the run has trained on so many tokens, those that learn maps included
    at_plateau: float = 0.0  # grow once the mean loss falls by less than this share from window to window; 0: off
    plateau_window: int = 100  # steps
    # Growths that come before the one to `model`, in their order; growth.earlier.0.at_step is a field of the first one
    earlier: tuple[EarlierGrowth, ...] = ()
    freeze_steps: int = 0  # steps after growing in which all but the new layers and the head stand still (MSLT)
    bootstrap: bool = False  # derive what is left open of source and at_step by G_stack's timing rule

    def __post_init__(self) -> None:
        breakers = get_args(Breaker)
        require(self.breaker in breakers, f"growth.breaker={self.breaker} must be one of {', '.join(breakers)}")
        require_not_negative(self, "growth", "at_step", "rewarmup_steps", "ligo_steps", "ligo_lr", "ligo_noise")
        require_not_negative(self, "growth", "rewarmup_factor", "breaker_scale")
        require_not_negative(self, "growth", "at_tokens", "freeze_steps")
        require(0 <= self.at_plateau < 1, f"growth.at_plateau={self.at_plateau} must be in [0, 1)")
        require_size(self, "growth", "plateau_window")
        require_not_negative(self, "growth", "ligo_warmup_steps", "ligo_weight_decay")
        for name in ("ligo_beta1", "ligo_beta2"):
            require(0 <= getattr(self, name) < 1, f"growth.{name}={getattr(self, name)} must be in [0, 1)")

    @property
    def learns_maps(self) -> bool:
        """Whether the operator of this growth is learned, for `ligo_steps` steps."""
        return self.method == "ligo"

    @property
    def maps_start(self) -> str:
        """Where learned maps start: `ligo_init`, or what suits the variant."""
        return self.ligo_init or ("rms_random" if self.ligo_variant == "full_rank" else "clone")


@dataclass(frozen=True)
class CheckpointConfig:
    """How often the run saves itself, and how much it keeps."""

    interval: int = 100  # steps; 0: only at the end
    keep_last: int = 2  # 0: all
    keep_every: int = 0  # steps whose multiples are kept besides, for ever; 0: none
    asynchronous: bool = True  # training goes on while a copy in host memory is written
    dir: str = ""  # where they go, a folder or a URL for fsspec (s3://…); empty: run.dir/checkpoints

    def __post_init__(self) -> None:
        require_not_negative(self, "checkpoint", "interval", "keep_last", "keep_every")


@dataclass(frozen=True)
class InitConfig:
    """Where the first weights come from."""

    # Own checkpoint, run directory or Hugging Face folder; empty: random weights.
    from_: Annotated[str, tyro.conf.arg(name="from")] = ""
    source_flops: float = -1.0  # FLOPs spent on a source from outside; -1: unknown, all-in savings stay null
    skip_source_check: bool = False  # go on although the source does not fit the data

    def __post_init__(self) -> None:
        require(
            self.source_flops >= 0 or self.source_flops == -1,
            f"init.source_flops={self.source_flops} must not be negative; -1 stands for unknown",
        )


@dataclass(frozen=True)
class RunConfig:
    """Where results go and what is shown."""

    dir: str = "runs/default"
    log_interval: int = 1  # steps between lines of metrics.jsonl
    tensorboard: bool = False
    wandb: str = ""  # project name; empty: off
    debug: bool = False  # show tracebacks
    timeout: float = 600.0  # seconds without progress after which the run ends (exit 6)
    profile_at: int = -1  # write a trace of the 3 steps from this one on to DIR/profile; -1: off
    memory_snapshot_at: int = -1  # write what fills the GPU's memory at the end of this step; -1: off

    def __post_init__(self) -> None:
        require(
            "://" not in self.dir,
            f"run.dir={self.dir} must be a local folder, metrics are appended to files in it; "
            "a URL may be given as checkpoint.dir",
        )
        require_size(self, "run", "log_interval", "timeout")
        for name in ("profile_at", "memory_snapshot_at"):
            require(getattr(self, name) >= -1, f"run.{name}={getattr(self, name)} must be a step, or -1 for never")


@dataclass(frozen=True)
class Config:
    """Everything that determines a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    growth: GrowthConfig = field(default_factory=GrowthConfig)
    salt: SaltConfig = field(default_factory=SaltConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    init: InitConfig = field(default_factory=InitConfig)
    run: RunConfig = field(default_factory=RunConfig)


def data_ranks(config: Config, world_size: int) -> int:
    """Ranks that read different samples."""
    return world_size // config.parallel.model_ranks


def min_microbatches(parallel: ParallelConfig) -> int:
    """The fewest microbatches that the pipeline schedule can work with."""
    return parallel.num_stages if parallel.schedule == "DualPipeV" else parallel.pipeline


def microbatch_size(config: Config, world_size: int) -> int:
    """Samples per forward pass: as configured, or as few microbatches as the pipeline needs."""
    if config.train.microbatch_size:
        return config.train.microbatch_size
    share = config.train.global_batch_size // data_ranks(config, world_size)
    largest = max(share // min_microbatches(config.parallel), 1)
    return next(size for size in range(largest, 0, -1) if share % size == 0 or size == 1)
