"""The configuration of a run: one tree of frozen dataclasses, and checks that say value, rule and remedy.

A preset (presets.py) or a YAML or JSON file (config_file.py) gives a complete `Config`; `--section.field VALUE` changes
single fields. `check(config, world_size)` tests every combination before anything is built.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro

from megagrow.errors import ConfigError


@dataclass(frozen=True)
class ModelConfig:
    """One decoder-only transformer; the fields that differ between families are switches, not subclasses."""

    family: Literal["llama", "gpt2"] = "llama"  # Hugging Face model type that it is exported as
    vocab_size: int = 32_000
    hidden_size: int = 512
    num_layers: int = 8
    num_heads: int = 8  # query heads
    num_kv_heads: int = 0  # 0: as many as query heads
    head_dim: int = 0  # 0: hidden_size / num_heads
    ffn_size: int = 1376
    max_seq_length: int = 1024  # rows of the learned position table; context stated in the export
    norm: Literal["rms_norm", "layer_norm"] = "rms_norm"
    norm_eps: float = 1e-5
    positions: Literal["rope", "learned"] = "rope"
    rope_theta: float = 10_000.0
    activation: Literal["swiglu", "gelu"] = "swiglu"  # gelu: the tanh approximation, as in GPT-2
    bias: bool = False  # biases on every linear layer of the blocks
    tied_embeddings: bool = False

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "ffn_size", "max_seq_length"):
            require(getattr(self, name) > 0, f"model.{name}={getattr(self, name)} must be positive")
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
            self.positions != "rope" or self.head_dim % 2 == 0,
            f"model.head_dim={self.head_dim} is odd; rotary positions turn pairs of dimensions: make it even",
        )

    @property
    def queries_per_kv(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True)
class DataConfig:
    """Token files (Megatron .bin/.idx, named by their common prefix) and how samples are cut from them."""

    train: str = ""  # prefix of the training tokens
    validation: str = ""  # prefix of the held-out tokens; empty: no evaluation
    tokenizer: str = ""  # sentencepiece .model, tokenizer.json or its folder; copied into exports
    seq_length: int = 128  # inputs per sample; a sample is seq_length + 1 tokens
    seed: int = 1234  # order of samples depends on (seed, epoch) only

    def __post_init__(self) -> None:
        require(self.seq_length > 0, f"data.seq_length={self.seq_length} must be positive")


@dataclass(frozen=True)
class ParallelConfig:
    """Sizes of the mesh axes; the data axis takes the ranks that tensor and pipeline leave."""

    tensor: int = 1
    pipeline: int = 1
    schedule: Literal["1F1B"] = "1F1B"

    def __post_init__(self) -> None:
        for name in ("tensor", "pipeline"):
            require(getattr(self, name) > 0, f"parallel.{name}={getattr(self, name)} must be positive")


@dataclass(frozen=True)
class TrainConfig:
    """Length, batch and evaluation of the run."""

    steps: int = 1000
    global_batch_size: int = 16  # samples per optimizer step, over all ranks
    microbatch_size: int = 0  # samples per forward; 0: a rank's whole share (its share / stages in a pipeline)
    precision: Literal["fp32", "bf16"] = "fp32"  # of compute; parameters, gradients and optimizer are fp32
    seed: int = 1234  # initial weights depend on (seed, parameter name) only
    eval_interval: int = 100  # steps; 0: only at the end
    eval_batches: int = 4  # fixed batches of global_batch_size held-out samples
    threads: int = 0  # CPU threads per rank; 0: as the environment says

    def __post_init__(self) -> None:
        for name in ("steps", "global_batch_size"):
            require(getattr(self, name) > 0, f"train.{name}={getattr(self, name)} must be positive")
        require_not_negative(self, "train", "microbatch_size", "eval_interval", "eval_batches", "threads")


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

    def __post_init__(self) -> None:
        require_not_negative(self, "optim", "lr", "eps", "weight_decay", "clip_norm", "warmup_steps", "spike_sigma")
        require(self.max_bad_steps > 0, f"optim.max_bad_steps={self.max_bad_steps} must be positive")
        require(
            0 <= self.decay_fraction <= 1,
            f"optim.decay_fraction={self.decay_fraction} must lie between 0 and 1",
        )


@dataclass(frozen=True)
class GrowthConfig:
    """When and how the run's small model becomes `model`."""

    method: Literal["none", "stack", "clone", "ligo"] = "none"
    source: ModelConfig | None = None  # the small model that this run trains first; None: it comes from init.from
    at_step: int = 0  # grow before this step; 0: at start-up
    optimizer: Literal["exact", "reset"] = "exact"  # what becomes of the moments; learned maps need reset
    rewarmup_steps: int = 0  # linear warm-up of the learning rate after growing
    ligo_steps: int = 100  # steps that learn LiGO's maps
    ligo_lr: float = 3e-3
    ligo_noise: float = 0.3  # breaks the symmetry of copies: std of new map rows, relative to 1/sqrt(source size)

    def __post_init__(self) -> None:
        require_not_negative(self, "growth", "at_step", "rewarmup_steps", "ligo_steps", "ligo_lr", "ligo_noise")


@dataclass(frozen=True)
class SaltConfig:
    """Stage 1 distils from a small teacher, optionally on data that it picked; stage 2 is plain."""

    teacher: str = ""  # own checkpoint or Hugging Face folder; empty: no SALT
    steps: int = 0  # steps of stage 1, counted from the start of the (grown) model's training
    weight: float = 0.5  # omega: loss = (1 - omega)·CE + omega·KD
    temperature: float = 1.0  # rho
    temperature_on: Literal["teacher", "both"] = "teacher"
    scale_by_temperature_squared: bool = False  # Hinton's factor; off keeps the stated weight
    scores: str = ""  # folder of score_corpus.py; stage 1 then uses the best keep_fraction
    keep_fraction: float = 0.5
    score: Literal["median_in_top_k", "median_zero", "mean_nll"] = "median_zero"

    def __post_init__(self) -> None:
        require_not_negative(self, "salt", "steps")
        require(0 <= self.weight <= 1, f"salt.weight={self.weight} must lie between 0 and 1")
        require(self.temperature > 0, f"salt.temperature={self.temperature} must be positive")
        require(0 < self.keep_fraction <= 1, f"salt.keep_fraction={self.keep_fraction} must be in (0, 1]")


@dataclass(frozen=True)
class CheckpointConfig:
    """How often the run saves itself, and how much it keeps."""

    interval: int = 100  # steps; 0: only at the end
    keep_last: int = 2  # 0: all

    def __post_init__(self) -> None:
        require_not_negative(self, "checkpoint", "interval", "keep_last")


@dataclass(frozen=True)
class InitConfig:
    """Where the first weights come from."""

    # Own checkpoint, run directory or Hugging Face folder; empty: random weights.
    from_: Annotated[str, tyro.conf.arg(name="from")] = ""
    source_flops: float = -1.0  # FLOPs spent on a source from outside; -1: unknown, all-in savings stay null
    skip_source_check: bool = False  # go on although the source does not fit the data


@dataclass(frozen=True)
class RunConfig:
    """Where results go and what is shown."""

    dir: str = "runs/default"
    log_interval: int = 1  # steps between lines of metrics.jsonl
    tensorboard: bool = False
    wandb: str = ""  # project name; empty: off
    debug: bool = False  # show tracebacks
    timeout: float = 600.0  # seconds that a collective may take

    def __post_init__(self) -> None:
        for name in ("log_interval", "timeout"):
            require(getattr(self, name) > 0, f"run.{name}={getattr(self, name)} must be positive")


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


def require(holds: bool, message: str) -> None:
    """Raises ConfigError with the one-line message unless the rule holds."""
    if not holds:
        raise ConfigError(message)


def require_not_negative(section: Any, title: str, *names: str) -> None:
    """Raises ConfigError when one of these fields of a section is negative (or not a number)."""
    for name in names:
        require(getattr(section, name) >= 0, f"{title}.{name}={getattr(section, name)} must not be negative")


def divisors(n: int, limit: int | None = None) -> str:
    """The divisors of n up to `limit` as English: "1, 2, 4 or 8"."""
    found = [str(d) for d in range(1, min(n, limit or n) + 1) if n % d == 0]
    return found[0] if len(found) == 1 else ", ".join(found[:-1]) + " or " + found[-1]


def check(config: Config, world_size: int) -> None:
    """Raises ConfigError (value, rule, remedy) when parts of the configuration do not fit together."""
    parallel, train = config.parallel, config.train
    block = parallel.tensor * parallel.pipeline
    require(
        world_size % block == 0,
        f"parallel.tensor={parallel.tensor} x pipeline={parallel.pipeline} = {block} does not divide the "
        f"{world_size} launched ranks; start a multiple of {block} ranks or change the mesh",
    )
    for name, model in models(config):
        check_model(model, parallel, name)
        require(
            model.positions != "learned" or config.data.seq_length <= model.max_seq_length,
            f"data.seq_length={config.data.seq_length} exceeds max_seq_length={model.max_seq_length} of {name}, "
            "the rows of its position table; use shorter sequences or a longer table",
        )
    data_parallel = world_size // block
    batch = train.global_batch_size
    require(
        batch % data_parallel == 0,
        f"train.global_batch_size={batch} is not a multiple of the {data_parallel} data-parallel ranks; "
        f"use {max(batch // data_parallel, 1) * data_parallel} or {-(-batch // data_parallel) * data_parallel}",
    )
    share = batch // data_parallel
    microbatch = microbatch_size(config, world_size)
    require(
        share % microbatch == 0,
        f"train.microbatch_size={microbatch} does not divide a rank's share of {share} samples; use {divisors(share)}",
    )
    require(
        share // microbatch >= parallel.pipeline,
        f"{share // microbatch} microbatches are fewer than the {parallel.pipeline} pipeline stages; use "
        f"train.microbatch_size<={max(share // parallel.pipeline, 1)} or a larger train.global_batch_size",
    )
    check_growth(config)
    check_salt(config)


def models(config: Config) -> list[tuple[str, ModelConfig]]:
    """The models that this run builds, with the section that each comes from."""
    source = config.growth.source
    return ([("growth.source", source)] if source else []) + [("model", config.model)]


def check_model(model: ModelConfig, parallel: ParallelConfig, name: str) -> None:
    """Raises ConfigError when `model` cannot be laid out on the mesh or the features exclude each other."""
    for axis in ("num_heads", "num_kv_heads", "ffn_size"):
        size = getattr(model, axis)
        require(
            size % parallel.tensor == 0,
            f"tensor={parallel.tensor} does not divide {axis}={size} of {name}; use {divisors(size, 64)}",
        )
    require(
        parallel.pipeline <= model.num_layers,
        f"pipeline={parallel.pipeline} exceeds num_layers={model.num_layers} of {name}; "
        f"use at most {model.num_layers} stages",
    )


def check_growth(config: Config) -> None:
    """Raises ConfigError when the growth section contradicts itself or the rest."""
    growth = config.growth
    if growth.method == "none":
        require(
            growth.source is None,
            "growth.source is set but growth.method=none; choose a method: stack, clone or ligo",
        )
        return
    require(
        growth.source is not None or bool(config.init.from_),
        f"growth.method={growth.method} has nothing to grow; set --init.from CHECKPOINT or growth.source",
    )
    require(
        growth.source is None or not config.init.from_,
        "growth.source and init.from both name the small model; leave one of them out",
    )
    require(
        growth.source is None or growth.at_step > 0,
        "growth.at_step=0 would grow growth.source before it has learned anything; set growth.at_step",
    )
    require(
        growth.at_step < config.train.steps,
        f"growth.at_step={growth.at_step} is not before train.steps={config.train.steps}; grow earlier or train longer",
    )
    require(
        growth.method != "ligo" or growth.optimizer == "reset",
        "growth.optimizer=exact has no rule for learned maps (ligo); "
        "use growth.optimizer=reset with growth.rewarmup_steps",
    )
    if growth.source is not None:
        check_growable(growth.source, config.model)


def check_growable(source: ModelConfig, target: ModelConfig) -> None:
    """Raises ConfigError unless `target` is the same kind of model as `source`, and no smaller on any axis."""
    for name in ("family", "norm", "positions", "activation", "bias", "tied_embeddings"):
        old, new = getattr(source, name), getattr(target, name)
        require(
            old == new,
            f"the source has {name}={old}, the target {name}={new}: growth keeps the kind of model; make them equal",
        )
    for name in ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "ffn_size"):
        old, new = getattr(source, name), getattr(target, name)
        require(
            new >= old,
            f"the target's {name}={new} is smaller than the source's {old}: growth only adds; use at least {old}",
        )
    for name in ("vocab_size", "head_dim", "max_seq_length", "rope_theta", "norm_eps"):
        old, new = getattr(source, name), getattr(target, name)
        require(
            old == new,
            f"the source has {name}={old}, the target {name}={new}: this field must stay as it is; make them equal",
        )


def check_salt(config: Config) -> None:
    """Raises ConfigError when the SALT section contradicts itself."""
    salt = config.salt
    require(
        not salt.teacher or salt.steps > 0,
        "salt.teacher is set but salt.steps=0, so that it would never teach; set salt.steps",
    )
    require(
        not salt.scores or salt.steps > 0,
        "salt.scores is set but salt.steps=0, so that nothing would be trained on the selection; set salt.steps",
    )
    require(
        bool(salt.teacher) or salt.steps == 0 or bool(salt.scores),
        f"salt.steps={salt.steps} without salt.teacher or salt.scores does nothing; set one of them",
    )


def microbatch_size(config: Config, world_size: int) -> int:
    """Samples per forward pass: as configured, or as few microbatches as the pipeline needs."""
    if config.train.microbatch_size:
        return config.train.microbatch_size
    parallel = config.parallel
    share = config.train.global_batch_size * parallel.tensor * parallel.pipeline // world_size
    return max(share // parallel.pipeline, 1)
