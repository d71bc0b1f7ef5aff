"""The entry point through which lmms-eval finds this package. It imports lmms-eval only when that asks."""

from __future__ import annotations

from typing import Any

# Name of the model in `lmms-eval --model NAME`.
MODEL = "anymal"


def lmms_eval_models() -> Any:
    """The ModelManifest of exported models, for lmms-eval's entry-point group `lmms_eval.models`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=MODEL, chat_class_path="megatron_anymal.harnesses.lmms_eval_model.AnyMAL")
