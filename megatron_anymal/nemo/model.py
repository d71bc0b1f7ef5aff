"""NeMo model class for configuration and construction; the engine's own loop trains it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch.distributed as dist
from lightning.pytorch import Trainer
from nemo.core.classes import ModelPT
from omegaconf import DictConfig, OmegaConf

from megatron_anymal.checkpoint.trust import refuse_plugins
from megatron_anymal.config import ConfigError, DatasetConfig, RunConfig
from megatron_anymal.config.compose import from_dict
from megatron_anymal.nemo import archive
from megatron_anymal.resilience.exit_codes import Exit

if TYPE_CHECKING:
    from megatron_anymal.parallel import ParallelLayout
    from megatron_anymal.safetensors_io import SafetensorsFile

# ModelPT keeps one configuration and refuses a key `model` in it, so the run's configuration is nested under this key.
RUN_KEY = "run"


def to_cfg(config: RunConfig) -> DictConfig:
    """Pack a configuration in the form used by ModelPT and in archives: `{"run": {trainer, exp_manager, ...}}`."""
    return OmegaConf.create({RUN_KEY: config.to_dict()})


def from_cfg(cfg: DictConfig) -> RunConfig:
    """Unpack a configuration packed by `to_cfg`.

    Raises:
        ConfigError: `cfg` has no section `run`, or the section has an unknown key or a value of the wrong type.
    """
    if RUN_KEY not in cfg:
        raise ConfigError(
            f"the configuration has no section `{RUN_KEY}`. Pass a RunConfig, or the result of restore_from(..., "
            "return_config=True)."
        )
    values = OmegaConf.to_container(cfg[RUN_KEY], resolve=True)
    assert isinstance(values, dict)
    return from_dict({str(key): value for key, value in values.items()}, f"section `{RUN_KEY}`")


class MegatronAnyMALModel(ModelPT):
    """AnyMAL on Megatron-Core: `MegatronAnyMALModel(config, trainer).fit()`.

    The parameters are held by megatron-core's sharded modules (`state.models`), built at the first use of `state`, not
    by this LightningModule: Lightning neither moves, wraps, counts nor saves them.

    Args:
        cfg: the run's configuration, or the result of `to_cfg`.
        trainer: an unfitted Lightning Trainer; `fit` uses its loggers. None logs to the run folder only.
        layout: this process's parallel layout if the engine is already set up; None sets it up at first use.

    Raises:
        ConfigError: `cfg` is not a valid configuration; see `from_cfg`.
    """

    def __init__(
        self, cfg: RunConfig | DictConfig, trainer: Trainer | None = None, layout: ParallelLayout | None = None
    ) -> None:
        config = cfg if isinstance(cfg, RunConfig) else from_cfg(cfg)
        super().__init__(cfg=to_cfg(config), trainer=trainer)
        self.config = config
        self.layout = layout
        self._state: Any = None
        # Weights of an archive, loaded when the model is built, and the folder with its other files.
        self._archived: SafetensorsFile | None = None
        self._unpacked: tempfile.TemporaryDirectory[str] | None = None

    @property
    def state(self) -> Any:
        """The engine's state (models, optimizer, data), built at first use. Collective.

        Raises:
            ConfigError: the configuration cannot be built in this environment.
            DataError, CheckpointError, StorageError: data or a checkpoint that it names cannot be used.
            RuntimeError: in place of an AttributeError, which torch would hide.
        """
        if self._state is None:
            try:
                self._build()
            except AttributeError as error:
                # torch would hide the error behind a message that there is no attribute "state".
                raise RuntimeError(f"The model could not be built: {error}.") from error
        return self._state

    def _build(self) -> None:
        from megatron_anymal.parallel import initialize
        from megatron_anymal.train.build import build, check_run

        check_run(self.config)
        self.layout = self.layout or initialize(self.config)
        self._state = build(self.config, self.layout)
        if self._archived is not None:
            from megatron_anymal.model.unsharded_weights import load_weights

            load_weights(self._state.models, self._archived)
            # The optimizer keeps fp32 copies of the weights it trains.
            self._state.optimizer.reload_model_params()
            self._archived = None

    def fit(self) -> Exit:
        """Train to trainer.max_steps in the engine's loop, resuming from the run folder's newest checkpoint.

        Returns:
            DONE, or REQUEUE if the run was asked to stop before its end.

        Raises:
            ConfigError, DataError, CheckpointError, StorageError: see `state` and `train.loop.fit`, which also names
                further errors.
        """
        from megatron_anymal.generation.validation_answers import SampledAnswers
        from megatron_anymal.planning.layouts.peak import peak_of_run
        from megatron_anymal.train.loop import fit

        loggers = list(self.trainer.loggers) if self._trainer is not None else []
        answers = (
            SampledAnswers(self.state, self.config.run_dir, loggers) if self.config.trainer.sampled_answers else None
        )
        trainer, device = self.config.trainer, self.state.layout.device
        peak = peak_of_run(trainer.gpu, self.config.model.fp8, trainer.precision, device)
        return fit(self.state, self.config.run_dir, loggers, answers, peak)

    def setup_training_data(self, train_data_config: DictConfig | Mapping[str, Any]) -> None:
        """Replace the training data. Must be called before the first use of `state`.

        Stages of `data.schedule` must name these datasets: change `config.data.schedule` if they do not.

        Args:
            train_data_config: in the form of the section `data.train`: name -> {"path": folder, "weight": share}.

        Raises:
            ConfigError: an unknown key or a value of the wrong type.
            RuntimeError: `state` has been used.
        """
        self.config.data.train = self._datasets("train", train_data_config)
        self._cfg = to_cfg(self.config)

    def setup_validation_data(self, val_data_config: DictConfig | Mapping[str, Any]) -> None:
        """Replace the validation data. Must be called before the first use of `state`.

        Args:
            val_data_config: in the form of the section `data.validation`: name -> {"path": folder, "weight": share}.

        Raises:
            ConfigError: an unknown key or a value of the wrong type.
            RuntimeError: `state` has been used.
        """
        self.config.data.validation = self._datasets("validation", val_data_config)
        self._cfg = to_cfg(self.config)

    def _datasets(self, split: str, section: DictConfig | Mapping[str, Any]) -> dict[str, DatasetConfig]:
        if self._state is not None:
            raise RuntimeError(f"data.{split} is already in use. Set it before fit() or the first use of `state`.")
        plain = OmegaConf.to_container(section, resolve=True) if isinstance(section, DictConfig) else section
        return getattr(from_dict({"data": {split: plain}}, f"setup of data.{split}").data, split)

    def save_to(self, save_path: str | Path) -> None:
        """Write a self-contained `.nemo` archive with all weights, gathered over the ranks, including frozen ones.

        A base in NF4 or FP8 is written as it was before it was quantized, which reads it again from where the run read
        it. Collective. Rank 0 needs memory for the whole model and writes the file. Returns on all ranks once the file
        is written.

        Raises:
            OSError: the file could not be written, or the unquantized base cannot be read any more or has changed;
                raised on every rank.
        """
        from megatron_anymal.model.unsharded_weights import gather_weights

        models = self.state.models
        failure: list[str] = [""]
        try:
            tensors = gather_weights(models, from_sources=True)
            if tensors is not None:
                config, folders = archive.portable(self.config, self._llama_keys())
                text = OmegaConf.to_yaml(to_cfg(config))
                archive.write(Path(save_path).expanduser().resolve(), text, folders, tensors)
        except (OSError, ValueError) as error:
            failure = [f"{save_path} could not be written: {error}"]
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.broadcast_object_list(failure, src=0)
        if failure[0]:
            raise OSError(failure[0])

    def _llama_keys(self) -> dict[str, Any]:
        """Keys of the Llama's configuration that differ from transformers' defaults."""
        return dict(self.state.llama.to_diff_dict())

    @classmethod
    def restore_from(
        cls,
        restore_path: str | Path,
        override_config_path: RunConfig | DictConfig | str | Path | None = None,
        trainer: Trainer | None = None,
        return_config: bool = False,
        layout: ParallelLayout | None = None,
        trust_plugins: bool = False,
    ) -> MegatronAnyMALModel | DictConfig:
        """Create the model from a `.nemo` archive; the weights are loaded, sharded, at the first use of `state`.

        Args:
            restore_path: the archive.
            override_config_path: replaces the archive's configuration, for another layout or other data: a
                configuration, or a YAML file in the archive's format. Its "nemo:" paths point into the archive.
            return_config: only return the archive's configuration.
            trust_plugins: import the plug-ins named in the archive's configuration.

        Raises:
            ConfigError: the archive does not exist, the configuration is not one of this model, or it names plug-ins
                that are not trusted.
        """
        folder = tempfile.TemporaryDirectory(prefix="nemo-")
        text, tensors = archive.read(Path(restore_path).expanduser().resolve(), Path(folder.name))
        cfg = OmegaConf.create(text)
        assert isinstance(cfg, DictConfig)
        if return_config:
            folder.cleanup()
            return cfg
        if override_config_path is None:
            origin, flag = f"the archive {str(restore_path)!r}", "trust_plugins=True"
            refuse_plugins(from_cfg(cfg).model.plugins, origin, flag, trust_plugins=trust_plugins)
        if isinstance(override_config_path, (str, Path)):
            loaded = OmegaConf.load(override_config_path)
            assert isinstance(loaded, DictConfig)
            cfg = loaded
        elif override_config_path is not None:
            cfg = override_config_path if isinstance(override_config_path, DictConfig) else to_cfg(override_config_path)
        model = cls(archive.unpacked(from_cfg(cfg), Path(folder.name)), trainer, layout)
        model._archived, model._unpacked = tensors, folder
        return model

    @classmethod
    def list_available_models(cls) -> None:
        """Return None: there are no trained models to download."""
        return None

    def setup(self, stage: str | None = None) -> NoReturn:
        """Refuse Lightning's loop.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            f"trainer.{stage or 'fit'}(model) does not work for this model, because the engine has its own loop, "
            "checkpoints and step counter. Call model.fit()."
        )

    def training_step(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse Lightning's loop.

        Raises:
            RuntimeError: always.
        """
        self.setup("fit")
