"""The whole check, from the ranks' first meeting to the rows of the table."""

import os
import socket
import time

import torch.distributed as dist

from megagrow import ops
from megagrow.checkpoint.agreement import Ranks
from megagrow.checks import check
from megagrow.cluster.compute import check_compute
from megagrow.cluster.environment import compare, own_facts
from megagrow.cluster.gradients import check_gradients
from megagrow.cluster.links import check_links
from megagrow.cluster.report import Row, first_error
from megagrow.cluster.watch import LIMIT_SECONDS, Watch
from megagrow.config import Config
from megagrow.errors import HangError
from megagrow.parallel.mesh import init_distributed, make_mesh
from megagrow.plan.layout import Layout

MEETING_SECONDS = 30.0


def check_cluster(config: Config, limit: float = LIMIT_SECONDS) -> list[Row]:
    """Looks at all ranks of the process group, which it joins if torchrun has prepared one.

    Hosts that differ in what must be equal end the check early: they would hang or mislead the rest of it. A step that
    takes too long ends the process with code 6, and a line that says where.

    Args:
        config: of the run that is to be started here; its data and checkpoints are not touched.
        limit: seconds for everything.

    Returns:
        The findings, the same on every rank.

    Raises:
        ConfigError: the configuration does not fit the number of ranks, or asks for kernels that are not here.
        HangError: ranks do not come together, or a link failed.
    """
    began = time.perf_counter()
    check(config, int(os.environ.get("WORLD_SIZE", "1")))
    _join(limit)
    ranks = Ranks(None)
    watch = Watch(ranks.gather(socket.gethostname()), limit)
    with watch.step("comparison of the hosts", MEETING_SECONDS):
        rows = compare(ranks.gather(own_facts(config)), watch.hosts)
    if first_error(rows):
        return rows
    with watch.step("meeting of the groups of all axes", MEETING_SECONDS):
        mesh = make_mesh(config.parallel)
    ops.check_kernels(config.train.kernels, mesh.device)
    ops.let_kernels_serve(config.train.kernels)
    rows += check_links(Layout(config, mesh.world.size), mesh, watch)
    rows += check_compute(config, mesh, watch)
    rows += check_gradients(config, mesh, watch)
    seconds = max(ranks.gather(time.perf_counter() - began))
    return [*rows, Row("time", "all of it", f"{seconds:.1f} s", figures={"seconds": seconds})]


def _join(limit: float) -> None:
    try:
        init_distributed(limit)
    except dist.DistError as error:
        cause = " ".join(str(error).split())
        raise HangError(f"the ranks do not come together: {cause}; look at MASTER_ADDR and the network") from error
