"""model.multiplex: what is refused, and with which words."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_anymal.config import ConfigError, RunConfig
from megatron_anymal.config.compose import from_dict
from megatron_anymal.config.validation import check


def section(token: int, **more: Any) -> dict[str, Any]:
    return {"placeholder": f"<{token}>", "encoder": {"type": "clip"}, **more}


def run(changes: dict[str, Any]) -> RunConfig:
    """Two alignments, with changes by dotted keys; None removes a key."""
    config: dict[str, Any] = {
        "trainer": {"max_steps": 10},
        "model": {
            "language_model": {"config": {"hidden_size": 64}},
            "modalities": {"image": section(1), "audio": section(2)},
            "multiplex": {
                "image": {"datasets": ["pictures", "photos"], "global_batch_size": 16},
                "audio": {"datasets": ["sounds"], "global_batch_size": 1, "max_steps": 4, "optim": {"lr": 1e-3}},
            },
        },
        "data": {
            "tokenizer": "t",
            "train": {name: {"path": name} for name in ("pictures", "photos", "sounds")},
            "validation": {"sounds": {"path": "v"}},
        },
    }
    for key, value in changes.items():
        *parents, last = key.split(".")
        node = config
        for parent in parents:
            node = node.setdefault(parent, {})
        if value is None:
            del node[last]
        else:
            node[last] = value
    return from_dict(config)


def test_alignments_that_work() -> None:
    config = run({})
    check(config)
    assert config.model.samples_per_step == 17
    assert config.model.samples_of(3) == 3 * 17 and config.model.samples_of(10) == 160 + 4
    alone = run({"model.multiplex": None, "model.global_batch_size": 8})
    assert (alone.model.samples_per_step, alone.model.samples_of(3)) == (8, 24)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"job": "sft"}, r"job=sft, whose adapters all modalities would share. Remove it, or set job=pretrain"),
        ({"model.language_model.freeze": False}, r"freeze=false: every alignment would change.*Set it to true"),
        ({"model.lora": {"r": 8}}, r"model.lora.r=8: all alignments would train them. Set it to 0"),
        ({"model.discrete": {"codes": {"codebooks": [8]}}}, r"model.discrete, whose rows of the vocabulary"),
        (
            {"data.schedule": [{"weights": {"pictures": 1, "photos": 1, "sounds": 1}}]},
            r"data.schedule: every alignment has datasets of its own.*Remove one",
        ),
        ({"model.neftune": {"alpha": 5}}, r"model.neftune.alpha=5.0 draws noise by a sample's position.*Set it to 0"),
        ({"model.fp8": "hybrid"}, r"model.fp8=hybrid scales by the largest value of a whole pack.*Remove one"),
        ({"model.fp4": "e2m1"}, r"model.fp4=e2m1 scales by the largest value of a whole pack.*Remove one"),
        ({"model.global_batch_size": 8}, r"model.global_batch_size has no effect.*multiplex.NAME.global_batch_size"),
        ({"model.optim": {"lr": 1}}, r"model.optim has no effect.*set model.multiplex.NAME.optim"),
        ({"trainer.gradient_clip_val": 2}, r"trainer.gradient_clip_val has no effect.*NAME.gradient_clip_val"),
        ({"trainer.gpu": "h100"}, r"trainer.gpu=h100 compares the run with a plan.*Remove trainer\.gpu"),
        ({"model.multiplex.audio": None}, r"model.multiplex has no entry for 'audio'.*remove model.modalities.audio"),
        (
            {"model.multiplex.imag": {"datasets": ["pictures"], "global_batch_size": 1}},
            r"model.multiplex.imag is not one of model.modalities \(image, audio\). Did you mean image\?",
        ),
        (
            {"model.modalities.audio": section(2, projector={"freeze": True})},
            r"model.multiplex.audio trains nothing.*are both true. Set one of them to false",
        ),
        (
            {"model.multiplex.audio.max_steps": 11},
            r"audio.max_steps=11 is more than trainer.max_steps=10. Raise that, or lower it",
        ),
        (
            {"model.multiplex.image.max_steps": 8},
            r"trainer.max_steps=10, but every alignment of model.multiplex ends by step 8. Set trainer.max_steps=8",
        ),
        ({"model.multiplex.audio.datasets": []}, r"audio.datasets is empty. Name datasets of data.train \(pictures, "),
        ({"model.multiplex.audio.datasets": ["sound"]}, r"names 'sound', which is not in .*Did you mean sounds\?"),
        ({"model.multiplex.audio.datasets": ["sounds", "photos"]}, r"'photos', which model.multiplex.image.datasets"),
        ({"model.multiplex.image.datasets": ["photos"]}, r"data.train.pictures belongs to no alignment.*Add it"),
        ({"data.validation.held_out": {"path": "v"}}, r"data.validation.held_out belongs to no alignment"),
        ({"model.multiplex.audio.global_batch_size": 0}, r"multiplex.audio.global_batch_size=0 must be at least 1"),
        ({"model.multiplex.audio.max_steps": -1}, r"model.multiplex.audio.max_steps=-1 must be at least 0"),
        ({"model.multiplex.audio.gradient_clip_val": -1}, r"audio.gradient_clip_val=-1.0 must be at least 0"),
        ({"model.multiplex.audio.optim": {"lr": -1}}, r"model.multiplex.audio.optim.lr=-1.0 must be at least 0"),
        ({"model.multiplex.audio.optim": {"betas": [0.9]}}, r"model.multiplex.audio.optim.betas=\[0.9\] must hold two"),
        (
            {"model.multiplex.audio.optim": {"sched": {"name": "step"}}},
            r"model.multiplex.audio.optim.sched.name='step' is not one of 'cosine'",
        ),
        ({"model.multiplex.audio.datset": ["sounds"]}, r"unknown key model.multiplex.audio.datset.*Did you mean"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(run(changes))
