"""What of the section `salt` has to fit together, and with the rest of a configuration; `checks` runs these rules."""

from megagrow.config import Config, SaltConfig, require
from megagrow.timeline import latest_step, num_growths


def check_stage_one(config: Config, world_size: int) -> None:
    """Raises ConfigError when stage 1 has nothing to do, or something would never come to be used."""
    salt, train = config.salt, config.train
    learns_maps = num_growths(config.growth) > 0 and config.growth.learns_maps
    require(
        salt.map_weight == 0 or (bool(salt.teacher) and learns_maps),
        f"salt.map_weight={salt.map_weight} is that of a teacher while the maps of the last growth are learned; it "
        "needs salt.teacher and growth.method=ligo",
    )
    without = "but stage 1 has no steps (salt.steps=0, salt.share=0), so that"
    for name in ("teacher", "cache"):
        require(
            not getattr(salt, name) or salt.has_stage_one or salt.map_weight > 0,
            f"salt.{name} is set, {without} it would never teach; set salt.steps or salt.share",
        )
    require(
        not (salt.teacher and salt.cache),
        f"salt.teacher={salt.teacher} and salt.cache={salt.cache} both teach; leave one of them out",
    )
    require(
        not salt.grown_teaches or config.growth.method != "none",
        "salt.teacher=grown is the small model that this run grows, and growth.method=none; choose a method, or name a "
        "folder (./grown, if it is called so)",
    )
    require(
        not salt.scores or salt.has_stage_one,
        f"salt.scores is set, {without} nothing would be trained on the selection; set salt.steps or salt.share",
    )
    require(
        salt.teaches or not salt.has_stage_one or bool(salt.scores),
        f"salt.steps={salt.steps}, salt.share={salt.share} without salt.teacher, salt.cache or salt.scores does "
        "nothing; set one of them",
    )
    is_evaluated = bool(config.data.validation or config.data.split) and train.eval_batches > 0
    require(
        not salt.end_when_better or (bool(salt.teacher) and is_evaluated and train.eval_interval > 0),
        "salt.end_when_better compares the model with its teacher at evaluations; it needs salt.teacher, "
        "data.validation, train.eval_batches and train.eval_interval",
    )


def check_terms(config: Config, world_size: int) -> None:
    """Raises ConfigError when the loss of stage 1 cannot be computed as it is described, or is described in vain."""
    salt = config.salt
    require(
        salt.schedule == "constant" or salt.teaches or not salt.has_stage_one,
        f"salt.schedule={salt.schedule} is that of a teacher's weight, and salt.teacher is not set; set it, or leave "
        "salt.schedule out",
    )
    require(
        salt.divergence == "forward_kl" or salt.teaches or not salt.has_stage_one,
        f"salt.divergence={salt.divergence} is that of student and teacher, and salt.teacher is not set; set it, or "
        "leave salt.divergence out",
    )
    require(
        salt.divergence != "reverse_kl" or not salt.cache,
        "salt.divergence=reverse_kl needs the teacher's probability of every token, and salt.cache holds a few of them "
        "and the mass of all others; use forward_kl or cross_entropy, or salt.teacher",
    )


def check_samples(config: Config, world_size: int) -> None:
    """Raises ConfigError where training takes other samples than those that scores, caches and buffers are of."""
    salt = config.salt
    if config.data.order != "megatron":
        return
    require(
        not salt.scores,
        "salt.scores belong to the samples of data.order=megagrow; data.order=megatron shuffles documents and cuts "
        "other samples. Use order=megagrow, or leave salt.scores out",
    )
    require(
        not salt.cache,
        "salt.cache holds samples of data.order=megagrow; data.order=megatron shuffles documents and cuts other "
        "samples. Use order=megagrow, or salt.teacher",
    )
    require(
        salt.online_buffer == 0,
        "salt.online_buffer passes over samples, and data.order=megatron is made for those that are trained on; use "
        "order=megagrow",
    )


def check_time_left(config: Config, world_size: int) -> None:
    """Raises ConfigError when a run that trains its small model first has no time left for all of stage 1."""
    growth, steps, stage_one = config.growth, config.train.steps, config.salt.steps
    if growth.source is None or growth.method == "none":
        return
    latest = latest_step(config, num_growths(growth) - 1)
    require(
        stage_one == 0 or latest + stage_one <= steps,
        f"salt.steps={stage_one} do not fit between the growth, before step {latest} at the latest, and the end, "
        f"train.steps={steps}; use at most {steps - latest} (all: no stage 2), or train longer",
    )


def check_selection(config: Config, world_size: int) -> None:
    """Raises ConfigError when options of the data of stage 1 exclude each other, or would do nothing."""
    salt = config.salt
    rule_of = {"keep_fraction": "top", "threshold": "threshold", "band_low": "band", "band_high": "band"}
    for name, rule in rule_of.items():
        require(
            salt.keep == rule or getattr(salt, name) == getattr(SaltConfig(), name),
            f"salt.{name}={getattr(salt, name)} belongs to salt.keep={rule}, and salt.keep={salt.keep}; leave it out, "
            f"or use keep={rule}",
        )
    require(
        salt.keep == "top" or bool(salt.scores),
        f"salt.keep={salt.keep} chooses among samples with scores; set salt.scores (of an online buffer "
        "the top share is kept)",
    )
    require(
        salt.online_buffer == 0 or salt.score != "excess_nll",
        "salt.score=excess_nll is the difference of two models' losses, and an online buffer is scored by one, the "
        "teacher; use salt.scores and salt.reference_scores, or another score",
    )
    require(
        bool(salt.reference_scores) == (salt.score == "excess_nll"),
        f"salt.score={salt.score} with salt.reference_scores={salt.reference_scores or '(empty)'}: excess_nll is the "
        "difference of two folders of scores; set both, or neither",
    )
    require(
        not (salt.reference_scores or salt.domains) or bool(salt.scores),
        "salt.reference_scores and salt.domains belong to salt.scores, which is not set; set it, or leave them out",
    )
    require(
        not salt.quotas or (bool(salt.domains) and salt.keep == "top"),
        f"salt.quotas={list(salt.quotas)} are shares of domains; they need salt.domains and salt.keep=top",
    )


def check_online(config: Config, world_size: int) -> None:
    """Raises ConfigError when an online buffer has nobody to score it, or is no selection."""
    salt = config.salt
    if salt.online_buffer == 0:
        return
    require(not salt.scores, "salt.online_buffer scores by itself, and salt.scores is set; leave one of them out")
    require(
        bool(salt.teacher) and salt.has_stage_one,
        f"salt.online_buffer={salt.online_buffer} is scored by the teacher in stage 1; set salt.teacher, and "
        "salt.steps or salt.share",
    )
    require(
        0 < salt.kept_batches < salt.online_buffer,
        f"salt.online_buffer={salt.online_buffer} with salt.keep_fraction={salt.keep_fraction} keeps "
        f"{salt.kept_batches} of so many batches, which is no selection; use a larger buffer or another share",
    )


SALT_RULES = (check_stage_one, check_time_left, check_terms, check_samples, check_selection, check_online)
