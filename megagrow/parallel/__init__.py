"""The device mesh and everything that is computed across it: collectives, layers, loss, pipeline, sharded storage."""
