"""Tests megagrow/report/selection.py: what a reader is shown of the data that stage 1 was trained on."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megagrow.config import Config, DataConfig, SaltConfig
from megagrow.config_file import dump
from megagrow.data.domains import Domains, domains_path, write_domains
from megagrow.data.preprocess import write_texts
from megagrow.data.tokenizer import ByteTokenizer
from megagrow.ledger import Ledger
from megagrow.report.examples import MAX_CHARACTERS, example_text, visible
from megagrow.report.run import load_run
from megagrow.report.selection import NUM_BINS, histogram, selection_of
from megagrow.report.selection_text import histogram_lines, selection_words
from megagrow.salt.score_files import DTYPES, Cost, identity_of, write_scores
from tests.salt.samples import opened

LENGTH = 8
TEXTS = ["plain text, so", "<b>bold</b> `x`", "\x1b[2Jgone\u202e", "# title\n\n- item", "last words here"]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Documents that no page and no terminal should obey; the last one is of another domain."""
    prefix = tmp_path / "corpus"
    write_texts(TEXTS, ByteTokenizer(), prefix, split="train", source="test")
    names = ("web", "a|b*c")
    write_domains(prefix, Domains(names, np.array([0, 0, 0, 0, 1], np.int32)))
    return prefix


def make_run(folder: Path, corpus: Path, **changes: Any) -> Path:
    """A run that kept the samples with the highest scores; sample i scores i."""
    dataset = opened(corpus, LENGTH)
    arrays = {name: np.full(dataset.num_samples, 1, dtype) for name, dtype in DTYPES.items()}
    arrays["median_zero"] = np.arange(dataset.num_samples, dtype=np.float32)
    if not (folder / "scores").exists():
        write_scores(folder / "scores", arrays, identity_of(dataset, "small", 10, "float32"), Cost(1.0, None, 1))
    salt = SaltConfig(steps=2, scores=str(folder / "scores"), keep_fraction=0.5)
    config = Config(
        data=DataConfig(train=str(corpus), tokenizer="byte", seq_length=LENGTH),
        salt=dataclasses.replace(salt, **changes),
    )
    (folder / "run").mkdir(exist_ok=True)
    (folder / "run/config.json").write_text(dump(config))
    Ledger().save(folder / "run/ledger.json")
    return folder / "run"


def shown(path: Path) -> tuple[dict[str, Any], str]:
    selection = selection_of(load_run(path))
    assert selection is not None
    return json.loads(json.dumps(selection, allow_nan=False)), selection_words({"run": selection})


def test_the_histogram_shows_what_is_kept(tmp_path: Path, corpus: Path) -> None:
    selection, text = shown(make_run(tmp_path, corpus))
    count = opened(corpus, LENGTH).num_samples
    assert (selection["samples"], selection["kept"]) == (count, round(count / 2))
    assert selection["cut"] == [count - round(count / 2), count - 1]
    bins = selection["histogram"]
    assert len(bins["edges"]) == NUM_BINS + 1 and bins["edges"][0] == 0 and bins["edges"][-1] == count - 1
    assert sum(bins["all"]) == count and sum(bins["kept"]) == round(count / 2)
    assert bins["kept"][-1] == bins["all"][-1] and bins["kept"][0] == 0
    assert f"{round(count / 2)} of {count} samples: the 0.5 of the samples with the highest scores" in text


def test_examples_are_the_highest_the_middle_and_the_lowest(tmp_path: Path, corpus: Path) -> None:
    selection, _ = shown(make_run(tmp_path, corpus))
    dataset = opened(corpus, LENGTH)
    last, found = dataset.num_samples - 1, selection["examples"]
    assert [example["kind"] for example in found] == ["highest"] * 2 + ["middle"] * 2 + ["lowest"] * 2
    samples = [example["sample"] for example in found]
    assert samples[:2] == [last, last - 1] and samples[-2:] == [1, 0] and abs(samples[2] - last / 2) <= 1
    for example in found:
        assert example["score"] == example["sample"] and example["kept"] == (example["sample"] > last / 2)
        ids = dataset.sample(example["sample"])[:-1].tolist()
        assert example["text"] == visible(ByteTokenizer().decode(ids))


def test_nothing_in_an_example_is_markup_or_a_command(tmp_path: Path, corpus: Path) -> None:
    """Every line of text is indented, as code is; control characters are spelled out, and names are escaped."""
    selection, text = shown(make_run(tmp_path, corpus, domains=str(domains_path(corpus))))
    assert all(c.isprintable() or c == "\n" for c in text) and "a\\|b\\*c" in text
    lines = ["<b>bold</b>", "# title", "- item", "```", "![](x)"]
    selection["examples"][0]["text"] = "\n".join(lines)
    found = selection_words({"run": selection}).splitlines()
    start = found.index(f"    {lines[0]}")
    assert found[start - 1] == found[start + len(lines)] == "", "a block of its own"
    assert found[start : start + len(lines)] == [f"    {line}" for line in lines]
    assert not set(found) & set(lines)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("two\nlines", "two\nlines"),
        ("tab\there", "tab\\there"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("\u202eright to left", "\\u202eright to left"),
        ("zero\u200bwidth", "zero\\u200bwidth"),
        ("\r\x85\u2028", "\\r\\x85\\u2028"),
        ("Grüße, 世界", "Grüße, 世界"),
    ],
)
def test_what_cannot_be_seen_is_spelled_out(text: str, expected: str) -> None:
    assert visible(text) == expected


def test_long_examples_are_cut(tmp_path: Path) -> None:
    write_texts(["x" * 5000], ByteTokenizer(), tmp_path / "long", split="train", source="test")
    dataset = opened(tmp_path / "long", 1000)
    assert example_text(dataset, ByteTokenizer(), 0) == "x" * MAX_CHARACTERS + " …"


def test_domains_are_shown_apart(tmp_path: Path, corpus: Path) -> None:
    selection, text = shown(make_run(tmp_path, corpus, domains=str(domains_path(corpus)), quotas=("web=0.25",)))
    web, other = selection["domains"]
    assert web["samples"] + other["samples"] == selection["samples"]
    assert web["kept"] == round(web["samples"] / 4) and other["kept"] == max(1, round(other["samples"] / 2))
    assert sum(web["histogram"]["kept"]) == web["kept"]
    assert web["least_kept"] == web["samples"] - web["kept"]
    assert {example["domain"] for example in selection["examples"]} == {"web", "a|b*c"}
    assert f"| web | {web['samples']} | {web['kept']} |" in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"keep": "threshold", "threshold": 2.0}, "samples that score at least 2,"),
        ({"keep": "band"}, "samples between the quantiles 0.25 and 0.75 of the score,"),
    ],
)
def test_the_rule_is_told(tmp_path: Path, corpus: Path, changes: dict[str, Any], words: str) -> None:
    assert words in shown(make_run(tmp_path, corpus, **changes))[1]


def test_an_online_selection_is_told_in_a_line(tmp_path: Path, corpus: Path) -> None:
    run = make_run(tmp_path, corpus, scores="", teacher="small", online_buffer=8, keep_fraction=0.25)
    selection, text = shown(run)
    assert selection["histogram"] is None and "of every 8 batches that the teacher scored" in text


def test_without_the_data_the_histogram_is_left(tmp_path: Path, corpus: Path) -> None:
    run = make_run(tmp_path, corpus)
    Path(f"{corpus}.bin").unlink()
    selection, text = shown(run)
    assert selection["examples"] == [] and selection["kept"] is None and selection["histogram"]["kept"] is None
    assert sum(selection["histogram"]["all"]) == selection["samples"]
    assert "what was kept is not known any more: " in text and "corpus.bin: no such file" in text.replace("\\", "")


def test_without_the_scores_a_line_says_so(tmp_path: Path, corpus: Path) -> None:
    selection, text = shown(make_run(tmp_path, corpus, scores=str(tmp_path / "gone")))
    assert selection["histogram"] is None and len(selection["notes"]) == 2
    assert "no histogram: " in text


@pytest.mark.parametrize(
    ("tokenizer", "words"),
    [("gone.model", "gone.model: the tokenizer is not there any more"), ("", "the run names no tokenizer")],
)
def test_without_the_tokenizer_a_line_says_so(tmp_path: Path, corpus: Path, tokenizer: str, words: str) -> None:
    run = make_run(tmp_path, corpus)
    Path(f"{corpus}.json").unlink()  # which says that it was made of bytes
    config = json.loads((run / "config.json").read_text())
    config["data"]["tokenizer"] = tokenizer
    (run / "config.json").write_text(json.dumps(config))
    selection, _ = shown(run)
    assert selection["examples"] == [] and selection["histogram"]["kept"] is not None
    assert selection["notes"] == [f"no examples: {selection['notes'][0].removeprefix('no examples: ')}"]
    assert words in selection["notes"][0]


def test_a_run_that_took_all_data_has_no_section(tmp_path: Path, corpus: Path) -> None:
    assert selection_of(load_run(make_run(tmp_path, corpus, scores="", steps=0))) is None
    assert selection_words({}) == ""


def test_bars_are_as_long_as_their_bins_are_full() -> None:
    values = np.array([0.0] * 8 + [1.0] * 4, np.float32)
    lines = histogram_lines(histogram(values, values > 0))
    assert len(lines) == NUM_BINS
    assert lines[0].split() == ["0.0000", "." * 40, "8,", "0", "kept"]
    assert lines[-1].split() == ["0.9375", "#" * 20, "4,", "4", "kept"]


def test_scores_a_last_bit_apart_have_a_histogram() -> None:
    values = np.array([3.1415925, 3.1415927, 3.1415927], np.float32)
    found = histogram(values, values > values[0])
    assert sum(found["all"]) == 3 and sum(found["kept"]) == 2
