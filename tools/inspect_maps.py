"""Show what LiGO's maps have become: their sizes, row sums, how far learning has taken them, their effective rank.

    python tools/inspect_maps.py runs/grown/maps.safetensors

Exit codes: 0 done, 2 usage, 4 a file that is missing, damaged, or holds no maps.
"""

import math
import sys

from _command import Arguments, local_path, run
from rich.console import Console
from rich.table import Table

from megagrow.growth.ligo_file import MapFacts, describe_maps
from megagrow.roles import num_parameters


def main() -> None:
    parser = Arguments(description="Show what LiGO's maps have become.")
    parser.add_argument("maps", metavar="FILE", type=local_path)
    path = parser.parse_args().maps
    ligo, maps = describe_maps(path)
    small, large = (num_parameters(model) / 1e6 for model in (ligo.start.source, ligo.start.target))
    begun = f"began as {ligo.start.method}, noise {ligo.noise:g}, seed {ligo.start.seed}"
    title = f"{path}: LiGO, {ligo.variant}, {small:.2f}M -> {large:.2f}M parameters, {begun}"
    Console(width=None if sys.stdout.isatty() else 120, highlight=False).print(table(title, maps))


def table(title: str, maps: list[MapFacts]) -> Table:
    """One row per map."""
    table = Table("map", "shape", title=title)
    for column in ("elements", "row sums", "farthest from its start", "effective rank"):
        table.add_column(column, justify="right")
    for each in maps:
        sums = "{:.3g} … {:.3g}".format(*each.row_sums)
        facts = f"{math.prod(each.shape):,}", sums, f"{each.departure:.3g}", f"{each.effective_rank:.1f}"
        table.add_row(each.name, str(list(each.shape)), *facts)
    table.add_section()
    table.add_row(f"{len(maps):,} maps", "", f"{sum(math.prod(each.shape) for each in maps):,}")
    return table


if __name__ == "__main__":
    run(main)
