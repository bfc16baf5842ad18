"""Every field of a manifest is checked, and the message names file and field."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megagrow.checkpoint.format import FileEntry, Item, Manifest, TensorEntry
from megagrow.errors import CheckpointError

WHERE = Path("run/step-3/manifest.json")
DIGEST = "0123456789abcdef" * 4


def manifest() -> Manifest:
    """Two tensors; `w` in two boxes, of which the second lies in another file."""
    return Manifest(
        step=3,
        layout={"world_size": 2, "axes": {"tp": 2}},
        config={"hidden_size": 4},
        provenance={},
        state={"lr": 0.1},
        tensors={"w": TensorEntry("float32", (4, 2)), "n": TensorEntry("int64", ())},
        files={
            "__0_0.distcp": FileEntry(40, None),
            "__1_0.distcp": FileEntry(16, None),
            ".metadata": FileEntry(9, DIGEST),
        },
        items=(
            Item("w", (0, 0), (2, 2), "__0_0.distcp", 0, 20, DIGEST),
            Item("n", (), (), "__0_0.distcp", 20, 20, DIGEST),
            Item("w", (2, 0), (2, 2), "__1_0.distcp", 0, 16, DIGEST),
        ),
    )


def changed(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Sets (or with `...` removes) the field at a path such as `items/0/file`."""

    def change(record: Any) -> None:
        *parents, last = (int(key) if key.isdigit() else key for key in path.split("/"))
        for key in parents:
            record = record[key]
        if value is ...:
            del record[last]
        else:
            record[last] = value

    return change


REFUSED = [
    ("format_version", 1, "format_version is 1, .* model.bias.* this megagrow reads 2; convert it to a Hugging Face"),
    ("format_version", 3, "format_version is 3; this megagrow reads 2; use the megagrow that wrote it"),
    ("format_version", True, "format_version is of type bool"),
    ("step", ..., "step is missing"),
    ("step", "3", "step is of type str, must be int"),
    ("step", -1, "step is not between"),
    ("step", 1e300, "step is of type float"),
    ("step", 2**63, "step is not between"),
    ("config", [], "config is of type list"),
    ("state", None, "state is of type NoneType"),
    ("layout", 1, "layout is of type int"),
    ("provenance", ..., "provenance is missing"),
    ("tensors", [], "tensors is of type list"),
    ("tensors/w", 5, "tensors.'w' is of type int"),
    ("tensors/w/dtype", "complex64", "tensors.'w': dtype is 'complex64'"),
    ("tensors/w/dtype", "float64", r"items\[\d\] has fewer bytes than its numbers need"),
    ("tensors/w/shape", [4, 2.0], "tensors.'w': shape holds a float"),
    ("tensors/w/shape", [4, -2], "tensors.'w': shape is not between"),
    ("tensors/w/shape", [0, 2], "tensors.'w': shape is .*without elements"),
    ("tensors/w/shape", [1] * 100, "tensors.'w': shape has 100 entries"),
    ("tensors/w/shape", [5, 2], "tensors.'w' is not covered"),
    ("tensors/w/shape", [4], r"items\[0\] has another number of dims"),
    ("tensors/x", {"dtype": "float32", "shape": [1]}, "tensors.'x' is not covered"),
    ("files/__0_0.distcp/num_bytes", -40, "num_bytes is not between"),
    ("files/__0_0.distcp/num_bytes", 41, "files.'__0_0.distcp' has neither"),
    ("files/__0_0.distcp/num_bytes", 39, r"items\[1\] reaches beyond its file"),
    ("files/.metadata/sha256", None, "files.'.metadata' has neither"),
    ("files/.metadata/sha256", DIGEST[:-1], "sha256 is no sha256"),
    ("files/.metadata/sha256", DIGEST.upper(), "sha256 is no sha256"),
    ("items", {}, "items is of type dict"),
    ("items/0", [], r"items\[0\] is of type list"),
    ("items/0/tensor", "v", r"items\[0\] belongs to tensor 'v'"),
    ("items/0/file", "elsewhere", r"items\[0\] lies in file 'elsewhere'"),
    ("items/0/offsets", [0], r"items\[0\] has another number of dims"),
    ("items/0/offsets", [3, 0], r"items\[0\] is empty or reaches beyond its tensor"),
    ("items/0/sizes", [0, 2], r"items\[0\] is empty or reaches beyond its tensor"),
    ("items/0/sizes", [1, 2], "tensors.'w' is not covered"),
    ("items/0/start", 1, "files.'__0_0.distcp' has neither"),
    ("items/0/start", 2**62, r"items\[0\] reaches beyond its file"),
    ("items/0/num_bytes", 15, r"items\[0\] has fewer bytes"),
    ("items/0/sha256", 7, r"items\[0\]: sha256 is of type int"),
    ("items/2/offsets", [0, 0], "tensors.'w' has items that overlap"),
    ("items/2", ..., "tensors.'w' is not covered"),
]


def test_a_manifest_comes_back_as_it_was() -> None:
    assert Manifest.parse(manifest().to_bytes(), WHERE) == manifest()


@pytest.mark.parametrize(("path", "value", "message"), REFUSED)
def test_a_bad_field_is_named(path: str, value: Any, message: str) -> None:
    record = json.loads(manifest().to_bytes())
    changed(path, value)(record)
    with pytest.raises(CheckpointError, match=message) as raised:
        Manifest.parse(json.dumps(record).encode(), WHERE)
    assert str(raised.value).startswith(f"{WHERE}: ")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["../x", "a/b", "..", ".", "", "/etc/x", "a\\b", "a\nb", "é", "a" * 256])
def test_a_file_outside_the_directory_is_refused(name: str) -> None:
    files = manifest().files | {name: FileEntry(1, DIGEST)}
    with pytest.raises(CheckpointError, match="a file name has letters"):
        Manifest.parse(replace(manifest(), files=files).to_bytes(), WHERE)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"null",
        b"{",
        b'{"step": NaN}',
        b"[" * 100_000,
        b'{"step": ' + b"9" * 5000 + b"}",
    ],
)
def test_what_is_no_json_object_is_refused(raw: bytes) -> None:
    with pytest.raises(CheckpointError, match=rf"{WHERE}: "):
        Manifest.parse(raw, WHERE)


def boxes(*places: tuple[list[int], list[int]]) -> bytes:
    """A manifest in which a tensor [4, 4] is stored in boxes of these offsets and sizes."""
    record = json.loads(manifest().to_bytes())
    start = 0
    record["tensors"], record["items"] = {"w": {"dtype": "uint8", "shape": [4, 4]}}, []
    for offsets, sizes in places:
        size = math.prod(sizes)
        item = {"tensor": "w", "offsets": offsets, "sizes": sizes, "start": start, "num_bytes": size}
        record["items"].append({**item, "file": "__0_0.distcp", "sha256": DIGEST})
        start += size
    record["files"] = {"__0_0.distcp": {"num_bytes": start, "sha256": None}}
    return json.dumps(record).encode()


def test_boxes_that_overlap_and_leave_a_gap_as_large_are_refused() -> None:
    left, right, below = ([0, 0], [2, 2]), ([0, 2], [2, 2]), ([2, 0], [2, 4])
    assert len(Manifest.parse(boxes(left, right, below), WHERE).items) == 3
    for wrong in (
        (left, ([0, 1], [2, 2]), below),
        (left, right, ([1, 0], [2, 4])),
        (below, ([1, 1], [2, 2]), right),
        (([0, 0], [3, 2]), ([2, 0], [1, 2]), ([0, 2], [4, 2])),
    ):
        with pytest.raises(CheckpointError, match="tensors.'w' has items that overlap"):
            Manifest.parse(boxes(*wrong), WHERE)
    with pytest.raises(CheckpointError, match="tensors.'w' is not covered"):
        Manifest.parse(boxes(left, right), WHERE)


def test_a_key_that_stands_twice_is_refused() -> None:
    raw = manifest().to_bytes().replace(b'"lr": 0.1', b'"lr": 0.1, "lr": 0.2')
    with pytest.raises(CheckpointError, match="key .lr. stands twice"):
        Manifest.parse(raw, WHERE)
