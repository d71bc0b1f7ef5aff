"""Run under torchrun by test_archive.py: `save FOLDER` writes an archive, `restore FOLDER` reads it in one process."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from megatron_anymal.config import AnyMALConfig
from megatron_anymal.config_io import from_dict
from megatron_anymal.model.weights import gather_weights
from megatron_anymal.nemo.model import MegatronAnyMALModel, from_cfg
from megatron_anymal.parallel import shutdown


def gathered(model: MegatronAnyMALModel) -> dict[str, torch.Tensor] | None:
    tensors = gather_weights(model.state.models)
    return None if tensors is None else {name: tensor.contiguous() for name, tensor in tensors.items()}


def save(folder: Path) -> None:
    config: AnyMALConfig = from_dict(json.loads((folder / "config.json").read_text()))
    model = MegatronAnyMALModel(config)
    model.fit()
    model.save_to(folder / "saved" / "model.nemo")
    # On every rank: the file is there when save_to returns.
    assert (folder / "saved" / "model.nemo").is_file()
    tensors = gathered(model)
    if tensors is not None:
        save_file(tensors, folder / "expected.safetensors")


def restore(folder: Path) -> None:
    archive = folder / "saved" / "model.nemo"
    cfg: Any = MegatronAnyMALModel.restore_from(archive, return_config=True)
    config = from_cfg(cfg)
    config.trainer.devices, config.model.tensor_model_parallel_size = 1, 1
    config.exp_manager.explicit_log_dir = str(folder / "restored")
    # Nothing may come from the initial values.
    config.trainer.max_steps, config.model.seed = 1, 999
    model = MegatronAnyMALModel.restore_from(archive, override_config_path=config)
    assert isinstance(model, MegatronAnyMALModel)
    tensors, expected = gathered(model), load_file(folder / "expected.safetensors")
    assert tensors is not None and set(tensors) == set(expected)
    different = [name for name, tensor in tensors.items() if not torch.equal(tensor, expected[name])]
    assert not different, different
    # The optimizer starts from the restored weights, not from those it was built with: one step moves none far.
    model.fit()
    trained = gathered(model)
    assert trained is not None
    assert any(not torch.equal(tensor, expected[name]) for name, tensor in trained.items())
    moved = [name for name, tensor in trained.items() if not torch.allclose(tensor, expected[name], rtol=0, atol=0.05)]
    assert not moved, moved
    print("RESTORED", len(expected))


if __name__ == "__main__":
    {"save": save, "restore": restore}[sys.argv[1]](Path(sys.argv[2]))
    shutdown()
