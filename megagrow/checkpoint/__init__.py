"""Checkpoints: committed whole or not at all, verified before use, loaded in any layout."""

from megagrow.checkpoint.format import Manifest
from megagrow.checkpoint.store import candidates, load, newest, read_full, read_manifest, save, verify

__all__ = ["Manifest", "candidates", "load", "newest", "read_full", "read_manifest", "save", "verify"]
