"""What of a configuration has to fit together, tested before anything is built.

Each rule raises ConfigError with the value, the rule and the remedy. `check` stops at the first that does not hold;
`problems` lists all of them, for planning.
"""

import torch

from megagrow.config import (
    Config,
    ModelConfig,
    ParallelConfig,
    data_ranks,
    divisors,
    microbatch_size,
    min_microbatches,
    require,
)
from megagrow.errors import ConfigError
from megagrow.salt_checks import SALT_RULES
from megagrow.timeline import (
    growth_configs,
    growth_name,
    growth_settings,
    latest_step,
    models,
    num_growths,
    settling_steps,
    step_tokens,
)

SPLITS_BACKWARD_SINCE = (2, 13)  # of torch; 2.11 asks nodes of autograd.Function for what only its own nodes have

# Fields of a model that growth keeps: what kind of model it is, and sizes that nothing can stretch.
KIND_FIELDS = (
    "family",
    "objective",
    "norm",
    "norm_place",
    "parallel_residual",
    "positions",
    "activation",
    "attention_bias",
    "mlp_bias",
    "qk_norm",
    "tied_embeddings",
)
FIXED_FIELDS = (
    "max_seq_length",
    "position_offset",
    "rope_theta",
    "rope_fraction",
    "rope_scaling",
    "num_token_types",
)


def check(config: Config, world_size: int) -> None:
    """Raises ConfigError (value, rule, remedy) when parts of the configuration do not fit together."""
    for rule in RULES:
        rule(config, world_size)


def problems(config: Config, world_size: int) -> list[str]:
    """The messages of all rules that do not hold; one rule's trouble can make that of another."""
    found = []
    for rule in RULES:
        try:
            rule(config, world_size)
        except ConfigError as error:
            found.append(str(error))
    return found


def check_mesh(config: Config, world_size: int) -> None:
    """Raises ConfigError when the axes do not divide the ranks."""
    parallel = config.parallel
    block = parallel.model_ranks
    context = f" x context={parallel.context}" if parallel.context > 1 else ""
    require(
        world_size % block == 0,
        f"parallel.tensor={parallel.tensor} x pipeline={parallel.pipeline}{context} = {block} does not divide the "
        f"{world_size} launched ranks; start a multiple of {block} ranks or change the mesh",
    )
    num_data = world_size // block
    require(
        num_data % parallel.replicate == 0,
        f"parallel.replicate={parallel.replicate} does not divide the {num_data} data-parallel ranks; "
        f"use {divisors(num_data, 64)}",
    )


def check_models(config: Config, world_size: int) -> None:
    """Raises ConfigError when a model of the run does not fit the mesh or the sequences."""
    for name, model in models(config):
        _check_fits(model, config, name)


def check_models_from(source: ModelConfig, config: Config, name: str, first: int = 0) -> None:
    """The same of a model that only its files know, and of those that growth number `first` and later ones make of it.

    Raises:
        ConfigError: one of them does not fit; `name` says which the first is.
    """
    _check_fits(source, config, name)
    for number, growing in enumerate(growth_configs(config, source, first), first):
        _check_fits(growing.model, config, growth_name(config.growth, number))


def _check_fits(model: ModelConfig, config: Config, name: str) -> None:
    check_model(model, config.parallel, name)
    require(
        model.positions != "learned" or config.data.seq_length <= model.max_seq_length,
        f"data.seq_length={config.data.seq_length} exceeds max_seq_length={model.max_seq_length} of {name}, "
        "the rows of its position table; use shorter sequences or a longer table",
    )


def check_model(model: ModelConfig, parallel: ParallelConfig, name: str) -> None:
    """Raises ConfigError when `model` cannot be laid out on the mesh."""
    tensor, kv_heads = parallel.tensor, model.num_kv_heads
    for axis in ("num_heads", "ffn_size"):
        size = getattr(model, axis)
        require(
            size % tensor == 0,
            f"tensor={tensor} does not divide {axis}={size} of {name}; use {divisors(size, 64)}",
        )
    require(
        kv_heads % tensor == 0 or tensor % kv_heads == 0,
        f"tensor={tensor} neither divides num_kv_heads={kv_heads} of {name} nor is a multiple of it, so that ranks "
        f"would share key/value heads unevenly; use {divisors(kv_heads, 64)}, or a multiple of {kv_heads}",
    )
    stages = parallel.num_stages
    require(
        stages <= model.num_layers + 2,
        f"parallel.pipeline={parallel.pipeline} x {parallel.local_stages} stages per rank = {stages} stages exceed "
        f"num_layers={model.num_layers} of {name} with embedding and head; use at most {model.num_layers + 2} stages",
    )


def check_causal(model: ModelConfig, name: str, purpose: str) -> None:
    """Raises ConfigError when a model that has to predict next tokens is an encoder."""
    require(
        model.is_causal,
        f"{name} is an encoder (objective=mlm), which predicts no next tokens: it cannot be used {purpose}; "
        "use a decoder (objective=clm)",
    )


def check_stages(config: Config, world_size: int) -> None:
    """Raises ConfigError when an explicit split into stages does not match the model or the schedule."""
    split, parallel = config.parallel.layers_per_stage, config.parallel
    if not split:
        return
    require(
        len(split) == parallel.num_stages and min(split) >= 0,
        f"parallel.layers_per_stage={list(split)} names {len(split)} stages, the pipeline has {parallel.num_stages}; "
        f"give {parallel.num_stages} numbers",
    )
    require(
        sum(split) == config.model.num_layers,
        f"parallel.layers_per_stage={list(split)} has {sum(split)} layers, the model {config.model.num_layers}; "
        "make the sum equal",
    )
    holders = {parallel.rank_of_stage(i) for i, layers in enumerate(split) if layers or i in (0, len(split) - 1)}
    for rank in range(parallel.pipeline):
        require(
            rank in holders,
            f"parallel.layers_per_stage={list(split)} leaves pipeline rank {rank} without any layer, embedding or "
            "head; give one of its stages at least one layer",
        )


def check_schedule(config: Config, world_size: int) -> None:
    """Raises ConfigError for combinations that zero-bubble schedules cannot run exactly, or only by hanging."""
    parallel, train = config.parallel, config.train
    if not parallel.splits_backward:
        return
    require(
        tuple(map(int, torch.__version__.split(".")[:2])) >= SPLITS_BACKWARD_SINCE,
        f"parallel.schedule={parallel.schedule} needs torch 2.13; {torch.__version__}, which is here, cannot make "
        "weights' gradients apart from those of inputs; use Interleaved1F1B or 1F1B",
    )
    require(
        train.recompute == "none",
        f"train.recompute={train.recompute} with parallel.schedule={parallel.schedule} would run each block again for "
        "every weight matrix; use Interleaved1F1B or 1F1B, or train.recompute=none",
    )
    require(
        not train.compile,
        f"train.compile with parallel.schedule={parallel.schedule} fails on one rank and hangs the others; "
        "use Interleaved1F1B or 1F1B, or leave train.compile out",
    )


def check_compile(config: Config, world_size: int) -> None:
    """Raises ConfigError where torch cannot compile blocks."""
    train = config.train
    require(
        not (train.compile and train.recompute == "selective" and config.parallel.tensor > 1),
        "train.compile with train.recompute=selective fails in torch 2.13 where parallel.tensor cuts the weights; "
        "use train.recompute=full or none, or leave train.compile out",
    )


def check_sequence(config: Config, world_size: int) -> None:
    """Raises ConfigError when the sequence cannot be cut as the context and tensor axes ask."""
    parallel, length = config.parallel, config.data.seq_length
    pieces = 2 * parallel.context if parallel.context > 1 else 1
    require(
        length % pieces == 0,
        f"data.seq_length={length} is not a multiple of {pieces}: parallel.context={parallel.context} cuts every "
        f"sequence into {pieces} pieces; use {length // pieces * pieces or pieces} or {-(-length // pieces) * pieces}",
    )
    local = length // parallel.context
    require(
        not parallel.sequence_parallel or local % parallel.tensor == 0,
        f"parallel.sequence_parallel cuts the {local} tokens of a rank over parallel.tensor={parallel.tensor}, which "
        f"does not divide them; use a data.seq_length that is a multiple of {parallel.tensor * parallel.context}",
    )


def check_batch(config: Config, world_size: int) -> None:
    """Raises ConfigError when the batch does not divide into microbatches for every data rank."""
    parallel, batch = config.parallel, config.train.global_batch_size
    num_data = max(data_ranks(config, world_size), 1)
    require(
        batch % num_data == 0,
        f"train.global_batch_size={batch} is not a multiple of the {num_data} data-parallel ranks; "
        f"use {max(batch // num_data, 1) * num_data} or {-(-batch // num_data) * num_data}",
    )
    share = batch // num_data
    microbatch = microbatch_size(config, max(world_size, parallel.model_ranks))
    require(
        share % microbatch == 0,
        f"train.microbatch_size={microbatch} does not divide a rank's share of {share} samples; use {divisors(share)}",
    )
    count, least = share // microbatch, min_microbatches(parallel)
    require(
        count >= least,
        f"{count} microbatches are fewer than the {least} pipeline stages; use "
        f"train.microbatch_size<={max(share // least, 1)} or a larger train.global_batch_size",
    )
    rounds = max(count // parallel.pipeline, 1)
    require(
        not parallel.schedule.startswith("Interleaved") or parallel.pipeline == 1 or count % rounds == 0,
        f"{count} microbatches do not make equal rounds over {parallel.pipeline} pipeline ranks, as "
        f"parallel.schedule={parallel.schedule} needs; use a multiple of {parallel.pipeline}",
    )


def check_memory_options(config: Config, world_size: int) -> None:
    """Raises ConfigError when options of compute and memory exclude each other."""
    require(
        not (config.optim.offload and config.optim.backend == "apex"),
        "optim.offload updates on the host, where optim.backend=apex cannot; use optim.backend=torch",
    )
    require(
        not (config.data.mask_documents and config.train.attention == "flash_attn"),
        "data.mask_documents needs masks that train.attention=flash_attn does not take here; use sdpa, which "
        "brings FlexAttention",
    )


def check_data(config: Config, world_size: int) -> None:
    """Raises ConfigError when options of the data exclude each other."""
    data = config.data
    is_megatron = data.order == "megatron"
    require(
        is_megatron or (not data.split and data.num_samples == 0),
        "data.split and data.num_samples belong to data.order=megatron; for order=megagrow preprocess the held-out "
        "text apart and name it in data.validation",
    )
    require(
        not (data.split and data.validation),
        "data.split takes the held-out samples from data.train, data.validation names others; leave one of them out",
    )
    require(
        not (is_megatron and data.change_blend),
        "data.change_blend needs data.order=megagrow: Megatron's order is made for the whole run at once",
    )


def check_growth(config: Config, world_size: int) -> None:
    """Raises ConfigError when the growth section contradicts itself or the rest."""
    growth = config.growth
    if growth.method == "none":
        for name in ("source", "earlier", "bootstrap"):
            require(
                not getattr(growth, name),
                f"growth.{name} is set but growth.method=none; choose a method: stack, clone, … (docs/growth.md)",
            )
        return
    require(
        growth.source is not None or bool(config.init.from_),
        f"growth.method={growth.method} has nothing to grow; set --init.from CHECKPOINT, growth.source or "
        "growth.bootstrap",
    )
    require(
        growth.source is None or not config.init.from_,
        "growth.source and init.from both name the small model; leave one of them out",
    )
    require(
        growth.source is None or latest_step(config, 0) > 0,
        "growth.at_step=0 would grow growth.source before it has learned anything; set growth.at_step",
    )
    require(
        growth.rewarmup_part == "all" or growth.rewarmup_steps > 0,
        "growth.rewarmup_part=new without growth.rewarmup_steps warms nothing up; set growth.rewarmup_steps",
    )
    for number in range(num_growths(growth)):
        own = growth_settings(growth, number)
        require(
            not own.learns_maps or own.optimizer == "reset",
            f"growth.optimizer={own.optimizer} has no rule for learned maps (ligo); "
            "use growth.optimizer=reset with growth.rewarmup_steps",
        )
        require(
            not own.learns_maps or own.rewarmup_part == "all",
            "growth.rewarmup_part=new needs a part that is old: learned maps (ligo) make every entry anew; "
            "use growth.rewarmup_part=all",
        )
    if growth.source is not None:
        check_chain(config, growth.source)


def check_growth_times(config: Config, world_size: int) -> None:
    """Raises ConfigError when a growth would never come, or not in its turn."""
    growth, steps = config.growth, config.train.steps
    last = steps * step_tokens(config)
    for number in range(num_growths(growth)):
        own, where, latest = growth_settings(growth, number), growth_name(growth, number), latest_step(config, number)
        require(
            own.at_step == 0 or own.at_tokens == 0,
            f"{where}.at_step={own.at_step} and at_tokens={own.at_tokens} both say when; leave one of them out",
        )
        require(
            own.at_plateau == 0 or latest > 0,
            f"{where}.at_plateau={own.at_plateau} needs a latest step, for a loss that never flattens; set {where}."
            "at_step or at_tokens",
        )
        require(
            own.at_tokens == 0 or latest < steps,
            f"{where}.at_tokens={own.at_tokens} is not reached before the end: train.steps={steps} steps of "
            f"{step_tokens(config)} tokens are {last}; grow earlier or train longer",
        )
        require(
            latest < steps,
            f"{where}.at_step={own.at_step} is not before train.steps={steps}; grow earlier or train longer",
        )
        before = latest_step(config, number - 1) if number else -1
        require(
            latest > before,
            f"{where} comes before step {latest}, the growth before it at step {before} at the latest: one comes after "
            "the other; give later growths later steps, or grow both axes by one method",
        )
        settled = before + _settling_steps(config, number - 1) if number and own.optimizer != "reset" else 0
        require(
            latest >= settled,
            f"{where} comes before step {latest}, while entries that the growth before step {before} adds have updates "
            f"of their own, which the next growth would lose (optim.beta2={config.optim.beta2} keeps them long); grow "
            f"before step {settled} at the earliest, or use optimizer=exact in the first one or reset in the second",
        )


def _settling_steps(config: Config, number: int) -> int:
    """Steps in which the entries that a growth adds have updates of their own."""
    own, optim = growth_settings(config.growth, number), config.optim
    counts = settling_steps(optim.beta1, optim.beta2) if own.optimizer in ("asymmetric", "zero_pad") else 0
    return max(counts, own.rewarmup_steps if own.rewarmup_part == "new" else 0)


def check_freezing(config: Config, world_size: int) -> None:
    """Raises ConfigError where layers cannot stand still, or would for ever."""
    growth, steps = config.growth, config.train.steps
    for number in range(num_growths(growth)):
        where, own = growth_name(config.growth, number), growth_settings(growth, number)
        frozen = own.freeze_steps
        require(
            frozen == 0 or not config.parallel.splits_backward,
            f"{where}.freeze_steps={frozen} with parallel.schedule={config.parallel.schedule}: the half of its "
            "backward pass that makes weights' gradients needs one of each; use 1F1B or Interleaved1F1B",
        )
        begins_anew = frozen > 0 and own.optimizer == "reset" and own.rewarmup_part == "new"
        require(
            not begins_anew or own.rewarmup_steps <= frozen,
            f"{where}.rewarmup_steps={own.rewarmup_steps} of the new part go beyond freeze_steps={frozen}, after which "
            "optimizer=reset begins anew for all: warm up for fewer steps, or use rewarmup_part=all",
        )
        is_last = number == num_growths(growth) - 1
        require(
            frozen == 0 or is_last or latest_step(config, number) + frozen < latest_step(config, number + 1),
            f"{where}.freeze_steps={frozen} keeps the older layers frozen up to the next growth; they have to learn "
            "again before it: freeze for fewer steps, or grow later",
        )
        require(
            not is_last or latest_step(config, number) + frozen < steps,
            f"{where}.freeze_steps={frozen} would keep the older layers frozen to the end of train.steps={steps}; the "
            "last stage trains all layers: freeze for fewer steps, or train longer",
        )


def check_chain(config: Config, source: ModelConfig) -> None:
    """Raises ConfigError unless each growth of the run adds to the model that the one before left."""
    small = source
    for number, growing in enumerate(growth_configs(config, source)):
        where = growth_name(config.growth, number)
        try:
            check_growable(small, growing.model)
        except ConfigError as error:
            raise ConfigError(str(error) if not config.growth.earlier else f"{where}: {error}") from None
        require(
            not config.growth.earlier or growing.model != small,
            f"{where}: the model does not grow, it has {small.num_layers} layers of {small.hidden_size} before and "
            "after; give it more layers, or a larger size",
        )
        small = growing.model


def check_growable(source: ModelConfig, target: ModelConfig) -> None:
    """Raises ConfigError unless `target` is the same kind of model as `source`, and no smaller on any axis.

    What norm_eps may be depends on the method, which tests it.
    """
    for name in KIND_FIELDS:
        old, new = getattr(source, name), getattr(target, name)
        require(
            old == new,
            f"the source has {name}={old}, the target {name}={new}: growth keeps the kind of model; make them equal",
        )
    reason = (
        "rotary frequencies are those of one head size" if target.positions == "rope" else "attention is scaled by it"
    )
    require(
        source.head_dim == target.head_dim,
        f"the source has head_dim={source.head_dim}, the target head_dim={target.head_dim}: a head keeps its size, "
        f"since {reason}; make them equal, and grow num_heads and num_kv_heads instead",
    )
    for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "ffn_size"):
        old, new = getattr(source, name), getattr(target, name)
        require(
            new >= old,
            f"the target's {name}={new} is smaller than the source's {old}: growth only adds; use at least {old}",
        )
    for name in FIXED_FIELDS:
        old, new = getattr(source, name), getattr(target, name)
        require(
            old == new,
            f"the source has {name}={old}, the target {name}={new}: this field must stay as it is; make them equal",
        )


def check_objective(config: Config, world_size: int) -> None:
    """Raises ConfigError when an encoder is to be taught next tokens."""
    if config.salt.has_stage_one or config.salt.map_weight > 0:
        check_causal(config.model, "model", "with SALT (salt.steps, salt.share, salt.map_weight)")


RULES = (
    check_mesh,
    check_models,
    check_stages,
    check_schedule,
    check_compile,
    check_sequence,
    check_batch,
    check_memory_options,
    check_data,
    check_growth,
    check_growth_times,
    check_freezing,
    check_objective,
    *SALT_RULES,
)
