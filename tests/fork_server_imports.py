"""Modules that the fork server imports before it forks; see fork_server.py."""

from __future__ import annotations

import importlib
from contextlib import suppress

import forks
import transformers

from megatron_anymal.modalities.architecture import ARCHITECTURES

for name in (
    "pytest",
    "torch",
    "transformers",
    "megatron_anymal.cli.evaluate",
    "megatron_anymal.cli.generate",
    "megatron_anymal.train.loop",
    "checkpoint_tools.export_hf",
    "checkpoint_tools.import_hf",
    "checkpoint_tools.inspect",
    "checkpoint_tools.reshard",
    "checkpoint_tools.verify",
    "engine",
    "tiny",
):
    importlib.import_module(name)
# transformers imports a model's module when its class is first asked for.
for architecture in ARCHITECTURES.values():
    getattr(transformers, architecture.model)
# On machines without NeMo the other tests still run.
with suppress(ImportError):
    importlib.import_module("megatron_anymal.nemo.model")

forks.watch()
