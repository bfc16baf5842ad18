"""The report's words on what stage 1 was trained on."""

from collections.abc import Iterator

from megagrow.errors import named
from megagrow.report.examples import visible
from megagrow.report.run import Json

BAR = 40  # characters of the fullest bin


def selection_words(selections: dict[str, Json]) -> str:
    """One section for all runs that picked their data; empty when none did."""
    if not selections:
        return ""
    parts = ["## What stage 1 was trained on"]
    for name, selection in selections.items():
        parts += [f"### {_plain(name)}", *_of_run(selection)]
    return "\n\n".join(parts)


def _of_run(selection: Json) -> Iterator[str]:
    count = f"{selection['kept']:,} of {selection['samples']:,} samples: " if selection["kept"] is not None else ""
    cut = "" if selection["cut"] is None else " Kept scores lie between {:.4f} and {:.4f}.".format(*selection["cut"])
    yield f"{count}{selection['rule']}, by `{selection['score']}`.{cut}"
    if selection["histogram"]:
        yield _indented(histogram_lines(selection["histogram"]))
    if selection["domains"]:
        yield _domain_table(selection["domains"])
    for domain in selection["domains"]:
        if domain["histogram"]:
            yield f"{_plain(named(domain['name']))}:"
            yield _indented(histogram_lines(domain["histogram"]))
    for example in selection["examples"]:
        what = "kept" if example["kept"] else "not kept"
        where = f", domain {_plain(named(example['domain']))}" if example["domain"] is not None else ""
        yield f"**{example['kind']}**: sample {example['sample']}, score {example['score']:.4f}, {what}{where}"
        yield _indented(example["text"].split("\n"))
    yield from (f"- {_plain(note)}" for note in selection["notes"])  # last: what is indented after a list belongs to it


def histogram_lines(histogram: Json) -> list[str]:
    """A line for each bin, from its lower edge: what is kept of it as #, the rest as dots."""
    edges, everything, kept = histogram["edges"], histogram["all"], histogram["kept"]
    most, lines = max(max(everything), 1), []
    for place, count in enumerate(everything):
        length = -(-BAR * count // most)
        solid = 0 if kept is None else round(length * kept[place] / max(count, 1))
        share = "" if kept is None else f", {kept[place]:,} kept"
        lines.append(f"{edges[place]:9.4f}  {'#' * solid}{'.' * (length - solid):{BAR - solid}}  {count:,}{share}")
    return lines


def _domain_table(domains: list[Json]) -> str:
    rows = ["| domain | samples | kept | share | median score | least kept |", "|---|" + "---:|" * 5]
    for domain in domains:
        share = domain["kept"] / domain["samples"] if domain["samples"] else 0.0
        scores = ["" if domain[key] is None else f"{domain[key]:.4f}" for key in ("median", "least_kept")]
        cells = [
            _plain(named(domain["name"])),
            f"{domain['samples']:,}",
            f"{domain['kept']:,}",
            f"{share:.1%}",
            *scores,
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _indented(lines: list[str]) -> str:
    """A code block of Markdown: nothing in it is markup, whatever the text."""
    return "\n".join(f"    {line}" for line in lines)


def _plain(text: str) -> str:
    """A name or message in the midst of Markdown: what would be markup there is escaped."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>|#~" else c for c in visible(text).replace("\n", " "))
