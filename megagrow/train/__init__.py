"""`run(config)`: build, load, loop. The only place where growth, SALT and parallelism meet.

run.py       one run from start to exit.json
trainer.py   the loop: which step comes next, and what follows each step
beginning.py  what a run trains first, from nothing or from a checkpoint
state.py     what a run knows beside its tensors
part.py      this rank's share of a model, and how it is built and loaded
learner.py   one optimizer step: of the model, or of LiGO's maps
growing.py   from the small model to the large one
salt_stage.py  SALT inside the run: its teacher, and when stage 1 ends
salt_data.py   the samples that a folder of scores selects
salt_costs.py  what a run builds on, in its ledger
stop.py      signals
saving.py    checkpoints of a run, and resuming from them
"""

from megagrow.train.run import run

__all__ = ["run"]
