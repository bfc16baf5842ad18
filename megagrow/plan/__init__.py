"""What a run needs, sends and costs, before it starts.

layout.py         sizes that follow from a configuration and a number of ranks
weights.py        elements of parameters that each rank stores and gathers
schedule.py       torch's pipeline schedules, walked through without running them
activations.py    what a microbatch leaves behind for its backward pass
memory.py         the fullest moment of a step
communication.py  bytes per axis and step
phases.py         growth and SALT: the phases of a run
speed.py          a stated model of time
suggest.py        valid layouts, the fastest that fit first
targets.py        larger models that a small one can grow into
dry_run.py        the real model of a rank, without memory
plan.py, show.py  all of it together, as data and as tables
measure.py        live memory of real steps on a CPU, which tests compare
"""

from megagrow.plan import dry_run, show, suggest, targets
from megagrow.plan.plan import Plan, make_plan, to_dict
from megagrow.plan.speed import Machine
from megagrow.plan.targets import find_targets

__all__ = ["Machine", "Plan", "dry_run", "find_targets", "make_plan", "show", "suggest", "targets", "to_dict"]
