"""What a user can get wrong: each gives one readable line and its exit code, and leaves nothing half-written behind."""

import dataclasses
import shutil
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from megagrow.__main__ import main
from megagrow.config import Config, DataConfig, GrowthConfig, InitConfig, ModelConfig, ParallelConfig, SaltConfig
from megagrow.config_file import dump
from megagrow.data.description import Description, description_path, encode_description
from megagrow.data.indexed import IndexedDataset, IndexedWriter
from megagrow.errors import ConfigError
from megagrow.train import run
from tests.train.runs import LARGE, SMALL, make_config


@pytest.fixture(scope="module")
def untrained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("untrained")
    assert run(make_config(corpus, directory, steps=1)) == 0
    return directory


def expect(config: Config, code: int, words: list[str], capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The command ends with the code, one line on standard error that holds the words, and no half-written file."""
    directory = Path(config.run.dir)
    file = tmp_path / "run.json"
    file.write_text(dump(config))
    capfd.readouterr()
    assert main([str(file)]) == code
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("megagrow: error:")]
    assert len(lines) == 1, lines
    assert all(word in lines[0] for word in words), lines[0]
    left = {path.name for path in directory.rglob("*") if path.is_file()} if directory.exists() else set()
    assert left <= {"exit.json"}, left


def change_data(config: Config, **fields: str) -> Config:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **fields))


def test_missing_token_file(corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = change_data(make_config(corpus, tmp_path / "run"), train=str(tmp_path / "nowhere"))
    expect(config, 3, ["nowhere"], capfd, tmp_path)


def test_no_token_file_named(corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    expect(change_data(make_config(corpus, tmp_path / "run"), train=""), 2, ["data.train is empty"], capfd, tmp_path)


def test_empty_corpus(corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with IndexedWriter(tmp_path / "short", np.uint16) as writer:
        writer.add_document(np.arange(3))
        writer.close()
    config = change_data(make_config(corpus, tmp_path / "run"), train=str(tmp_path / "short"))
    expect(config, 3, ["short"], capfd, tmp_path)


def test_tokens_beyond_the_vocabulary(corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with IndexedWriter(tmp_path / "wide", np.uint16) as writer:
        writer.add_document(np.arange(1000)[::-1])
        writer.close()
    config = change_data(make_config(corpus, tmp_path / "run"), train=str(tmp_path / "wide"))
    expect(config, 3, ["wide", "256"], capfd, tmp_path)


def test_tensor_axis_that_does_not_divide_the_heads(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    config = make_config(corpus, tmp_path / "run", parallel=ParallelConfig(tensor=3))
    expect(config, 2, ["tensor=3 does not divide num_heads=2", "use 1 or 2"], capfd, tmp_path)


def test_ranks_that_do_not_fill_the_mesh(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    config = make_config(corpus, tmp_path / "run", parallel=ParallelConfig(tensor=2))
    expect(config, 2, ["does not divide the 3 launched ranks"], capfd, tmp_path)


def test_checkpoint_of_another_model(
    corpus: Path, trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = make_config(corpus, tmp_path / "run", model=LARGE, init=InitConfig(from_=str(trained)))
    expect(config, 4, ["another model", "hidden_size=16 there, 32 here", "growth.method"], capfd, tmp_path)


def test_run_directory_of_another_model(corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = make_config(corpus, tmp_path / "run", steps=2)
    assert run(config) == 0
    capfd.readouterr()
    assert run(dataclasses.replace(config, model=LARGE)) == 4
    assert "model.hidden_size was 16 there and is 32 now" in capfd.readouterr().err
    assert run(config) == 0, "the refused run has harmed the finished one"


def grow_from(source: Path, corpus: Path, directory: Path, target: ModelConfig) -> Config:
    return make_config(
        corpus, directory, model=target, init=InitConfig(from_=str(source)), growth=GrowthConfig(method="clone")
    )


def test_target_smaller_than_source(
    corpus: Path, trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    target = dataclasses.replace(SMALL, hidden_size=8, head_dim=8)
    expect(grow_from(trained, corpus, tmp_path / "run", target), 2, ["hidden_size=8 is smaller", "16"], capfd, tmp_path)


def test_source_and_target_of_different_families(
    corpus: Path, trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    target = dataclasses.replace(
        LARGE,
        family="gpt2",
        norm="layer_norm",
        positions="learned",
        activation="gelu",
        attention_bias="all",
        mlp_bias=True,
        tied_embeddings=True,
    )
    expect(grow_from(trained, corpus, tmp_path / "run", target), 2, ["family=llama", "gpt2"], capfd, tmp_path)


def test_source_that_does_not_fit_the_data(
    corpus: Path, untrained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = make_config(corpus, tmp_path / "run", init=InitConfig(from_=str(untrained)))
    expect(config, 3, ["do not fit", "--init.skip-source-check true"], capfd, tmp_path)
    init = InitConfig(from_=str(untrained), skip_source_check=True)
    assert run(make_config(corpus, tmp_path / "anyway", steps=1, init=init)) == 0


def test_missing_source(corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = make_config(corpus, tmp_path / "run", init=InitConfig(from_=str(tmp_path / "nothing")))
    expect(config, 4, ["nothing", "no such folder"], capfd, tmp_path)


def test_missing_scores(corpus: Path, trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    salt = SaltConfig(teacher=str(trained), steps=1, scores=str(tmp_path / "scores"))
    expect(make_config(corpus, tmp_path / "run", salt=salt), 3, ["scores", "score_corpus.py"], capfd, tmp_path)


def test_teacher_of_another_vocabulary(
    corpus: Path, trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = dataclasses.replace(SMALL, vocab_size=300)
    config = make_config(corpus, tmp_path / "run", model=model, salt=SaltConfig(teacher=str(trained), steps=1))
    expect(config, 2, ["vocab_size=256", "vocab_size=300"], capfd, tmp_path)


@pytest.mark.parametrize("tokenizer", ["absent", "byte", ""])
def test_data_of_another_tokenizer(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], tokenizer: str
) -> None:
    """Its ids are in range, so the loss would not tell."""
    shutil.copytree(corpus, tmp_path / "corpus")
    for part, kind in (("train", "a"), ("validation", "b")):
        dataset = IndexedDataset(tmp_path / "corpus" / part)
        facts = {"num_documents": dataset.num_documents, "num_tokens": dataset.num_tokens, "vocab_size": 256}
        facts |= {"tokenizer": "byte", "tokenizer_sha256": kind * 64, "eod_id": None, "split": part, "source": "test"}
        description_path(dataset.prefix).write_bytes(encode_description(cast(Description, facts)))
    config = make_config(tmp_path / "corpus", tmp_path / "run")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=tokenizer))
    words = ["absent: no such tokenizer"] if tokenizer == "absent" else ["was made with another tokenizer than"]
    expect(config, 3, words, capfd, tmp_path)


def test_unusable_run_directory(corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    expect(make_config(corpus, tmp_path / "file" / "run"), 2, ["cannot be used", "--run.dir"], capfd, tmp_path)


def test_unknown_option(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["quickstart_small", "--optim.lrr", "1"]) == 2
    expected = "megagrow: error: command line: unknown option --optim.lrr; did you mean optim.lr?\n"
    assert capfd.readouterr().err == expected


def test_data_config_is_checked_before_anything_is_built() -> None:
    with pytest.raises(ConfigError, match="data.seq_length=0"):
        DataConfig(seq_length=0)
