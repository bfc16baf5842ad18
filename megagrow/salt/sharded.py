"""Work on the samples of a corpus, dealt to the data-parallel ranks in shards.

A finished shard is a file, so that work that was killed goes on where it was. Batches begin at fixed places, so what
comes out does not depend on how many ranks share the work.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from megagrow.checkpoint.source import Source, check_source, load_model
from megagrow.checks import check_causal, check_model
from megagrow.config import ParallelConfig, TrainConfig, require
from megagrow.data.dataset import PackedDataset
from megagrow.host_memory import keep_freed_memory
from megagrow.model.transformer import Transformer
from megagrow.parallel.collectives import broadcast_from, sum_over, told_by_first
from megagrow.parallel.context import of_documents
from megagrow.parallel.mesh import Axis, Mesh
from megagrow.salt.work_folder import WorkFolder


class Progress(Protocol):
    """What the work tells while it runs; `metrics.Progress` is one."""

    def message(self, text: str) -> None: ...

    def update(self, step: int, *, phase: str, loss: float | None, tokens_per_second: float | None) -> None: ...


@dataclass(frozen=True, kw_only=True)
class ReadSettings:
    """How a model reads the samples of a corpus.

    Attributes:
        dtype: of the model's parameters and activations.
        mask_documents, reset_positions: as `data.mask_documents` and `data.reset_positions` of the runs to come.
        batch_size: samples per forward pass; in float32 another size may change the last bit of a logit, because
            matrix products may then sum in another order.
        shard_size: samples that are done again at most after an interruption; rounded up to whole batches.
        skip_source_check: go on although the model does not fit the data.
        compile: torch.compile the layers and the passes over logits, which may change the last bit of a logit too.
    """

    dtype: torch.dtype = torch.float32
    mask_documents: bool = False
    reset_positions: bool = False
    batch_size: int = 16
    shard_size: int = 256
    skip_source_check: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "shard_size"):
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive")

    @property
    def identity(self) -> dict[str, Any]:
        """What of it the outputs depend on, as in `records.Reading`."""
        flags = {"mask_documents": self.mask_documents, "reset_positions": self.reset_positions}
        return {"dtype": str(self.dtype).removeprefix("torch."), **flags}


class Shards:
    """The division of samples into shards, and which of them are done.

    The finished ones are looked up once, by one rank, before any is written: all ranks of a tensor group must agree.

    Args:
        folder: where they come to lie.
        identity: what they belong to.
        num_samples: samples in all; shards hold places 0 … num_samples - 1.
        batch_size: samples per forward pass.
        shard_size: samples of a shard, rounded up to whole batches.
        mesh: whose tensor axis shares the model, and whose other axes share the samples.
    """

    def __init__(
        self, folder: WorkFolder, identity: Any, num_samples: int, batch_size: int, shard_size: int, mesh: Mesh
    ) -> None:
        self.folder, self.identity, self.mesh = folder, identity, mesh
        self.num_samples, self.batch_size = num_samples, batch_size
        self.size = -(-shard_size // batch_size) * batch_size
        self.count = -(-num_samples // self.size)
        self.num_workers = mesh.pp.size * mesh.tokens.size

    def samples(self, shard: int) -> range:
        return range(shard * self.size, min((shard + 1) * self.size, self.num_samples))

    def batches(self, shard: int) -> Iterator[range]:
        """The places of each batch of a shard."""
        samples = self.samples(shard)
        for start in range(samples.start, samples.stop, self.batch_size):
            yield range(start, min(start + self.batch_size, samples.stop))

    def pending(self) -> list[int]:
        """The shards to do, the same on every rank.

        Raises:
            DataError: the folder holds the shards of other work.
        """
        self.folder.check(self.identity, self.size)
        done = torch.zeros(self.count, dtype=torch.uint8)
        if self.mesh.is_main:
            done = torch.tensor(self.folder.finished(self.count), dtype=torch.uint8)
        done = broadcast_from(done.to(self.mesh.device), 0, self.mesh.world).cpu()
        return torch.nonzero(done == 0).flatten().tolist()

    def mine(self, pending: list[int]) -> list[int]:
        """This rank's share of them."""
        worker = self.mesh.pp.rank * self.mesh.tokens.size + self.mesh.tokens.rank
        return pending[worker :: self.num_workers]

    def begin(self, **more: Any) -> None:
        """Makes the folder; no rank writes into it before it says what the shards belong to."""
        if self.mesh.is_main:
            self.folder.begin(self.identity, self.size, **more)
        wait_for_all(self.mesh)

    def carry_out(
        self,
        is_done: Callable[[], bool],
        work: Callable[[list[int]], None],
        join: Callable[[], None],
        clear: Callable[[], None],
    ) -> None:
        """Does what is pending, puts it together and clears up; a collective. What is done already stays as it is.

        Args:
            is_done: whether the whole is there; asked of the first rank.
            work: does the pending shards, this rank's share of them; a collective.
            join, clear: called on the first rank, when every rank has come so far.
        """
        mesh = self.mesh
        if not told_by_first(mesh.is_main and is_done(), mesh.world, mesh.device):
            if pending := self.pending():
                work(pending)
            wait_for_all(mesh)
            if mesh.is_main:
                join()
        wait_for_all(mesh)
        if mesh.is_main:
            clear()

    def reporter(
        self, progress: Progress | None, pending: list[int], phase: str, seq_length: int
    ) -> Callable[[int], None]:
        """Takes the number of samples just done here, and reports as if the others kept pace."""
        todo, own_todo = (sum(len(self.samples(i)) for i in part) for part in (pending, self.mine(pending)))
        begin, own = time.monotonic(), 0

        def report(num_samples: int) -> None:
            nonlocal own
            own += num_samples
            if progress is None:
                return
            done = todo * own // own_todo
            speed = done * seq_length / max(time.monotonic() - begin, 1e-9)
            progress.update(self.num_samples - todo + done, phase=phase, loss=None, tokens_per_second=speed)

        return report


def wait_for_all(mesh: Mesh) -> None:
    """Returns when every rank has come here."""
    sum_over(torch.zeros(1, device=mesh.device), mesh.world).item()  # on a GPU the sum alone would only be queued


def check_reader(source: Source, dataset: PackedDataset, mesh: Mesh, work: str) -> None:
    """Raises ConfigError unless the model can read such samples on this mesh; `work` is what for, as a verb."""
    check_causal(source.model, str(source.path), f"to {work} samples")
    check_model(source.model, ParallelConfig(tensor=mesh.tp.size), str(source.path))
    require(
        source.model.positions != "learned" or dataset.seq_length <= source.model.max_seq_length,
        f"seq_length={dataset.seq_length} exceeds max_seq_length={source.model.max_seq_length} of "
        f"{source.path}, the rows of its position table; {work} shorter samples",
    )


def checked_model(
    source: Source, dataset: PackedDataset, mesh: Mesh, settings: ReadSettings, progress: Progress | None
) -> Transformer:
    """The model, sharded over the tensor axis, after a look at its loss on the data (see `check_source`).

    From now on a CPU keeps its memory: all passes over the samples need the same.
    """
    if mesh.device.type == "cpu":
        keep_freed_memory()
    model = load_model(source, mesh.tensor_only(), settings.dtype, TrainConfig(compile=settings.compile))
    loss = check_source(model, dataset, mesh, str(source.path), settings.skip_source_check)
    if progress is not None:
        progress.message(f"{source.path}: loss {loss:.3f} nats per token on the first samples")
    return model


def read_samples(
    dataset: PackedDataset, ids: ArrayLike, settings: ReadSettings, device: torch.device
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Inputs and labels [B, S] of samples, and what a model that sees them whole is told of their documents."""
    tokens_BS1 = torch.from_numpy(dataset.batch(ids)).to(device)
    documents_BS = None
    if settings.mask_documents or settings.reset_positions:
        documents_BS = torch.from_numpy(dataset.documents(np.asarray(ids))).to(device)
    told = of_documents(documents_BS, Axis(), settings.mask_documents, settings.reset_positions)
    return tokens_BS1[:, :-1], tokens_BS1[:, 1:], told
