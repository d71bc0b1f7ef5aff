"""Modules that the fork server imports before it forks; see fork_server.py."""

from __future__ import annotations

import gc
import importlib
from contextlib import suppress

# A collection would visit every object imported so far.
gc.disable()

from megatron_anymal import lean_imports  # noqa: E402

# As in every command.
lean_imports.install()

import forks  # noqa: E402
import transformers  # noqa: E402
from PIL import Image  # noqa: E402

from megatron_anymal.modalities.architecture import ARCHITECTURES  # noqa: E402

for name in (
    "pytest",
    "torch",
    "transformers",
    # What commands import only once their arguments have been checked.
    "megatron_anymal.generation.chat",
    "megatron_anymal.generation.checkpoint_generator",
    "megatron_anymal.generation.evaluation",
    "megatron_anymal.generation.export_generator",
    "megatron_anymal.train.loop",
    "checkpoint_tools.exporting.export",
    "checkpoint_tools.importing.llama",
    "checkpoint_tools.importing.workers",
    "checkpoint_tools.rank_boxes",
    "megatron_anymal.cpu_shim",
    "engine",
    "tiny",
):
    importlib.import_module(name)
# transformers imports a model's module when its class is first asked for.
for architecture in ARCHITECTURES.values():
    getattr(transformers, architecture.model)
# Pillow imports the common formats when the first image is opened.
Image.preinit()
# On machines without these the other tests still run.
for name in ("megatron_anymal.nemo.model", "bitsandbytes"):
    with suppress(ImportError):
        importlib.import_module(name)

forks.watch()
# Collections in a forked process would visit, and so copy, everything that was imported.
gc.collect()
lean_imports.freeze()
gc.enable()
