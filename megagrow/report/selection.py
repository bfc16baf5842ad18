"""What stage 1 of a run was trained on: how scores are distributed, where the cut lies, and samples to judge it by."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megagrow.config import SaltConfig
from megagrow.data.blend import parse_blend
from megagrow.data.dataset import PackedDataset
from megagrow.errors import MegagrowError
from megagrow.report.examples import example_text, tokenizer_of
from megagrow.report.run import Json, Run
from megagrow.salt.score_files import read_scores
from megagrow.salt.select import EXCESS, Selection, Values, make_selection, sample_values

NUM_BINS = 16
NUM_EXAMPLES = 2  # of each kind


def selection_of(run: Run) -> Json | None:
    """How stage 1 of a run picked its data; None where it took all.

    Returns:
        {"score", "rule", "samples", "kept", "cut", "histogram", "domains", "examples", "notes"}: `cut` holds the
        least and the greatest score that is kept. What cannot be read any more is None or empty, and a line of the
        notes says why.
    """
    salt = run.config.salt
    if not salt.picks_data:
        return None
    found: Json = {"score": salt.score, "rule": rule_in_words(salt), "samples": None, "kept": None}
    found |= {"cut": None, "histogram": None, "domains": [], "examples": [], "notes": []}
    if not salt.scores:
        return found
    try:
        dataset = PackedDataset(parse_blend(run.config.data.train).prefixes[0], run.config.data.seq_length)
        selection = make_selection(salt, dataset)
    except MegagrowError as error:
        found["notes"].append(f"what was kept is not known any more: {error}")
        return found | _without_data(salt, found["notes"])
    is_kept = np.zeros(len(selection.values), np.bool_)
    is_kept[selection.ids] = True
    kept = selection.values[selection.ids]
    found |= {"samples": len(is_kept), "kept": len(kept), "cut": [float(kept.min()), float(kept.max())]}
    found["histogram"] = histogram(selection.values, is_kept)
    found["domains"] = list(_domains(selection, is_kept))
    try:
        found["examples"] = list(_examples(run, selection, is_kept, dataset))
    except MegagrowError as error:
        found["notes"].append(f"no examples: {error}")
    return found


def rule_in_words(salt: SaltConfig) -> str:
    """What is kept, by the run's settings."""
    if salt.online_buffer:
        return (
            f"of every {salt.online_buffer} batches that the teacher scored, the samples with the highest scores: "
            f"{salt.kept_batches} batches"
        )
    words = {
        "top": f"the {salt.keep_fraction:.4g} of the samples with the highest scores",
        "threshold": f"samples that score at least {salt.threshold:g}",
        "band": f"samples between the quantiles {salt.band_low:g} and {salt.band_high:g} of the score",
    }[salt.keep]
    return words + (", of each domain by itself" if salt.domains and salt.keep != "threshold" else "")


def histogram(values: Values, is_kept: NDArray[np.bool_] | None) -> Json:
    """{"edges": [bins + 1], "all": [bins], "kept": [bins] or None}."""
    values = values.astype(np.float64)  # a range of a few last bits has no 30 float32 edges
    edges = np.histogram_bin_edges(values, NUM_BINS)
    kept = None if is_kept is None else np.histogram(values[is_kept], edges)[0].tolist()
    return {"edges": edges.tolist(), "all": np.histogram(values, edges)[0].tolist(), "kept": kept}


def _without_data(salt: SaltConfig, notes: list[str]) -> Json:
    """The histogram from the scores alone."""
    try:
        scores = read_scores(Path(salt.scores), None)
        reference = read_scores(Path(salt.reference_scores), None) if salt.score == EXCESS else None
        values = sample_values(scores, salt.score, reference)
    except MegagrowError as error:
        notes.append(f"no histogram: {error}")
        return {}
    return {"samples": len(values), "histogram": histogram(values, None)}


def _domains(selection: Selection, is_kept: NDArray[np.bool_]) -> Iterator[Json]:
    domains = selection.domains
    if domains is None:
        return
    for number, name in enumerate(domains.names):
        is_own = domains.ids == number
        values, kept = selection.values[is_own], selection.values[is_own & is_kept]
        yield {
            "name": name,
            "samples": len(values),
            "kept": len(kept),
            "median": float(np.median(values)) if len(values) else None,
            "least_kept": float(kept.min()) if len(kept) else None,
            "histogram": histogram(values, is_kept[is_own]) if len(values) else None,
        }


def _examples(run: Run, selection: Selection, is_kept: NDArray[np.bool_], dataset: PackedDataset) -> Iterator[Json]:
    """The samples with the highest scores, those in the middle, and those with the lowest."""
    tokenizer = tokenizer_of(dataset, run.config.data.tokenizer)
    falling = np.argsort(-selection.values, kind="stable")
    middle = max((len(falling) - NUM_EXAMPLES) // 2, 0)
    kinds = {
        "highest": falling[:NUM_EXAMPLES],
        "middle": falling[middle : middle + NUM_EXAMPLES],
        "lowest": falling[-NUM_EXAMPLES:],
    }
    for kind, samples in kinds.items():
        for sample in samples.tolist():
            yield {
                "kind": kind,
                "sample": sample,
                "score": float(selection.values[sample]),
                "kept": bool(is_kept[sample]),
                "domain": _domain_name(selection, sample),
                "text": example_text(dataset, tokenizer, sample),
            }


def _domain_name(selection: Selection, sample: int) -> Any:
    return None if selection.domains is None else selection.domains.names[selection.domains.ids[sample]]
