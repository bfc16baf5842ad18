"""What growing saves: cost at equal loss, and loss at equal cost, between finished runs.

Between finished scratch runs the loss is taken as a parabola in the logarithm of the cost, through three of them: a
chord lies above what is really a convex curve, and would flatter what is compared by 1 to 3 points. A scratch run that
a cheaper one equals is left out, which favours the baseline. Nothing is extrapolated: outside of the range of the
finished scratch runs a saving is null, with the reason and a bound.

Of several seeds, each is compared with the scratch runs of its own; the spread is the least and the greatest saving.
"""

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from megagrow.report.run import Json, Run

CONVENTIONS = ("papers_convention", "all_in")
MEASURES = ("flops", "seconds")  # of which something is saved
Front = list[tuple[float, float]]  # (cost, loss) of finished runs: costs rise, losses fall
_NO_BASELINE = "no scratch run is finished; its directory is called scratch, or scratch-…"


def pareto_front(points: list[tuple[float, float]]) -> Front:
    """The (cost, loss) pairs that no pair of at most the same cost equals, cheapest first."""
    front: Front = []
    for cost, loss in sorted(points):
        if not front or loss < front[-1][1]:
            front.append((cost, loss))
    return front


def cost_at_loss(front: Front, loss: float) -> float:
    """The cost at which the baseline reaches `loss`, which lies within the losses of the front."""
    for piece in _pieces(front):
        if piece.falls_to <= loss <= piece.loss:
            return piece.cost_at(loss)
    assert loss == front[0][1], f"loss {loss} lies outside of the front"
    return front[0][0]


def loss_at_cost(front: Front, cost: float) -> float:
    """The baseline's loss at `cost`, which is not below the front; beyond its end, the last loss."""
    for piece in _pieces(front):
        if piece.cost <= cost <= piece.next_cost:
            return piece.loss_at(cost)
    assert cost >= front[-1][0], f"cost {cost} lies below the front"
    return front[-1][1]


@dataclass(frozen=True)
class _Piece:
    """The baseline between two of its runs: loss + slope·t + bend·t·(t − width), t the log of cost / first cost.

    Attributes:
        cost, loss: of the cheaper run.
        next_cost, falls_to: of the dearer one.
        bend: of the parabola; 0: a chord.
    """

    cost: float
    loss: float
    next_cost: float
    falls_to: float
    bend: float

    @property
    def width(self) -> float:
        """In log cost."""
        return math.log(self.next_cost / self.cost)

    @property
    def slope(self) -> float:
        """Of the chord."""
        return (self.falls_to - self.loss) / self.width

    def loss_at(self, cost: float) -> float:
        """The loss at a cost of the piece."""
        t = math.log(cost / self.cost)
        return self.loss + self.slope * t + self.bend * t * (t - self.width)

    def cost_at(self, loss: float) -> float:
        """The cost at a loss of the piece: the root that lies in it, in the form that does not cancel."""
        fall, start = self.loss - loss, self.slope - self.bend * self.width
        t = 2 * fall / (math.sqrt(max(start**2 - 4 * self.bend * fall, 0.0)) - start)
        return self.cost * math.exp(t)


def _pieces(front: Front) -> Iterator[_Piece]:
    """The parabola of a piece goes through the run before it, too; that of the first one through the run after it."""
    for place, ((cost, loss), (next_cost, falls_to)) in enumerate(zip(front, front[1:], strict=False)):
        chord = _Piece(cost, loss, next_cost, falls_to, 0.0)
        most = -chord.slope / chord.width  # beyond, the parabola would rise somewhere in the piece
        bend = _bend(front[max(place - 1, 0) :][:3])
        yield replace(chord, bend=max(-most, min(most, bend)))


def _bend(points: Front) -> float:
    """Half of the second derivative of the parabola through three points, in log cost; 0 for fewer."""
    if len(points) < 3:
        return 0.0
    (a, first), (b, second), (c, third) = ((math.log(cost), loss) for cost, loss in points)
    return ((third - second) / (c - b) - (second - first) / (b - a)) / (c - a)


def compare(grown: Run, scratch: list[Run]) -> Json:
    """A grown run against finished scratch runs: cost at equal loss, loss at equal all-in FLOPs."""
    savings = {}
    for convention in CONVENTIONS:
        found = {m: saving(grown, scratch, convention, m) for m in MEASURES}
        savings[convention] = {
            **{measure: entry["value"] for measure, entry in found.items()},
            "reason": {measure: entry["reason"] for measure, entry in found.items()},
            "bound": {measure: entry["bound"] for measure, entry in found.items()},
        }
    return {"savings": savings, "at_equal_all_in_flops": at_equal_cost(grown, scratch)}


def saving(grown: Run, scratch: list[Run], convention: str, measure: str) -> Json:
    """1 - cost(grown) / cost(scratch at the grown run's loss).

    Returns:
        {"value", "reason", "bound"}: value is None when it is not known, and reason says why; bound
        is then {"at_least": x} or {"at_most": x} where the finished runs allow one.
    """
    spent, loss = grown.cost(convention, measure), grown.final_loss
    front = scratch_front(scratch, convention, measure)
    if loss is None:
        return _null(f"{grown.name} is not finished: {grown.unfinished}")
    if not scratch:
        return _null(_NO_BASELINE)
    if spent is None:
        return _null(f"the {measure} of what {grown.name} builds on are unknown")
    if not front:
        return _null("no scratch run of known cost is finished")
    return saving_at(spent, loss, front, max(known_costs(scratch, convention, measure)))


def saving_at(spent: float, loss: float, front: Front, largest: float) -> Json:
    """What a model of `loss` saves that cost `spent`; as `saving` returns it.

    Args:
        spent: what it cost.
        loss: what it came to.
        front: the baseline.
        largest: the cost of the dearest run of the baseline, which the front leaves out if a cheaper one equals it.
    """
    if loss < front[-1][1]:
        reason = f"no finished scratch run reaches {loss:.4f}; the best has {front[-1][1]:.4f}"
        return _null(reason, {"at_least": 1 - spent / largest})
    if loss > front[0][1]:
        reason = f"the smallest scratch budget already reaches {front[0][1]:.4f}, below {loss:.4f}"
        return _null(reason, {"at_most": 1 - spent / front[0][0]})
    return {"value": 1 - spent / cost_at_loss(front, loss), "reason": None, "bound": None}


def over_seeds(found: Sequence[Json]) -> Json:
    """The savings of one arm on several seeds as one.

    Args:
        found: of each seed, as `saving` returns it.

    Returns:
        {"value", "min", "max", "reason", "bound"}: the mean, and the least and the greatest; None if one of them is not
        known. The bound then holds for every seed: {"at_least": x} if none of them saves less, {"at_most": x} if none
        saves more, None where neither can be said.
    """
    values = [each["value"] for each in found]
    if found and None not in values:
        return {**spread(values), "reason": None, "bound": None}
    reasons = Counter(each["reason"] for each in found if each["reason"])
    said = "; ".join(f"{count} of {len(found)} seeds: {reason}" for reason, count in reasons.items())
    nothing = {"value": None, "min": None, "max": None}
    return {**nothing, "reason": said or "no seed is finished", "bound": _common_bound(found)}


def spread(values: Sequence[float]) -> Json:
    """{"value", "min", "max"}: the mean of the seeds, and the least and the greatest."""
    return {"value": statistics.fmean(values), "min": min(values), "max": max(values)}


def _common_bound(found: Sequence[Json]) -> Json | None:
    for side, strictest in (("at_least", min), ("at_most", max)):
        limits = [each["value"] if each["value"] is not None else (each["bound"] or {}).get(side) for each in found]
        if limits and None not in limits:
            return {side: strictest(limit for limit in limits if limit is not None)}
    return None


def at_equal_cost(grown: Run, scratch: list[Run]) -> Json:
    """The grown run's loss against scratch's at the same all-in FLOPs.

    Returns:
        {"all_in_flops", "grown_loss", "scratch_loss", "nats", "beats", "sentence"}: nats is how far
        the grown run is below scratch; what is not known is None.
    """
    flops, loss = grown.cost("all_in", "flops"), grown.final_loss
    front = scratch_front(scratch, "all_in", "flops")
    beats, scratch_loss = None, None
    if not scratch:
        why = _NO_BASELINE
    elif not front or loss is None:
        why = "a run is not finished"
    elif flops is None:
        why = f"what {grown.name} builds on has an unknown cost"
    elif front[0][0] <= flops <= max(known_costs(scratch, "all_in", "flops")):
        scratch_loss = loss_at_cost(front, flops)
        beats, why = loss < scratch_loss, f"by {abs(scratch_loss - loss):.4f} nats"
    elif flops > front[0][0] and loss >= front[-1][1]:
        beats, why = False, "scratch reached its loss with fewer"
    elif flops < front[0][0] and loss < front[0][1]:
        beats, why = True, "the smallest scratch budget spent more for a worse loss"
    else:
        why = "no scratch run was given about as many"
    verdict = {True: "beats", False: "does not beat", None: "cannot be compared with"}[beats]
    return {
        "all_in_flops": flops,
        "grown_loss": loss,
        "scratch_loss": scratch_loss,
        "nats": None if scratch_loss is None or loss is None else scratch_loss - loss,
        "beats": beats,
        "sentence": f"the grown arm {verdict} scratch at equal all-in FLOPs ({why})",
    }


def scratch_front(scratch: list[Run], convention: str, measure: str) -> Front:
    """(cost, loss) of the finished scratch runs of known cost, without those that one equals."""
    found = [(run.cost(convention, measure), run.final_loss) for run in scratch]
    return pareto_front([(cost, loss) for cost, loss in found if cost and loss is not None])


def known_costs(scratch: list[Run], convention: str, measure: str) -> list[float]:
    """The costs of the finished runs, where they are known."""
    found = [run.cost(convention, measure) for run in scratch if not run.unfinished]
    return [cost for cost in found if cost is not None]


def no_savings(reason: str) -> Json:
    """What `compare` would say under "savings" if there were a grown run; all of it null."""
    nothing = {"flops": None, "seconds": None}
    why = {"flops": reason, "seconds": reason}
    return {convention: {**nothing, "reason": why, "bound": nothing} for convention in CONVENTIONS}


def _null(reason: str, bound: Json | None = None) -> Json:
    return {"value": None, "reason": reason, "bound": bound}
