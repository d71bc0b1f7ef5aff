"""Composition: unknown keys, types, origins, inheritance, and agreement with NeMo's hydra_runner."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from nemo.core.config import hydra_runner
from omegaconf import OmegaConf
from ranks import run_ranks

from megatron_anymal.__main__ import main
from megatron_anymal.config import ConfigError, RunConfig
from megatron_anymal.config.compose import compose, default_config_dir, format_config, from_dict, register_schema

SHIPPED = sorted(path.stem for path in default_config_dir().glob("*.yaml"))

BASE = """
defaults: [anymal, _self_]
trainer: {max_steps: 7, precision: 32}
model:
  optim: {lr: 1e-4}
  modalities:
    image:
      placeholder: <a>
      encoder: {type: clip, config: {hidden_size: 8, deep: {x: 1}}}
data:
  train: {captions: {path: p}}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "base.yaml").write_text(BASE)
    return tmp_path


def test_from_dict_is_the_inverse_of_to_dict(folder):
    config = compose("base", folder, []).config
    assert from_dict(config.to_dict()) == config
    assert from_dict({}) == RunConfig()


@pytest.mark.parametrize(
    ("mapping", "says"),
    [
        ({"trainer": {"num_node": 1}}, r"trainer\.num_node .*Did you mean trainer\.num_nodes"),
        ({"model": {"lr": 1}}, r"model\.lr .*Did you mean model\.optim\.lr"),
        ({"modle": {}}, r"unknown key modle .*Did you mean model\?"),
        ({"model": {"modalities": {"image": {"projector": {"num_token": 1}}}}}, r"image\.projector\.num_tokens\?"),
        ({"data": {"train": {"x": {"pth": ""}}}}, r"data\.train\.x\.pth .*data\.train\.x\.path\?"),
        ({"data": {"qqqq": 1}}, "data holds train, validation, schedule, tokenizer"),
    ],
)
def test_unknown_key_names_the_nearest(mapping, says):
    with pytest.raises(ConfigError, match=says) as caught:
        from_dict(mapping, "my source")
    assert "(my source)" in str(caught.value)


@pytest.mark.parametrize(
    ("mapping", "says"),
    [
        ({"trainer": {"num_nodes": "four"}}, r"trainer\.num_nodes='four'.* whole number, not text"),
        ({"trainer": {"num_nodes": 1.5}}, r"trainer\.num_nodes=1\.5.* whole number"),
        ({"trainer": {"num_nodes": True}}, r"trainer\.num_nodes=True.* whole number"),
        ({"trainer": {"gradient_clip_val": "much"}}, "must be a number"),
        ({"trainer": {"precision": 1.5}}, "must be text"),
        ({"model": {"sequence_parallel": 1}}, "must be true or false"),
        ({"model": {"optim": {"betas": 0.9}}}, r"model\.optim\.betas=0\.9.* a list"),
        ({"model": {"optim": {"betas": [0.9, "x"]}}}, r"model\.optim\.betas\[1\]='x'"),
        ({"model": {"optim": None}}, r"model\.optim=None.* section.* empty"),
        ({"data": {"train": {"x": "folder"}}}, r"data\.train\.x='folder'.* section"),
        ({"model": {"language_model": {"config": [1]}}}, r"language_model\.config=\[1\].* section"),
    ],
)
def test_wrong_type_names_key_value_and_type(mapping, says):
    with pytest.raises(ConfigError, match=says):
        from_dict(mapping)


def test_number_formats():
    config = from_dict({"model": {"optim": {"lr": "1e-4", "eps": 1}}, "trainer": {"precision": 32}})
    assert config.model.optim.lr == 1e-4 and isinstance(config.model.optim.eps, float)
    assert config.trainer.precision == "32"


def test_free_form_dicts_take_any_key(folder):
    composed = compose(
        "base", folder, ["+model.language_model.config.any.thing=[1,2]", "+exp_manager.wandb_logger_kwargs.p=q"]
    )
    assert composed.config.model.language_model.config == {"any": {"thing": [1, 2]}}
    assert composed.config.exp_manager.wandb_logger_kwargs == {"p": "q"}
    assert composed.config.model.modalities["image"].encoder.config == {"hidden_size": 8, "deep": {"x": 1}}


def test_unknown_key_in_a_file_names_file_and_nearest(folder):
    (folder / "child.yaml").write_text("defaults: [base, _self_]\nmodel: {optim: {learning_rate: 1, weight_decy: 0}}\n")
    with pytest.raises(ConfigError, match=r"model\.optim\.learning_rate \(file .*child\.yaml\)"):
        compose("child", folder, [])
    (folder / "child.yaml").write_text("defaults: [base, _self_]\nmodel: {optim: {weight_decy: 0}}\n")
    with pytest.raises(ConfigError, match=r"Did you mean model\.optim\.weight_decay"):
        compose("child", folder, [])


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("trainer.num_node=4", r"override 'trainer\.num_node=4'\)\. Did you mean trainer\.num_nodes"),
        ("+trainer.num_node=4", r"Did you mean trainer\.num_nodes"),
        ("++data.train.captions.wieght=4", r"Did you mean data\.train\.captions\.weight"),
        ("trainer.num_nodes=x", "whole number"),
        ("trainer={num_nodes: x}", r"trainer\.num_nodes='x'"),
        ("trainer.num_nodes=1,2", "several values"),
        ("trainer.num_nodes", "key=value"),
        ("+trainer.num_nodes=2", "already at 'trainer.num_nodes'"),
        ("~trainer.num_nodes", "only entries of a dict"),
        ("~model.modalities.audio", r"no entry 'audio' \(it holds image\)"),
        ("data.train.caption.path=x", r"no entry 'caption'.*data\.train\.captions\?.*put \+"),
        ("model.language_model.config.a=1", r"\+model\.language_model\.config\.a=1"),
    ],
)
def test_bad_override(folder, override, says):
    with pytest.raises(ConfigError, match=says) as caught:
        compose("base", folder, [override])
    assert "\n" not in str(caught.value)


def test_overrides_work_as_nemo_users_expect(folder):
    composed = compose(
        "base",
        folder,
        [
            "trainer.num_nodes=4",
            "model.optim.betas=[0.8,0.9]",
            # A default of an entry that the file adds.
            "model.modalities.image.projector.num_layers=3",
            "+data.train.extra.path=q",
            "data.train.extra.weight=0.5",
            "+model.modalities.imu={placeholder: '<b>', encoder: {type: imu2clip}}",
        ],
    )
    config = composed.config
    assert config.trainer.num_nodes == 4 and config.model.optim.betas == [0.8, 0.9]
    assert config.model.modalities["image"].projector.num_layers == 3
    assert (config.data.train["extra"].path, config.data.train["extra"].weight) == ("q", 0.5)
    assert config.model.modalities["imu"].encoder.type == "imu2clip"
    removed = compose("base", folder, ["~model.modalities.image", "~data.train.captions"])
    assert removed.config.model.modalities == {} and removed.config.data.train == {}
    assert not [key for key in removed.origins if "captions" in key or "image" in key]


def test_interpolation(folder):
    (folder / "child.yaml").write_text(
        "defaults: [base, _self_]\n"
        "trainer: {val_check_interval: '${trainer.max_steps}'}\nmodel: {seed: '${data.tokenizer}'}\n"
    )
    assert compose("child", folder, ["model.seed=1"]).config.trainer.val_check_interval == 7
    with pytest.raises(ConfigError, match=r"model\.seed='tok'"):
        compose("child", folder, ["data.tokenizer=tok"])
    with pytest.raises(ConfigError, match="nothing"):
        compose("child", folder, ["model.seed=${nothing}"])


def test_origins(folder):
    (folder / "child.yaml").write_text("defaults: [base, _self_]\ntrainer: {max_steps: 9}\n")
    composed = compose("child", folder, ["trainer.num_nodes=4", "+data.train.extra.path=q"])
    where = composed.origins
    name = folder.name
    assert where["trainer.max_steps"] == f"file {name}/child.yaml" and composed.config.trainer.max_steps == 9
    assert where["trainer.precision"] == where["model.modalities.image.encoder.type"] == f"file {name}/base.yaml"
    assert where["model.modalities.image.encoder.config.deep.x"] == f"file {name}/base.yaml"
    assert where["trainer.num_nodes"] == where["data.train.extra.path"] == "override"
    assert where["data.train.extra.weight"] == where["model.seed"] == where["model.language_model.config"] == "default"


def test_inherits_a_shipped_file_from_any_folder(folder):
    (folder / "mine.yaml").write_text("defaults: [pretrain_8b_imu, _self_]\ntrainer: {devices: 4}\n")
    composed = compose("mine", folder, [])
    assert (composed.config.trainer.devices, composed.config.trainer.max_steps) == (4, 2000)
    assert composed.origins["trainer.max_steps"] == "file nemo_configs/pretrain_8b_imu.yaml"


def test_file_mistakes(folder):
    with pytest.raises(ConfigError, match="Did you mean base"):
        compose("bse", folder, [])
    (folder / "bare.yaml").write_text("trainer: {max_steps: 9}\n")
    with pytest.raises(ConfigError, match=r"defaults: \[anymal, _self_\]"):
        compose("bare", folder, [])
    (folder / "broken.yaml").write_text("trainer: {max_steps: 9\n")
    with pytest.raises(ConfigError, match=r"broken\.yaml"):
        compose("broken", folder, [])
    (folder / "orphan.yaml").write_text("defaults: [anymal, nowhere, _self_]\n")
    with pytest.raises(ConfigError, match="nowhere"):
        compose("orphan", folder, [])


def test_print_config(folder, capsys, monkeypatch):
    monkeypatch.chdir("/")
    code = main(["pretrain", f"--config-path={folder}", "--config-name=base", "--print-config", "trainer.devices=2"])
    lines = capsys.readouterr().out.splitlines()
    assert code == 0
    composed = compose("base", folder, ["trainer.devices=2"])
    assert lines == format_config(composed).splitlines() and len(lines) == len(composed.origins)
    rows = {line.split()[0]: line for line in lines}
    assert rows["trainer.devices"].split() == ["trainer.devices", "2", "override"]
    assert rows["model.seed"].split() == ["model.seed", "1234", "default"]
    assert rows["trainer.precision"].endswith(f"file {folder.name}/base.yaml")
    assert (
        len({line.index("override" if "override" in line else "default") for line in lines if "file" not in line}) == 1
    )


@pytest.mark.parametrize("argument", ["trainer.num_node=4", "--config-path=/nowhere"])
def test_user_error_is_one_line_and_exit_code_2(folder, argument, capsys):
    given = ["pretrain", f"--config-path={folder}", "--config-name=base", "--print-config", argument]
    assert main(given) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    "verb",
    [["pretrain"], ["launch", "sft"], ["inspect"], ["encode"], ["plan", "--gpus=8", "--gpu=h100-80gb"]],
    ids=lambda words: words[0],
)
def test_every_command_names_a_configuration_folder_that_is_missing(
    verb: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*verb, "--config-path=/nowhere", "--config-name=base"]) == 2
    assert "--config-path=/nowhere: there is no folder /nowhere." in capsys.readouterr().err


def composed_by_hydra_runner(name: str, overrides: list[str]) -> RunConfig:
    """In a separate process: the configuration that NeMo's hydra_runner passes to its task."""
    register_schema()
    sys.argv = ["x", *overrides]
    received: list[Any] = []
    hydra_runner(config_path=str(default_config_dir()), config_name=name)(received.append)()
    return from_dict(OmegaConf.to_container(received[0], resolve=True))


@pytest.mark.parametrize("name", SHIPPED)
def test_agrees_with_nemos_hydra_runner(name):
    given = ["trainer.num_nodes=2", "+data.train.extra.path=q", "model.optim.sched.min_lr_ratio=0.5"]
    composed = compose(name, default_config_dir(), given)
    assert composed.config.trainer.num_nodes == 2 and composed.config.data.train["extra"].path == "q"
    assert run_ranks(1, composed_by_hydra_runner, name, given) == [composed.config]


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("hydra.verbose=true", "hydra.verbose"),
        ("hydra/job_logging=none", "hydra/job_logging"),
        ("+hydra.searchpath=x", "hydra.searchpath"),
    ],
)
def test_hydras_own_keys_are_refused_as_overrides(folder, override, key):
    with pytest.raises(ConfigError, match=f"override '{re.escape(override)}': {key} has no effect: .*Remove it"):
        compose("base", folder, [override])


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ("defaults: [anymal, _self_]\nhydra: {run: {dir: x}}\n", "hydra.run"),
        ("defaults: [anymal, _self_, override hydra/job_logging: none]\n", "hydra/job_logging"),
        ("defaults: [anymal, _self_, override /hydra/help: default]\n", "hydra/help"),
    ],
)
def test_hydras_own_keys_are_refused_in_files(folder, section, key):
    (folder / "own.yaml").write_text(section)
    with pytest.raises(ConfigError, match=rf"file {folder.name}/own\.yaml: {key} has no effect: .*Remove it"):
        compose("own", folder, [])
