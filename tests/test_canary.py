"""A payload in any file that megagrow reads never runs: pickles, YAML tags, code that a folder brings along."""

import gzip
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from megagrow import checkpoint
from megagrow.checkpoint.hf import HFReader
from megagrow.checkpoint.source import open_source
from megagrow.config_file import load_file
from megagrow.data.description import describe
from megagrow.data.domains import domains_path, read_domains
from megagrow.data.indexed import IndexedDataset, IndexedWriter
from megagrow.data.preprocess import preprocess_files
from megagrow.data.records import read_texts
from megagrow.data.tokenizer import load_tokenizer
from megagrow.errors import MegagrowError
from megagrow.growth.ligo_file import load_maps
from megagrow.ledger import Ledger
from megagrow.metrics import read_exit, read_metrics
from megagrow.report.run import load_run
from megagrow.roles import parameter_names
from megagrow.salt.score_files import DTYPES, Cost, identity_of, read_scores, write_scores
from tests.checkpoint.hf_folders import save_folder, save_tokenizer
from tests.checkpoint.samples import save_step
from tests.salt.samples import opened, random_corpus


class Canary:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


def pickled(canary: Path) -> bytes:
    return pickle.dumps(Canary(canary))


def archived(canary: Path) -> bytes:
    """The pickle in the archive that torch.save writes."""
    path = canary.with_suffix(".pt")
    torch.save({"model": Canary(canary)}, path)
    return path.read_bytes()


def in_yaml(canary: Path) -> bytes:
    return f"model: !!python/object/apply:os.mkdir ['{canary}']\n".encode()


def in_json(canary: Path) -> bytes:
    """Hydra's and PyYAML's ways of naming a callable, in JSON."""
    return json.dumps({"_target_": "os.mkdir", "path": str(canary), "!!python/name": "os.mkdir"}).encode()


PAYLOADS = [pickled, archived, in_yaml, in_json]


def indexed(folder: Path) -> Path:
    with IndexedWriter(folder / "c", "<u2") as writer:
        writer.add_document(np.arange(9))
    return folder / "c"


def scored(folder: Path) -> Path:
    dataset = opened(random_corpus(folder / "corpus", 6, 4), 4)
    arrays = {name: np.ones(6, dtype) for name, dtype in DTYPES.items()}
    write_scores(folder, arrays, identity_of(dataset, "model", 10, "float32"), Cost(1.0, 1.0, 24))
    return folder


def fetch_all(folder: Path) -> None:
    reader = HFReader(folder)
    for name in parameter_names(reader.model):
        reader.fetch(name)


# file -> what makes the folder around it, and what reads it
READERS: dict[str, tuple[Callable[[Path], Any], Callable[[Path], Any]]] = {
    "step-2/manifest.json": (lambda f: save_step(f, 2), lambda f: checkpoint.verify(f / "step-2")),
    "step-2/manifest.sha256": (lambda f: save_step(f, 2), lambda f: checkpoint.verify(f / "step-2")),
    "step-2/.metadata": (lambda f: save_step(f, 2), lambda f: checkpoint.verify(f / "step-2")),
    "step-2/__0_0.distcp": (lambda f: save_step(f, 2), lambda f: checkpoint.verify(f / "step-2")),
    "c.idx": (indexed, lambda f: IndexedDataset(f / "c")),
    "c.bin": (indexed, lambda f: IndexedDataset(f / "c")),
    "c.json": (indexed, lambda f: describe(f / "c")),
    "tokenizer.model": (Path.exists, lambda f: load_tokenizer(f / "tokenizer.model")),
    "tokenizer.json": (Path.exists, lambda f: load_tokenizer(f / "tokenizer.json")),
    "manifest.json": (scored, lambda f: read_scores(f, opened(f / "corpus", 4))),
    "scores.safetensors": (scored, lambda f: read_scores(f, opened(f / "corpus", 4))),
    "c.domains.safetensors": (indexed, lambda f: read_domains(domains_path(f / "c"), IndexedDataset(f / "c"))),
    "metrics.jsonl": (Path.exists, lambda f: read_metrics(f / "metrics.jsonl")),
    "ledger.json": (Path.exists, lambda f: Ledger.load(f / "ledger.json")),
    "exit.json": (Path.exists, read_exit),
    "config.json": (Path.exists, load_run),
    "run.yaml": (Path.exists, lambda f: load_file(f / "run.yaml")),
    "maps.safetensors": (Path.exists, lambda f: load_maps(f / "maps.safetensors")),
    "text.jsonl": (Path.exists, lambda f: list(read_texts([f / "text.jsonl"]))),
}


@pytest.mark.parametrize("payload", PAYLOADS, ids=lambda payload: payload.__name__)
@pytest.mark.parametrize("file", READERS)
def test_a_payload_in_the_place_of_a_file_is_refused(
    tmp_path: Path, file: str, payload: Callable[[Path], bytes]
) -> None:
    make, read = READERS[file]
    folder, canary = tmp_path / "folder", tmp_path / "canary"
    folder.mkdir()
    make(folder)
    (folder / "latest").unlink(missing_ok=True)
    (folder / file).write_bytes(payload(canary) + b"\n")
    with pytest.raises(MegagrowError) as raised:
        read(folder)
    assert Path(file).name in str(raised.value) and "\n" not in str(raised.value)
    assert not canary.exists()


HF_FILES = [
    "config.json",
    "model.safetensors",
    "pytorch_model.bin",
    "training_args.bin",
    "model.safetensors.index.json",
]


@pytest.mark.parametrize("payload", PAYLOADS, ids=lambda payload: payload.__name__)
def test_a_payload_in_a_hugging_face_folder_never_runs(tmp_path: Path, payload: Callable[[Path], bytes]) -> None:
    """In files that are read it is refused; those that torch would unpickle are not even opened."""
    whole, canary = save_folder(tmp_path / "hf", "llama"), tmp_path / "canary"
    for name in HF_FILES:
        kept = (whole / name).read_bytes() if (whole / name).exists() else None
        (whole / name).write_bytes(payload(canary))
        if name in ("config.json", "model.safetensors"):
            with pytest.raises(MegagrowError, match=name):
                fetch_all(whole)
        else:
            fetch_all(whole)
        assert not canary.exists()
        (whole / name).unlink() if kept is None else (whole / name).write_bytes(kept)


def test_weights_that_only_a_pickle_holds_are_refused(tmp_path: Path) -> None:
    folder, canary = save_folder(tmp_path / "hf", "llama"), tmp_path / "canary"
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(archived(canary))
    with pytest.raises(MegagrowError, match=r"holds neither model\.safetensors nor"):
        open_source(folder)
    assert not canary.exists()


def test_code_beside_a_model_is_not_imported(tmp_path: Path) -> None:
    """auto_map and trust_remote_code name code in the folder; tokenizer_config.json may too."""
    folder, canary = save_folder(tmp_path / "hf", "llama"), tmp_path / "canary"
    save_tokenizer(folder)
    (folder / "modeling_evil.py").write_text(f"import os\nos.mkdir({str(canary)!r})\n")
    entries = json.loads((folder / "config.json").read_text())
    entries |= {"auto_map": {"AutoModelForCausalLM": "modeling_evil.Model"}, "trust_remote_code": True}
    (folder / "config.json").write_text(json.dumps(entries))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["modeling_evil.Tokenizer", None]}, "tokenizer_class": "Tokenizer"})
    )
    open_source(folder).fetch("embedding.tokens")
    load_tokenizer(folder).encode("grow")
    assert not canary.exists()


def test_a_payload_within_a_run_s_state_stays_data(tmp_path: Path) -> None:
    """Names that other loaders would import or call are kept as text."""
    canary = tmp_path / "canary"
    state = {"_target_": "os.mkdir", "args": [str(canary)], "text": in_yaml(canary).decode()}
    path = checkpoint.save(
        tmp_path / "run", 1, {"x": torch.ones(2)}, state, config={"_target_": "os.mkdir"}, provenance={"a": "!!python"}
    )
    assert checkpoint.load(path, {"x": torch.zeros(2)}) == state
    assert not canary.exists()


@pytest.mark.parametrize("payload", PAYLOADS, ids=lambda payload: payload.__name__)
def test_a_payload_in_the_place_of_a_journal_starts_preprocessing_anew(
    tmp_path: Path, payload: Callable[[Path], bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    canary, journal = tmp_path / "canary", tmp_path / "out.journal.tmp"
    (tmp_path / "text.jsonl").write_text('{"text": "grow"}\n')
    for name in ("bin", "lengths"):
        (tmp_path / f"out.{name}.tmp").touch()
    journal.write_bytes(payload(canary))
    assert preprocess_files([tmp_path / "text.jsonl"], "byte", tmp_path / "out").num_documents == 1
    assert "starts anew" in capsys.readouterr().err
    assert not canary.exists() and not journal.exists()


def test_compressed_records_stay_text(tmp_path: Path) -> None:
    canary, file = tmp_path / "canary", tmp_path / "text.jsonl.gz"
    file.write_bytes(gzip.compress(pickled(canary) + b"\n"))
    with pytest.raises(MegagrowError, match=r"text\.jsonl\.gz"):
        list(read_texts([file]))
    assert not canary.exists()


def test_the_payloads_would_run(tmp_path: Path) -> None:
    """Each makes its canary where it is loaded the unsafe way, so that its absence means something."""
    unsafe = {
        pickled: pickle.loads,
        archived: lambda raw: torch.load(tmp_path / "archived.pt", weights_only=False),
        in_yaml: lambda raw: yaml.unsafe_load(raw),
    }
    for payload, load in unsafe.items():
        canary = tmp_path / payload.__name__
        load(payload(canary))
        assert canary.is_dir()
