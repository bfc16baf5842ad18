"""AdamW's update over plain local tensors: whose kernels compute it, and in which memory.

    TorchAdamW   torch's fused kernels            LocalWeights   where the parameters are
    KernelAdamW  megagrow's own                   HostWeights    in host memory, for parameters on a GPU
    ApexAdamW    NVIDIA Apex' FusedAdam

All of them compute the same update from the same moments, so that a checkpoint of one is one of the other. They count
the steps of all tensors together: one without a gradient keeps its value and moments (frozen), its count goes on.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megagrow import ops
from megagrow.config import OptimConfig
from megagrow.errors import ConfigError, one_line
from megagrow.parallel.shards import local

MOMENTS = ("exp_avg", "exp_avg_sq")
BUILD_APEX = (
    "build NVIDIA's from source, in a clone of https://github.com/NVIDIA/apex: "
    "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation ."
)

Group = dict[str, Any]


def check_optimizer_backend(backend: str, device: torch.device) -> None:
    """Makes sure that the update can run before anything is built.

    Args:
        backend: `torch` or `apex`.
        device: where the parameters will be.

    Raises:
        ConfigError: the back end is not installed, not complete, another package, or does not serve the device.
    """
    problem = _apex_problem(device) if backend == "apex" else None
    if problem:
        raise ConfigError(f"optim.backend=apex {problem}, or use optim.backend=torch")


class TorchAdamW:
    """torch's fused kernels.

    Args:
        groups: `params` (plain leaf tensors), `eps` and `weight_decay` of each; `lr` is set before every step.
        config: the decay rates of the moments.
        step: updates that the moments have already seen.
    """

    def __init__(self, groups: list[Group], config: OptimConfig, step: int) -> None:
        self.optimizer = self._make(groups, lr=0.0, betas=(config.beta1, config.beta2))
        for tensor in self._tensors():
            self.optimizer.state[tensor] = {moment: torch.zeros_like(tensor.detach()) for moment in MOMENTS}
        self.step_count = step

    def _make(self, groups: list[Group], **options: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, fused=True, **options)

    def _tensors(self) -> Iterator[Tensor]:
        return (tensor for group in self.groups for tensor in group["params"])

    @property
    def groups(self) -> list[Group]:
        """The groups, in the order in which they were given; `lr` may be written."""
        return self.optimizer.param_groups

    @property
    def step_count(self) -> int:
        """Updates that the moments have seen."""
        return int(self.optimizer.state[next(self._tensors())]["step"])

    @step_count.setter
    def step_count(self, step: int) -> None:
        for tensor in self._tensors():
            # The fused kernel reads the step where the parameter is: on the host, a GPU would fault.
            self.optimizer.state[tensor]["step"] = torch.tensor(float(step), device=tensor.device)

    def moment(self, tensor: Tensor, moment: str) -> Tensor:
        """`exp_avg` or `exp_avg_sq` of one of the groups' tensors."""
        return self.optimizer.state[tensor][moment]

    def step(self, scale: Tensor | None = None, skip: Tensor | None = None) -> None:
        """Updates every tensor that has a gradient."""
        assert scale is None and skip is None, "only megagrow's own kernel takes them"
        counts = [self.optimizer.state[tensor]["step"] for tensor in self._tensors() if tensor.grad is None]
        if counts:  # torch counts for those that have gradients
            torch._foreach_add_(counts, 1)
        self.optimizer.step()


class KernelAdamW(TorchAdamW):
    """megagrow's multi-tensor kernel: all groups in one launch, which scales gradients, or does nothing, if told to."""

    def __init__(self, groups: list[Group], config: OptimConfig, step: int) -> None:
        super().__init__(groups, config, step)
        self.betas = config.beta1, config.beta2
        self._table: Any = None
        self._of: list[int] = []  # the tensors of the table

    @property
    def step_count(self) -> int:
        """Updates that the moments have seen."""
        return self._step

    @step_count.setter
    def step_count(self, step: int) -> None:
        self._step = step

    def step(self, scale: Tensor | None = None, skip: Tensor | None = None) -> None:
        """Updates every tensor that has a gradient, multiplied by `scale`, unless `skip` is set."""
        self._step += 1
        given = [(tensor, group) for group in self.groups for tensor in group["params"] if tensor.grad is not None]
        if not given:
            return
        tensors, groups = [tensor for tensor, _ in given], [group for _, group in given]
        if [id(tensor) for tensor in tensors] != self._of:
            moments = ([self.moment(tensor, moment) for tensor in tensors] for moment in MOMENTS)
            self._table, self._of = ops.adamw_table(tensors, *moments), [id(tensor) for tensor in tensors]
        rates = ([group[rate] for group in groups] for rate in ("lr", "eps", "weight_decay"))
        self._table.update([tensor.grad for tensor in tensors], *rates, *self.betas, self._step, scale, skip)


class ApexAdamW(TorchAdamW):
    """NVIDIA Apex' multi-tensor kernels, which count steps per group."""

    def _make(self, groups: list[Group], **options: Any) -> torch.optim.Optimizer:
        from apex.optimizers import FusedAdam

        return FusedAdam(groups, adam_w_mode=True, **options)

    @property
    def step_count(self) -> int:
        """Updates that the moments have seen."""
        return int(self.groups[0]["step"])

    @step_count.setter
    def step_count(self, step: int) -> None:
        for group in self.groups:
            group["step"] = step

    def step(self, scale: Tensor | None = None, skip: Tensor | None = None) -> None:
        """Updates every tensor that has a gradient."""
        assert scale is None and skip is None, "only megagrow's own kernel takes them"
        for tensor in self._tensors():
            if tensor.numel() == 0:
                # An empty shard that comes last in Apex' list keeps it from launching the kernel for those before it.
                tensor.grad = None
        self.optimizer.step()


class Weights(Protocol):
    """What the update works on: a leaf tensor per parameter.

    Attributes:
        tensors: by parameter name.
    """

    tensors: dict[str, nn.Parameter]

    def fetch(self) -> None:
        """Gives the tensors the values and the gradients of the parameters."""

    def give_back(self) -> None:
        """Gives the parameters the updated values."""


class LocalWeights:
    """This rank's pieces of the parameters themselves."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = parameters
        self.tensors = {name: nn.Parameter(local(p.detach())) for name, p in parameters.items()}

    def fetch(self) -> None:
        for name, tensor in self.tensors.items():
            parameter = self.parameters[name]
            tensor.data = local(parameter.detach())
            tensor.grad = None if parameter.grad is None else local(parameter.grad)

    def give_back(self) -> None:
        pass


class HostWeights:
    """Master weights in host memory, where the moments are too; the GPU keeps what it computes with.

    What travels is in pinned memory: gradients to the host, updated weights back. Weights travel to the host only when
    something other than the update has written them: a checkpoint, growth.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = parameters
        pieces = {name: local(p.detach()) for name, p in parameters.items()}
        self.tensors = {name: nn.Parameter(_host_like(piece)) for name, piece in pieces.items()}
        self._gradients = {name: _host_like(piece) for name, piece in pieces.items()}
        self._seen: dict[str, tuple[int, int]] = {}

    @torch.no_grad()
    def fetch(self) -> None:
        is_cuda = False
        for name, tensor in self.tensors.items():
            parameter = self.parameters[name]
            piece, grad = local(parameter), parameter.grad
            is_cuda |= piece.is_cuda
            if self._seen.get(name) != _stamp(piece):
                tensor.copy_(piece, non_blocking=True)
            tensor.grad = None if grad is None else self._gradients[name].copy_(local(grad), non_blocking=True)
        if is_cuda:
            torch.cuda.current_stream().synchronize()

    @torch.no_grad()
    def give_back(self) -> None:
        for name, tensor in self.tensors.items():
            piece = local(self.parameters[name])
            piece.copy_(tensor, non_blocking=True)
            self._seen[name] = _stamp(piece)


def _host_like(piece: Tensor) -> Tensor:
    return torch.empty_like(piece, device="cpu", pin_memory=piece.is_cuda)


def _stamp(piece: Tensor) -> tuple[int, int]:
    """Differs after every write to the piece in place, and when other memory has taken its place.

    To be asked of the parameter's own piece: what `detach` makes of a DTensor counts versions anew.
    """
    return piece.data_ptr(), piece._version


def _apex_problem(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"runs on GPUs, not on the {device.type}; start the run where one is visible"
    try:
        import apex
    except ModuleNotFoundError as error:
        if error.name == "apex":
            return f"needs NVIDIA Apex, which is not installed (the registry's apex is another package); {BUILD_APEX}"
        return _other_apex(error)
    except Exception as error:
        return _other_apex(error)
    try:
        from apex.optimizers import FusedAdam  # noqa: F401
    except Exception as error:
        return _other_apex(error, apex)
    try:
        import amp_C  # noqa: F401
    except Exception as error:
        return f"needs the CUDA extensions of NVIDIA Apex, which do not load ({one_line(error)}); {BUILD_APEX}"
    return None


def _other_apex(error: Exception, package: Any = None) -> str:
    where = f" in {package.__path__[0]}" if getattr(package, "__path__", None) else ""
    return (
        f"finds no FusedAdam in the installed package apex{where} ({one_line(error)}); the registry's package of that "
        f"name is unrelated: pip uninstall apex, then {BUILD_APEX}"
    )
