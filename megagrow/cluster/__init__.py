"""Is a cluster fit for a run? Environment, links, compute and gradients, in the run's own layout, within minutes."""

from megagrow.cluster.check import check_cluster
from megagrow.cluster.report import Row, exit_code, first_error, problems, table, to_json

__all__ = ["Row", "check_cluster", "exit_code", "first_error", "problems", "table", "to_json"]
