"""Modules that the fork server imports before it forks; see fork_server.py."""

from __future__ import annotations

import importlib
from contextlib import suppress

import forks

for name in (
    "pytest",
    "torch",
    "transformers",
    "megatron_anymal.cli.evaluate",
    "megatron_anymal.cli.generate",
    "megatron_anymal.train.loop",
    "checkpoint_tools.export_hf",
):
    importlib.import_module(name)
# On machines without NeMo the other tests still run.
with suppress(ImportError):
    importlib.import_module("megatron_anymal.nemo.model")

forks.watch()
