"""Tasks of `lm_eval` on a megagrow model.

Source: https://github.com/EleutherAI/lm-evaluation-harness
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megagrow.config import require
from megagrow.errors import ConfigError, DataError
from megagrow.evaluate.harness import HarnessModel
from megagrow.evaluate.service import Service
from megagrow.evaluate.shared_model import SharedModel
from megagrow.evaluate.transformers_tokenizer import INSTALL
from megagrow.metrics import Progress

KEPT = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better")  # of what lm_eval returns


@dataclass(frozen=True)
class TaskSettings:
    """What is asked.

    Attributes:
        tasks: names of tasks or groups of lm_eval.
        include_path: folder of more tasks (YAML files); they may name Python functions and are as trusted as a program.
        num_fewshot: examples before each question; None: as the task says.
        limit: questions of each task, from the first on; 0: all.
        chat_template: questions are put as the user's turn of a conversation.
        seed: of sampling and of the choice of examples.
    """

    tasks: Sequence[str]
    include_path: str = ""
    num_fewshot: int | None = None
    limit: int = 0
    chat_template: bool = False
    seed: int = 1234

    def __post_init__(self) -> None:
        require(len(self.tasks) > 0, "no task is given; name some")
        require(self.limit >= 0, f"limit={self.limit} must not be negative")
        require((self.num_fewshot or 0) >= 0, f"num_fewshot={self.num_fewshot} must not be negative")


def evaluate_tasks(
    shared: SharedModel, tokenizer: Any, settings: TaskSettings, progress: Progress | None = None
) -> dict[str, Any] | None:
    """Runs tasks; all ranks call it, lm_eval itself runs on the first one.

    Args:
        shared: the model.
        tokenizer: from `load_transformers_tokenizer`.
        settings: see `TaskSettings`.
        progress: where to report.

    Returns:
        `results` by task and metric, `versions`, …, as lm_eval gives them; None on all ranks but the first.

    Raises:
        ConfigError: lm_eval is not installed, or a task is not known or asks for what is not done here.
        DataError: a task's data cannot be read.
    """
    check_lm_eval()
    with Service(shared, tokenizer) as service:
        if not service.is_first:
            service.serve()
            return None
        model = lm_eval_model(service, progress, settings.seed)
        found = _run(model, settings)
    return {name: found[name] for name in KEPT if name in found}


def task_table(found: dict[str, Any]) -> str:
    """What `evaluate_tasks` returned, as lm_eval shows it."""
    from lm_eval.utils import make_table

    table: str = make_table(found)
    return table


def lm_eval_model(service: Service, progress: Progress | None = None, seed: int = 0) -> Any:
    """The object to hand to `lm_eval.simple_evaluate(model=…)` on the first rank, while the others `serve`.

    Raises:
        ConfigError: lm_eval is not installed.
    """
    check_lm_eval()
    from lm_eval.api.model import TemplateLM

    class Megagrow(HarnessModel, TemplateLM):
        """A megagrow model."""

    return Megagrow(service, progress, seed)


def check_lm_eval() -> None:
    """Raises ConfigError where lm_eval is not installed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"tasks need the package {error.name}, which is not installed; {INSTALL}") from None


def _run(model: Any, settings: TaskSettings) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=settings.include_path or None)
    unknown = [name for name in settings.tasks if not manager.match_tasks([name])]
    require(
        not unknown,
        f"no task {', '.join(unknown)}; give names of lm_eval's tasks, or a folder that has them with --include-path",
    )
    seeds = {f"{name}_random_seed": settings.seed for name in ("numpy", "torch", "fewshot")}
    found: dict[str, Any] = simple_evaluate(
        model,
        tasks=_loaded(manager, settings.tasks),
        num_fewshot=settings.num_fewshot,
        limit=settings.limit or None,
        apply_chat_template=settings.chat_template,
        task_manager=manager,
        random_seed=settings.seed,
        log_samples=False,
        **seeds,
    )
    return found


def _loaded(manager: Any, names: Sequence[str]) -> list[Any]:
    """The tasks and groups of these names, each with its data; what belongs to a group comes with it."""
    try:
        loaded = manager.load(list(names))
    except Exception as error:  # of a task's own making: its data, its templates
        raise DataError(f"{', '.join(names)}: {type(error).__name__}: {' '.join(str(error).split())}") from error
    inside = {name for members in loaded["group_map"].values() for name in members}
    both = {**loaded["groups"], **loaded["tasks"]}
    return [item for name, item in both.items() if name not in inside]
