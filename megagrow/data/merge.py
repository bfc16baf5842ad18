"""Several token files as one."""

from collections.abc import Sequence
from pathlib import Path

from megagrow.data.description import Description
from megagrow.data.domains import encode_domains, joined_domains
from megagrow.data.indexed import IndexedDataset, IndexedWriter
from megagrow.data.output import check_output, files_of
from megagrow.errors import DataError


def merge_datasets(prefixes: Sequence[str | Path], output_prefix: str | Path) -> IndexedDataset:
    """Writes the documents of `prefixes`, in that order, to OUTPUT_PREFIX.bin/.idx, and .json if all have one.

    Token bytes are copied; sequences and documents stay what they are. The output appears whole or not at all. Beside
    it stands which domain each document is of (see `domains`): its own, or the dataset that it comes from.

    Returns:
        The merged dataset.

    Raises:
        DataError: a malformed input, the output among the inputs, inputs of different dtypes or tokenizers, or a file
            that the output would replace although it is of another kind (see `output`).
        ConfigError: the output would replace a file of an input.
    """
    if str(Path(output_prefix).resolve()) in {str(Path(prefix).resolve()) for prefix in prefixes}:
        raise DataError(f"{output_prefix} is an input too; write the merged dataset under another name")
    check_output(output_prefix, [path for prefix in prefixes for path in files_of(prefix)])
    datasets = [IndexedDataset(prefix) for prefix in prefixes]
    description, domains = _merged_description(datasets), joined_domains(datasets)
    with IndexedWriter(output_prefix, datasets[0].dtype) as writer:
        for dataset in datasets:
            writer.add_dataset(dataset)
        writer.close(description, domains=encode_domains(domains))
    return IndexedDataset(output_prefix)


def _merged_description(datasets: Sequence[IndexedDataset]) -> Description | None:
    """What holds for all; None when some have no description (another program wrote them)."""
    given = [dataset.description for dataset in datasets if dataset.description is not None]
    for name in ("tokenizer_sha256", "eod_id", "split"):
        values = {description[name] for description in given}
        if len(values) > 1:
            raise DataError(
                f"{', '.join(dataset.prefix for dataset in datasets)}: {name} differs ({sorted(map(str, values))}); "
                "merge only what was made with one tokenizer for one purpose"
            )
    if not given or len(given) < len(datasets):
        return None
    merged: Description = {
        **given[0],
        "num_documents": sum(dataset.num_documents for dataset in datasets),
        "num_tokens": sum(dataset.num_tokens for dataset in datasets),
        "source": ", ".join(description["source"] for description in given),
    }
    merged.pop("source_settings", None)  # each part has its own
    return merged
