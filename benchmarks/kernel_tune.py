"""Other blocks and warps than the pinned ones: half and twice as many of each, timed at the sizes of training."""

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kernel_cases import Case
from kernel_measure import DEVICE, Timer

from megagrow_kernels.launch import ANY, PINNED, Launch, device_name, pick

WHOLE_ROWS = ("norm_fwd", "norm_bwd")  # whose table has an entry for each width
BETTER = 0.99  # of the pinned one's time: less of a gain is noise
BLOCK_ROWS = {"dense_map": 64, "layer_mix_bwd": 64}  # of products: what a program holds is a block of the result
MOST_WARPS, ELEMENTS_PER_THREAD = 32, range(2, 129)


@dataclass(frozen=True)
class Tuning:
    """A name of the launch table, and all cases and passes that its entry for so many columns serves."""

    launch: str
    columns: int
    passes: tuple[tuple[Case, int], ...]

    @property
    def name(self) -> str:
        return f"{self.launch} {self.columns}" if self.launch in WHOLE_ROWS else self.launch


def tunings(cases: Iterable[Case]) -> list[Tuning]:
    """One for each entry that these cases launch by; where blocks tile the columns, wide rows share theirs."""
    found: dict[tuple[str, int], list[tuple[Case, int]]] = {}
    for case in cases:
        for i, launch in enumerate(case.launches if case.providers else ()):
            found.setdefault((launch, case.columns if launch in WHOLE_ROWS else 0), []).append((case, i))
    return [Tuning(name, max(case.columns for case, _ in each), tuple(each)) for (name, _), each in found.items()]


def candidates(tuning: Tuning) -> Iterator[Launch]:
    """The pinned one first, then its neighbours that can serve."""
    pinned = pick(tuning.launch, tuning.columns, DEVICE)
    power_of_two = 1 << (tuning.columns - 1).bit_length()
    must_hold = tuning.launch in WHOLE_ROWS and power_of_two <= ANY[tuning.launch][-1].block
    for block in (pinned.block, pinned.block // 2, pinned.block * 2):
        for num_warps in (pinned.num_warps, pinned.num_warps // 2, pinned.num_warps * 2):
            entry = Launch(block, num_warps)
            elements = block * BLOCK_ROWS.get(tuning.launch, 1)
            threads_fit = 1 <= num_warps <= MOST_WARPS and elements // (32 * num_warps) in ELEMENTS_PER_THREAD
            block_fits = block == power_of_two if must_hold else block <= power_of_two
            if entry == pinned or (threads_fit and block_fits):
                yield entry


def tune(
    tuning: Tuning, timer: Timer, check: Callable[[Case], dict[str, Any]], free: Callable[[], None], most: int | None
) -> dict[str, Any]:
    """The row of a tuning: what `most` candidates take, those that spill registers left out, and the best one."""
    rows = [_timed(tuning, entry, timer, free) for entry in list(candidates(tuning))[:most]]
    pinned = rows[0]
    row = {"name": tuning.name, "launch": tuning.launch, "columns": tuning.columns, "candidates": rows}
    if "failed" in pinned:
        return row | {"failed": pinned["failed"]}
    for each in rows:
        if "failed" not in each:
            ratios = [own / base for own, base in zip(each["seconds"], pinned["seconds"], strict=True)]
            each["to_pinned"] = sum(ratios) / len(ratios)
    able = [each for each in rows if "failed" not in each and not each["spills"]]
    best = min(able, key=lambda each: each["to_pinned"], default=pinned)
    if best["to_pinned"] > BETTER or not _is_right(tuning, Launch(best["block"], best["num_warps"]), check):
        best = pinned
    return row | {"best": {key: best[key] for key in ("block", "num_warps", "to_pinned")}}


def _timed(tuning: Tuning, entry: Launch, timer: Timer, free: Callable[[], None]) -> dict[str, Any]:
    """Seconds of each pass, and the most registers that a kernel compiled for it spills, if that can be told."""
    row: dict[str, Any] = {"block": entry.block, "num_warps": entry.num_warps}
    known = set(_spills())
    try:
        with _pinned(tuning.launch, entry):
            row["seconds"] = list(_seconds(tuning, timer, free))
    except Exception as error:
        return row | {"failed": f"{type(error).__name__}: {error}"[:200]}
    spills = [number for key, number in _spills().items() if key not in known and number is not None]
    return row | {"spills": max(spills, default=None)}


def _seconds(tuning: Tuning, timer: Timer, free: Callable[[], None]) -> Iterator[float]:
    for case, passes in itertools.groupby(tuning.passes, key=lambda each: each[0]):
        free()
        work = case.work("ours")  # anew: AdamW keeps the launch that it was made with
        for _, i in passes:
            run, before = ((work.forward, work.before_forward), (work.backward, work.before_backward))[i]
            assert run is not None
            yield timer(run, before)["median"]


def _is_right(tuning: Tuning, entry: Launch, check: Callable[[Case], dict[str, Any]]) -> bool:
    with _pinned(tuning.launch, entry):
        return all(check(case)["correct"] for case in dict.fromkeys(case for case, _ in tuning.passes))


class _pinned:
    """The only entry for a kernel on this device, for a while."""

    def __init__(self, launch: str, entry: Launch) -> None:
        self.launch, self.entry = launch, entry
        self.table: dict[str, tuple[Launch, ...]] = PINNED.setdefault(device_name(DEVICE), {})

    def __enter__(self) -> None:
        self.earlier = self.table.get(self.launch)
        self.table[self.launch] = (self.entry,)

    def __exit__(self, *_: object) -> None:
        del self.table[self.launch]
        if self.earlier is not None:
            self.table[self.launch] = self.earlier


def _spills() -> dict[int, int | None]:
    """Of every kernel of ours that this process has compiled; Triton keeps them per device, in a place of its own."""
    modules = [module for name, module in sys.modules.items() if name.startswith("megagrow_kernels")]
    functions = [value for module in modules for value in vars(module).values() if hasattr(value, "device_caches")]
    kernels = [
        kernel for function in functions for cache in function.device_caches.values() for kernel in cache[0].values()
    ]
    return {id(kernel): getattr(kernel, "n_spills", None) for kernel in kernels}


def tuning_lines(rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Every candidate in a line: its time as a multiple of the pinned one's."""
    for row in rows:
        for each in row.get("candidates", ()):
            found = each.get("failed") or f"{each['to_pinned']:.3f} of pinned, spills {each['spills']}"
            best = " <- best" if row.get("best", {}) == {key: each.get(key) for key in row.get("best", {"": 0})} else ""
            yield f"{row['name']}: {each['block']}, {each['num_warps']} warps: {found}{best}"
        if "failed" in row:
            yield f"{row['name']}: {row['failed']}"


def launch_table(device: str, rows: Iterable[Mapping[str, Any]]) -> str:
    """The best entries as they stand in launch.py; narrower ones, which were not tried, as they are for any GPU."""
    best: dict[str, list[Launch]] = {}
    for row in sorted((row for row in rows if "best" in row), key=lambda row: row["columns"]):
        best.setdefault(row["launch"], []).append(Launch(row["best"]["block"], row["best"]["num_warps"]))
    lines = [f'    "{device}": {{']
    for name, entries in best.items():
        narrow = [entry for entry in ANY[name] if entry.block < min(each.block for each in entries)]
        wide = [entry for entry in ANY[name] if entry.block > max(each.block for each in entries)]
        table = [*narrow, *entries, *(wide if name in WHOLE_ROWS else [])]
        lines.append(f'        "{name}": ({" ".join(f"Launch({e.block}, {e.num_warps})," for e in table)}),')
    return "\n".join([*lines, "    },"])
