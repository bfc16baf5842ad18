"""`run(config)`: build, load, loop. The only place where growth, SALT and parallelism meet.

run.py            one run from start to exit.json
beginning.py      what a run trains first, from nothing or from a checkpoint
trainer.py        the loop: which step comes next, and what follows each step
learner.py        one optimizer step: of the model, or of LiGO's maps
part.py           this rank's share of a model, and how it is built and loaded
streams.py        the data of a run: what it trains on, and what it is measured on
state.py          what a run knows beside its tensors
saving.py         checkpoints of a run, and resuming from them
timing.py         when the next growth is due
growing.py        from the small model to the large one
vocabulary.py     tokens that only the grown model knows
salt_stage.py     SALT inside the run: its teacher, and when stage 1 ends
grown_teacher.py  the small model, kept as the teacher of what it grew into
salt_data.py      the samples that a folder of scores selects
salt_costs.py     what a run builds on, in its ledger
clock.py          seconds for the ledger
garbage.py        garbage collection between steps
stop.py           signals
map_learning.py   learning LiGO's maps outside a run
probe.py          short trials of several ways of growing, compared
"""

from megagrow.train.run import run

__all__ = ["run"]
