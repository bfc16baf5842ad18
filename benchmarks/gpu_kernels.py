"""Every kernel on one GPU: right, and how fast beside a copy, its PyTorch twin, eager and compiled, and Liger's.

    python benchmarks/gpu_kernels.py            # four minutes on one GPU; writes benchmarks/results/gpu_kernels.json
    python benchmarks/gpu_kernels.py --tune     # tries other blocks and warps; prints a table for launch.py
    python benchmarks/gpu_kernels.py --tiny     # the same on few elements, on whatever is there; writes nothing

Each row is checked first, results and all gradients, against the twin in float64; then forward and backward passes are
timed apart (kernel_measure.py says how). A file of kernels `beats` if every one of its rows is right and faster than
the twin, eager and compiled, forward and backward together: that is what lets it serve by default (`ops.MEASURED`).
Results are written after every row: no row is started when the time is up, and one that fails tells why.
"""

import argparse
import gc
import json
import shutil
import sys
import time
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import results_file
import torch
from kernel_cases import Case
from kernel_measure import DEVICE, ON_GPU, Accuracy, Machine, Timer, measure, poisoned
from kernel_process import Jobs, Row, one_line, supervise, warm_up
from kernel_table import AIMS, cases
from kernel_tune import launch_table, tune, tuning_lines, tunings
from rich.console import Console
from rich.markup import escape
from rich.table import Table

SECONDS, TUNE_SECONDS = 240.0, 500.0
ROW_SECONDS, TUNE_ROW_SECONDS = 120.0, 240.0  # after which a row is given up
WARM_SECONDS, WARM_PROCESSES = 100.0, 8  # to compile by several at once what is measured by one
PASSES = ("forward", "backward")


def check(case: Case) -> Row:
    """Whether results and gradients are as near to the truth as the twin's, twice the same, and nothing unwritten.

    The compiled twin's are looked at in the same way, for information: it is what serves where no kernel does.
    """
    inputs = case.make()
    with poisoned():
        ours = case.results("ours", inputs)
        again = case.results("ours", inputs)
    row: Row = {"repeatable": all(torch.equal(ours[name], again[name]) for name in ours)}
    del again
    found, accuracy = {"ours": ours}, {"ours": Accuracy(), "compiled": Accuracy()}
    if "compiled" in case.providers:
        try:
            found["compiled"] = case.results("compiled", inputs)
        except Exception as error:
            row["compiled_error"] = one_line(error)
    twin = {} if case.huge else case.results("eager", inputs)
    for part, truths, twins in case.truths(inputs):
        for name, truth in truths.items():
            own = twins[name].to(ours[name].dtype) if case.huge else twin[name][part]
            for provider, results in found.items():
                accuracy[provider].add(name, results[name][part], own, truth)
    if "compiled" in found:
        row["compiled_error"] = max(accuracy["compiled"].worst.values())
    row["errors"] = accuracy["ours"].worst
    return row | {"correct": row["repeatable"] and accuracy["ours"].holds(ours)}


def describe(case: Case) -> Row:
    return {
        "name": case.name,
        "kernel": case.kernel,
        "file": case.file,
        "size": case.size,
        "floor_bytes": case.bytes,
        "formula": case.formula,
        "rivals": case.rivals,
        "judged": case.judged,
    }


def measure_case(case: Case, timer: Timer, machine: Machine) -> Row:
    """The row of a case; what fails in it is told, not raised."""
    row, providers = describe(case), {}
    torch._dynamo.reset()  # what is compiled for one size is no part of the next one's
    try:
        copies = [machine.copy_seconds(num_bytes) for num_bytes in case.bytes]  # while the GPU is known to answer
        row |= check(case)
    except Exception as error:
        return row | {"failed": one_line(error)}
    row["providers"] = providers
    for provider in case.providers:
        try:
            free()
            providers[provider] = measure(case.work(provider), timer)
        except Exception as error:
            providers[provider] = {"failed": one_line(error)}
    if "failed" in providers.get("ours", {}):
        return row | {"failed": providers["ours"]["failed"]}
    return row | (figures(case, providers, machine, copies) if providers else {}) | {"beats": beats(row)}


def free() -> None:
    """Memory for the next provider."""
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()


def figures(case: Case, providers: Mapping[str, Any], machine: Machine, copies: list[float]) -> Row:
    """What the times of ours come to; `copies` are the seconds of copies that move as many bytes."""
    ours, found = providers["ours"], {}
    totals = {name: each["total"] for name, each in providers.items() if "failed" not in each}
    found["speedups"] = {name: total / ours["total"] for name, total in totals.items() if name != "ours"}
    if case.flops:
        found["matrix_share"] = case.flops / ours["total"] / machine.matrix
    if not case.bytes:
        return found
    for name, num_bytes, seconds in zip(PASSES, case.bytes, copies, strict=False):
        rate = num_bytes / ours[name]["median"]
        equal = seconds / ours[name]["median"]
        found[name] = {"bytes_per_second": rate, "copy_share": rate / machine.copy, "equal_copy_share": equal}
    found["floors"] = ours["total"] / (sum(case.bytes) / machine.copy)
    found["aim"] = AIMS[case.file]
    return found | {"aim_holds": found["floors"] <= found["aim"]}


def beats(row: Row) -> bool:
    """Whether it is right and faster than every rival, forward and backward together."""
    providers = row.get("providers", {})
    totals = {name: each.get("total") for name, each in providers.items()}
    if "failed" in row or not row["correct"] or not all(totals.get(rival) for rival in row["rivals"]):
        return False
    return all(totals["ours"] < totals[rival] for rival in row["rivals"])


def verdicts(rows: Iterable[Row]) -> dict[str, dict[str, Any]]:
    """By file of kernels: whether it `beats` in every row that counts, and those in which it does `not`."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["judged"]:
            verdict = found.setdefault(row["file"], {"beats": True, "not": []})
            if not beats(row):
                verdict["beats"] = False
                verdict["not"].append(row["name"])
    return found


def unproven(files: Iterable[str], results: Mapping[str, Any]) -> list[str]:
    """The files of kernels of which these results, read from gpu_kernels.json, do not show that they beat on a GPU."""
    found = verdicts(results["rows"]) if results.get("device_type") == "cuda" else {}
    needed = {case.name: case.file for case in cases(tiny=False) if case.judged}
    missing = {file for name, file in needed.items() if name not in {row["name"] for row in results["rows"]}}
    return sorted(file for file in files if file in missing or not found.get(file, {"beats": False})["beats"])


def facts_of(machine: Machine) -> dict[str, Any]:
    """What holds for all rows."""
    packages = {}
    for package in ("triton", "liger-kernel"):
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            packages[package] = None
    return {
        "device": torch.cuda.get_device_name() if ON_GPU else "cpu",
        "device_type": DEVICE.type,
        "copy_bytes_per_second": machine.copy,
        "matrix_flops_per_second": machine.matrix,
        "packages": packages,
    }


def work(path: Path) -> None:
    """A process that measures."""
    gc.freeze()  # what is imported: a collection would go through it again and again
    jobs, timer = Jobs(path), Timer()
    all_cases = {case.name: case for case in cases(jobs.content["tiny"])}
    if jobs.content["tune"]:
        items = {item.name: item for item in tunings(all_cases.values())}
        jobs.content["facts"] = {"device": torch.cuda.get_device_name() if ON_GPU else "cpu"}
        return jobs.perform(lambda name: tune(items[name], timer, check, free, 3 if jobs.content["tiny"] else None))
    machine = Machine(timer)
    jobs.content["facts"] = facts_of(machine)
    jobs.perform(lambda name: measure_case(all_cases[name], timer, machine))


def warm(names: list[str], tiny: bool) -> None:
    """A process that compiles."""
    gc.freeze()
    for case in cases(tiny):
        torch._dynamo.reset()
        for provider in case.providers if case.name in names else ():
            try:
                one = case.work(provider)
                for before, run in ((one.before_forward, one.forward), (one.before_backward, one.backward)):
                    (before or (lambda: None))()
                    (run or (lambda: None))()
            except Exception:
                continue  # who measures will say it
            finally:
                one = None
                free()


def show(rows: list[Row], facts: Mapping[str, Any]) -> None:
    peers = ("eager", "compiled", "liger", "torch", "fused", "foreach")
    columns = ("ms", "GB/s", "of a copy", "floors", "aim", "GiB", *(f"x {peer}" for peer in peers), "error", "beats")
    table = Table("kernel", "size", *columns, title="gpu_kernels: forward + backward; x: as fast as", box=None)
    for row in rows:
        table.add_row(row["kernel"], row["size"], *([escape(row["failed"])] if "failed" in row else cells(row, peers)))
    console = Console(width=210)
    console.print(table)
    if "copy_bytes_per_second" in facts:
        copy, matrix = facts["copy_bytes_per_second"] / 1e9, facts["matrix_flops_per_second"] / 1e12
        console.print(f"{facts['device']}: copy {copy:,.0f} GB/s, products {matrix:,.0f} TFLOP/s, {facts['packages']}")
    for reason, names in failures(rows).items():
        console.print(f"{reason}: {'; '.join(names)}", markup=False)
    for file, verdict in verdicts(rows).items():
        console.print(f"{file}: {'beats' if verdict['beats'] else 'does not beat: ' + '; '.join(verdict['not'])}")


def failures(rows: Iterable[Row]) -> dict[str, list[str]]:
    """Rows and providers, by why there are no figures of them, or none to rely on."""
    found: dict[str, list[str]] = {}
    for row in rows:
        for name, each in {"": row, **row.get("providers", {})}.items():
            if "failed" in each:
                found.setdefault(each["failed"], []).append(f"{row['name']} {name}".rstrip())
        error = row.get("compiled_error", 0.0)
        if isinstance(error, str) or error > 1:
            found.setdefault(f"the compiled twin is wrong, {error}", []).append(row["name"])
    return found


def cells(row: Row, peers: tuple[str, ...]) -> list[str]:
    """Forward and backward apart where there are both; an error is the share of what is allowed."""
    ours = row["providers"].get("ours", {})
    times, passes = [ours[name] for name in PASSES if name in ours], [row[name] for name in PASSES if name in row]
    shares = [f"{each['copy_share']:.0%}" for each in passes]
    if "matrix_share" in row:
        shares = [f"{row['matrix_share']:.0%} of products"]
    ratios = []
    for peer in peers:
        found = row["providers"].get(peer)
        ratio = row.get("speedups", {}).get(peer)
        ratios.append("" if found is None else "failed" if ratio is None else f"{ratio:.2f}")
    worst = max(row["errors"].values(), default=0.0)
    return [
        " + ".join(f"{each['median'] * 1e3:.3f}" for each in times),
        " + ".join(f"{each['bytes_per_second'] / 1e9:,.0f}" for each in passes),
        " + ".join(shares),
        f"{row['floors']:.2f}" if "floors" in row else "",
        f"{row['aim']:.2f} {'held' if row['aim_holds'] else 'missed'}" if "aim" in row else "",
        f"{max(each['peak'] for each in times) / 2**30:.2f}" if times else "",
        *ratios,
        f"{worst:.2f}" if row["correct"] else f"{worst:.2f} wrong",
        str(row["beats"]) if row["judged"] else "",
    ]


def chosen(only: list[str] | None, tiny: bool) -> list[Case]:
    found = [case for case in cases(tiny) if not only or {case.kernel, case.file} & set(only)]
    unknown = set(only or ()) - {name for case in found for name in (case.kernel, case.file)}
    if unknown:
        raise SystemExit(f"gpu_kernels: --only {' '.join(sorted(unknown))}: no kernel and no file of that name")
    return found


def earlier_rows(names: set[str], device: str | None) -> list[Row]:
    """Of the other cases, where only some are measured anew on the same device."""
    path = results_file.FOLDER / "gpu_kernels.json"
    earlier = json.loads(path.read_text()) if path.exists() else {"rows": []}
    if earlier.get("device") != device:
        return []
    return [{"commit": earlier["commit"], **row} for row in earlier["rows"] if row["name"] not in names]


def run(arguments: argparse.Namespace) -> None:
    """The process that measures nothing: it has others do so, writes what they find, and tells it at the end."""
    began, selected = time.time(), chosen(arguments.only, arguments.tiny)
    described = {case.name: describe(case) for case in selected}
    script = [sys.executable, __file__]
    names = [item.name for item in tunings(selected)] if arguments.tune else list(described)
    target = "gpu_kernels_tune" if arguments.tune else "gpu_kernels"
    if not arguments.tune:
        flags = ["--tiny"] if arguments.tiny else []
        slow = [case.name for case in selected if "compiled" in case.providers]
        warm_up([*script, *flags, "--warm"], slow[:1] if arguments.tiny else slow, WARM_PROCESSES, WARM_SECONDS)

    def changed(content: dict[str, Any]) -> None:
        rows = content["rows"] = [described.get(row["name"], {}) | row for row in content["rows"]]
        if rows:
            print(f"{time.time() - began:4.0f} s: {len(rows)} of {len(names)}, {rows[-1]['name']}", flush=True)
        if arguments.tiny or not rows:
            return
        facts = dict(content["facts"])
        if not arguments.tune:
            rows = [*earlier_rows(set(described), facts.get("device")), *rows] if arguments.only else rows
            facts |= {"verdicts": verdicts(rows), "aims": AIMS}
        path = results_file.save(target, rows, **facts)
        if arguments.output:
            shutil.copy(path, arguments.output)

    seconds = arguments.seconds or (TUNE_SECONDS if arguments.tune else SECONDS)
    content = {"jobs": names, "until": began + seconds, "tiny": arguments.tiny, "tune": arguments.tune}
    content = supervise([*script, "--worker"], content, changed, TUNE_ROW_SECONDS if arguments.tune else ROW_SECONDS)
    rows = content["rows"]
    if arguments.tune:
        print(*tuning_lines(rows), sep="\n")
        print(launch_table(content["facts"].get("device", "?"), rows))
    else:
        show(rows, content["facts"])
    broken = [name for names in failures(rows).values() for name in names if not name.endswith(" liger")]
    if arguments.tiny and (broken or not all(row.get("correct", True) for row in rows)):
        sys.exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="kernels, or files of kernels")
    parser.add_argument("--seconds", type=float, help="after which no row is started")
    parser.add_argument("--output", type=Path, help="a folder for a copy of the results")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--warm", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return work(arguments.worker)
    if arguments.warm:
        return warm(arguments.warm, arguments.tiny)
    if not arguments.tiny and not ON_GPU:
        print("gpu_kernels: no GPU here: nothing to measure; --tiny tries the script without one")
        return
    run(arguments)


if __name__ == "__main__":
    main()
