"""torch.distributed.checkpoint with a digest for every stored item, and without reading pickles.

Writing: torch's planner and writer; each item is hashed on its way to the file. Reading: torch's
    planner and reader; each item is hashed before torch parses it. What torch keeps in `.metadata`,
    a pickle, is rebuilt from the manifest.
"""

import dataclasses
import hashlib
import io
import os
import warnings
import zipfile
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint._fsspec_filesystem import FileSystem as RemoteFileSystem
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_saver import _save_state_dict
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megagrow.checkpoint.agreement import Cause, Ranks, cause_of, failure
from megagrow.checkpoint.format import FileEntry, Item, Manifest, TensorEntry
from megagrow.checkpoint.remote import num_bytes, remote, unreadable
from megagrow.checkpoint.shards import DTYPES, LocalShard
from megagrow.data.files import os_errors_name
from megagrow.errors import CheckpointError, Damaged, Preempted
from megagrow.parallel import heartbeat

_BLOCK_BYTES = 1 << 20


def write_items(path: Path, shards: Mapping[str, LocalShard], ranks: Ranks, action: str) -> "ItemWriter":
    """Writes and fsyncs the shards of all ranks, every box once; a collective.

    Returns:
        The writer; on the first rank it has the tables for the manifest.

    Raises:
        CheckpointError: on every rank; `action`, the failing ranks and their causes.
    """
    writer = ItemWriter(path)

    def write() -> None:
        data = {name: shard.data for name, shard in shards.items()}
        planner = _ShardSavePlanner(shards)
        # What dcp.save calls, less a warning in one process: to silence it is not safe in a thread.
        _save_state_dict(
            data,
            storage_writer=writer,
            planner=planner,
            process_group=ranks.group,
            no_dist=not ranks.is_distributed,
        )

    _run(write, ranks, action)
    return writer


def read_items(path: Path, manifest: Manifest, shards: Mapping[str, LocalShard], ranks: Ranks, action: str) -> None:
    """Fills the shards from a checkpoint, each stored item checked before it is used; a collective.

    Raises:
        CheckpointError: on every rank; `action`, the failing ranks and their causes. Some shards
            are then filled.
    """

    def read() -> None:
        data = {name: shard.data for name, shard in shards.items()}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            dcp.load(
                cast(dict[str, Any], data),
                storage_reader=ItemReader(path, manifest, shards),
                planner=_ShardLoadPlanner(shards),
                process_group=ranks.group,
                no_dist=not ranks.is_distributed,
            )

    _run(read, ranks, action)


class ItemWriter(dcp.FileSystemWriter):
    """torch's writer; on the first rank it ends up with the tables of what all ranks wrote."""

    folder: Path

    def __init__(self, path: Path) -> None:
        is_local = remote(path) is None
        super().__init__(str(path), single_file_per_rank=True, sync_files=is_local, thread_count=1)
        _reach(self, path)
        self.tensors: dict[str, TensorEntry] = {}
        self.files: dict[str, FileEntry] = {}
        self.items: tuple[Item, ...] = ()

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        done: Future[list[WriteResult]] = Future()
        if not plan.items:
            done.set_result([])
            return done
        hashing = _HashingTransforms(cast(_ShardSavePlanner, planner).release)
        self.transforms = cast(Any, hashing)
        try:
            results = super().write_data(plan, planner).value()
        except CheckpointError:  # a tensor that could not be fetched
            raise
        except Exception as error:
            file = self.folder / f"{plan.storage_data.prefix}0.distcp"
            raise CheckpointError(f"{file}: {cause_of(error)}") from error
        done.set_result(
            [dataclasses.replace(r, storage_data=(r.storage_data, hashing.digests[r.index])) for r in results]
        )
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        written = [result for of_rank in results for result in of_rank]
        stored = cast(dict[str, TensorStorageMetadata], metadata.state_dict_metadata)
        self.tensors = {
            name: TensorEntry(str(entry.properties.dtype).removeprefix("torch."), tuple(entry.size))
            for name, entry in stored.items()
        }
        self.items = tuple(_written_item(metadata, result) for result in written)
        plain = [dataclasses.replace(result, storage_data=result.storage_data[0]) for result in written]
        with os_errors_name(self.folder / ".metadata"):
            super().finish(metadata, [plain])
        self.files = _file_table(self.folder, self.items)


class ItemReader(dcp.FileSystemReader):
    """torch's reader, with metadata from the manifest; checks an item before torch parses it."""

    folder: Path

    def __init__(self, path: Path, manifest: Manifest, names: Iterable[str]) -> None:
        super().__init__(str(path))
        _reach(self, path)
        self.manifest = manifest
        self.names = tuple(names)
        self.items = {
            MetadataIndex(name, item.offsets): item for name in self.names for item in manifest.items_of[name]
        }

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        places = {i: _StorageInfo(x.file, x.start, x.num_bytes) for i, x in self.items.items()}
        tensors = {name: self._tensor_metadata(name) for name in self.names}
        return Metadata(dict(tensors), storage_data=places)

    def _tensor_metadata(self, name: str) -> TensorStorageMetadata:
        entry = self.manifest.tensors[name]
        boxes = [
            ChunkStorageMetadata(torch.Size(item.offsets), torch.Size(item.sizes))
            for item in self.manifest.items_of[name]
        ]
        properties = TensorProperties(dtype=DTYPES[entry.dtype])
        return TensorStorageMetadata(properties, torch.Size(entry.shape), boxes)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        reads: dict[MetadataIndex, list[ReadItem]] = defaultdict(list)
        for read in plan.items:
            reads[read.storage_index].append(read)
        for index, of_item in reads.items():
            item = self.items[index]
            self.verify(item)
            try:
                super().read_data(dataclasses.replace(plan, items=of_item), planner)
            except Preempted:  # which a signal raises, wherever it comes
                raise
            except OSError as error:
                raise unreadable(self.folder / item.file, error) from error
            except Exception as error:
                file = self.folder / item.file
                text = f"{file}: tensor {item.tensor!r} cannot be read: {type(error).__name__}"
                raise CheckpointError(text) from error
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def verify(self, item: Item) -> None:
        """Compares the item's bytes with their digest; refuses what would unpack to more bytes.

        Raises:
            Damaged: names file and tensor.
            CheckpointError: the file cannot be read just now.
        """
        file = self.folder / item.file
        with open_sized(file, self.manifest.files[item.file]) as stream:
            view = self._slice_file(stream, _StorageInfo(item.file, item.start, item.num_bytes))
            if digest_of(view) != item.sha256:
                end = item.start + item.num_bytes
                raise Damaged(
                    f"{file}: bytes {item.start} to {end} (tensor {item.tensor!r}) differ from "
                    "their digest: the file is damaged"
                )
            if not _is_plain_archive(view, item.num_bytes):
                raise Damaged(f"{file}: tensor {item.tensor!r} is no plain torch archive")

    def _slice_file(self, file: Any, sinfo: _StorageInfo) -> IO[bytes]:
        return cast(IO[bytes], _Slice(file, sinfo.offset, sinfo.length))


def _reach(storage: ItemWriter | ItemReader, folder: Path) -> None:
    """Tells torch's reader or writer where its folder is; remote ones are reached through fsspec."""
    storage.folder = folder
    if remote(folder) is not None:
        files: Any = RemoteFileSystem()
        storage.fs, storage.path = files, files.init_path(str(folder))


@contextmanager
def open_sized(path: Path, entry: FileEntry) -> Generator[IO[bytes], None, None]:
    """Opens a file that must have the size that the manifest says.

    Raises:
        Damaged: the file is missing, shorter or longer.
        CheckpointError: it cannot be read just now.
    """
    try:
        size = num_bytes(path)
        if size != entry.num_bytes:
            raise Damaged(f"{path}: has {size} bytes, not {entry.num_bytes}: the file is damaged")
        with path.open("rb") as stream:
            yield stream
    except OSError as error:
        raise unreadable(path, error) from error


def digest_of(stream: IO[bytes]) -> str:
    """The sha256 of all that is left to read."""
    digest = hashlib.sha256()
    while block := stream.read(_BLOCK_BYTES):
        digest.update(block)
        heartbeat.progress()
    return digest.hexdigest()


class _ShardSavePlanner(dcp.DefaultSavePlanner):
    """Plans boxes of plain local tensors; torch writes each box once and checks the cover."""

    def __init__(self, shards: Mapping[str, LocalShard]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.shards = shards
        self.fetched: dict[str, Tensor] = {}

    def create_local_plan(self) -> SavePlan:
        boxes = {name: shard for name, shard in self.shards.items() if shard.data.numel()}
        self.plan = SavePlan([_write_item(name, shard) for name, shard in boxes.items()])
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        seen: dict[str, tuple[str, int]] = {}
        for rank, plan in enumerate(all_plans):
            for item in plan.items:
                data = cast(TensorWriteData, item.tensor_data)
                kind = f"{data.properties.dtype}{list(data.size)}"
                first, first_rank = seen.setdefault(item.index.fqn, (kind, rank))
                if kind != first:
                    raise CheckpointError(
                        f"tensor {item.index.fqn!r} is {first} on rank {first_rank} and {kind} on "
                        f"rank {rank}; one name must be one tensor"
                    )
        return super().create_global_plan(all_plans)

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        shard = self.shards[index.fqn]
        if shard.fetch is None:
            return shard.data
        copy = shard.fetch().clone()  # whose memory `release` may take away
        assert (copy.shape, copy.dtype) == (shard.data.shape, shard.data.dtype), f"{index.fqn}: {copy.dtype}"
        self.fetched[index.fqn] = copy
        return copy

    def release(self, index: MetadataIndex) -> None:
        """Frees a fetched tensor once it is written: torch's writer holds on to all of them until the end."""
        if index.fqn in self.fetched:
            self.fetched.pop(index.fqn).untyped_storage().resize_(0)


class _ShardLoadPlanner(dcp.DefaultLoadPlanner):
    """Plans which parts of which stored boxes fill the local ones."""

    def __init__(self, shards: Mapping[str, LocalShard]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.shards = shards

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        reads = []
        for name, shard in self.shards.items():
            if shard.data.numel():
                box = ChunkStorageMetadata(torch.Size(shard.offsets), shard.data.size())
                stored = cast(TensorStorageMetadata, self.metadata.state_dict_metadata[name])
                reads += create_read_items_for_chunk_list(name, stored, [box])
        return LoadPlan(reads)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.shards[index.fqn].data

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise CheckpointError(f"{read_item.storage_index.fqn!r} is no tensor; it is not loaded")


class _HashingTransforms:
    """Takes the place of the writer's stream transforms: sees each item on its way to the file.

    `written` is called with each item that is there.
    """

    def __init__(self, written: Callable[[MetadataIndex], None]) -> None:
        self.digests: dict[MetadataIndex, str] = {}
        self.written = written

    def transform_save_stream(self, item: WriteItem, raw: IO[bytes]) -> tuple[io.RawIOBase, list[str]]:
        def finish(digest: str) -> None:
            self.digests[item.index] = digest
            self.written(item.index)

        return _HashedStream(raw, finish), []


class _HashedStream(io.RawIOBase):
    """Passes bytes on to a file and reports their digest when closed; the file stays open."""

    def __init__(self, raw: IO[bytes], report: Callable[[str], None]) -> None:
        self._raw = raw
        self._report = report
        self._digest = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._digest.update(data)
        heartbeat.progress()
        return self._raw.write(data)

    def close(self) -> None:
        if not self.closed:
            self._report(self._digest.hexdigest())
        super().close()


class _Slice(io.RawIOBase):
    """A read-only part of a file as a file of its own; torch's cannot seek from the end."""

    def __init__(self, raw: IO[bytes], start: int, length: int) -> None:
        self._raw = raw
        self._start = start
        self._length = length
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        left = max(0, self._length - self._position)
        view = memoryview(buffer).cast("B")[:left]
        self._raw.seek(self._start + self._position)
        num_read = cast(io.BufferedReader, self._raw).readinto(view)
        self._position += num_read
        return num_read


def _write_item(name: str, shard: LocalShard) -> WriteItem:
    offsets = torch.Size(shard.offsets)
    return WriteItem(
        index=MetadataIndex(name, offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets, shard.data.size()),
            properties=TensorProperties(dtype=shard.data.dtype),
            size=torch.Size(shard.shape),
        ),
    )


def _written_item(metadata: Metadata, result: WriteResult) -> Item:
    index, (place, digest) = result.index, result.storage_data
    tensor = cast(TensorStorageMetadata, metadata.state_dict_metadata[index.fqn])
    box = tensor.chunks[cast(int, index.index)]
    return Item(
        tensor=index.fqn,
        offsets=tuple(box.offsets),
        sizes=tuple(box.sizes),
        file=place.relative_path,
        start=place.offset,
        num_bytes=place.length,
        sha256=digest,
    )


def _file_table(path: Path, items: tuple[Item, ...]) -> dict[str, FileEntry]:
    """All files beside the manifest, with the sizes that were written, not those that are found."""
    sizes: dict[str, int] = defaultdict(int)
    for item in items:
        sizes[item.file] += item.num_bytes
    files = {name: FileEntry(size, None) for name, size in sizes.items()}
    metadata = path / ".metadata"
    with metadata.open("rb") as stream:
        files[metadata.name] = FileEntry(num_bytes(metadata), digest_of(stream))
    return files


def _is_plain_archive(stream: IO[bytes], limit: int) -> bool:
    """Whether a zip archive is uncompressed: torch.load unpacks one to whatever size it claims."""
    try:
        entries = zipfile.ZipFile(stream).infolist()
    except zipfile.BadZipFile:
        return False
    stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
    return stored and sum(entry.file_size for entry in entries) <= limit


def _run(function: Callable[[], None], ranks: Ranks, action: str) -> None:
    """Runs one of torch's collectives; its exception, which all ranks get, becomes one line."""
    try:
        function()
    except CheckpointException as error:
        causes = {rank: Cause.of(cause) for rank, (cause, _) in error.failures.items()}
        raise failure(action, causes, ranks.world_size) from error
