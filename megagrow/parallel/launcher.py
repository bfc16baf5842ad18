"""The bond between a rank and the launcher that started it."""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # of Linux's prctl(2)


def end_with_launcher() -> None:
    """Lets this process die with torchrun, if torchrun has started it (on Linux; elsewhere nothing happens).

    torchrun puts each worker into a session of its own. A SIGKILL of torchrun, or of its process group, would leave the
    workers behind: they would go on writing to the run's directory beside the run that is started next.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
