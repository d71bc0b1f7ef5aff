"""The identity of an encoder changes with everything that changes features, and with nothing else."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import modalities

from megatron_anymal.config import ModalityConfig
from megatron_anymal.modalities import build_modality, load_plugins
from megatron_anymal.model import encoder_identity as module
from megatron_anymal.model.encoder_identity import encoder_identity
from megatron_anymal.model.encoders import Encoder, seeded_encoder


def identity(section: ModalityConfig, change: Callable[[Encoder], object] = lambda encoder: None, seed: int = 0) -> str:
    modality = build_modality("image", section)
    encoder = seeded_encoder("image", section.encoder, modality, seed)
    change(encoder)
    return encoder_identity(modality, encoder)


def nudge(encoder: Encoder) -> None:
    """Change one weight by the least possible amount."""
    weight = next(iter(encoder.parameters())).detach().view(-1)
    weight[-1] = torch.nextafter(weight[-1], torch.tensor(torch.inf))


def test_what_matters() -> None:
    section = modalities()["image"]
    others = {"weights": identity(section, nudge), "seed": identity(section, seed=1)}
    others["dtype"] = identity(section, lambda encoder: encoder.to(torch.bfloat16))
    for name, value in (
        ("max_grid", 2),
        ("overview", False),
        ("image_mean", [0.5, 0.5, 0.5]),
        ("resize_backend", "torch"),
    ):
        changed = copy.deepcopy(section)
        changed.options[name] = value
        others[name] = identity(changed)
    changed = copy.deepcopy(section)
    changed.encoder.config["hidden_act"] = "relu"
    others["activation"] = identity(changed)
    changed = copy.deepcopy(section)
    changed.encoder.preprocessor = {"resample": 2}
    others["preprocessor"] = identity(changed)
    assert identity(section) not in others.values()
    assert len(set(others.values())) == len(others)


def test_what_does_not_matter() -> None:
    section = modalities()["image"]
    changed = copy.deepcopy(section)
    changed.encoder.max_pieces_per_call, changed.projector.num_tokens, changed.cost_per_piece = 1, 4, 2.0
    assert identity(section) == identity(section) == identity(changed)


def test_versions_and_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    section = modalities()["image"]
    before = identity(section)
    with monkeypatch.context() as patch:
        patch.setattr(module, "version_of", lambda package: "9.9")
        assert identity(section) != before
    copied = tmp_path / "modalities"
    shutil.copytree(Path(module.modalities.__file__).parent, copied)
    with monkeypatch.context() as patch:
        patch.setattr(module.modalities, "__file__", str(copied / "__init__.py"))
        assert identity(section) == before
        (copied / "resizing.py").write_text((copied / "resizing.py").read_text() + "# another\n")
        assert identity(section) != before


def test_code_of_a_plug_in(tmp_path: Path) -> None:
    identities = []
    for number, line in enumerate(("", "# another version\n")):
        file = tmp_path / str(number) / "plugin.py"
        file.parent.mkdir()
        file.write_text(
            "from megatron_anymal.modalities.image import ImageModality\n"
            "from megatron_anymal.modalities import register\n"
            # Files of its own: the registration outlives the test.
            f'@register("own{number}")\nclass Own(ImageModality):\n    extensions = ("own{number}",)\n{line}'
        )
        load_plugins([str(file)])
        section = modalities()["image"]
        section.kind = f"own{number}"
        modality = build_modality("image", section)
        files = list(module._source_files(modality, seeded_encoder("image", section.encoder, modality, 0)))
        assert file in files
        identities.append(encoder_identity(modality, seeded_encoder("image", section.encoder, modality, 0)))
    assert len(set(identities)) == 2
