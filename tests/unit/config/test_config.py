"""The schema's own checks, and every shipped YAML against the paper."""

import dataclasses
from pathlib import Path

import pytest

from megatron_anymal.config import ConfigError, DatasetConfig, ModalityConfig, RunConfig
from megatron_anymal.config.compose import compose, default_config_dir, from_dict
from megatron_anymal.config.validation import check, max_time_seconds

SHIPPED = sorted(path.stem for path in default_config_dir().glob("*.yaml"))

# AnyMAL, Table 11: batch size, initial learning rate, steps, tokens per input, projector type, projector layers.
TABLE_11 = {
    "pretrain_70b_image": (26880, 2e-4, 25_000, 64, "resampler", 12),
    "pretrain_13b_audio": (128, 1e-4, 1_000, 32, "linear", 1),
    "pretrain_70b_audio": (128, 1e-4, 1_000, 32, "linear", 1),
    "pretrain_13b_video": (1024, 1e-4, 20_000, 32, "resampler", 4),
    "pretrain_70b_video": (1024, 1e-4, 20_000, 32, "resampler", 4),
    "pretrain_8b_imu": (256, 1e-4, 2_000, 32, "linear", 1),
    # Not in the table: taken from the row of 13B, image.
    "pretrain_8b_image": (2048, 2e-4, 100_000, 64, "resampler", 6),
}
# Llamas, from their config.json: layers, attention heads, key-value heads, feed-forward width, vocabulary.
LLAMAS = {
    "8b": (32, 32, 8, 14336, 128256),
    "13b": (40, 40, 40, 13824, 32000),
    "70b": (80, 64, 8, 28672, 128256),
}
ENCODERS = {"image": {"clip", "dinov2"}, "video": {"videomae"}, "audio": {"clap"}, "imu": {"imu2clip"}}


# AnyMAL, section E.3: batch size, learning rate, warm-up, schedule, final rate ratio, NEFTune's alpha; LoRA r and
# alpha.
TUNING = {
    "sft": (128, 5e-5, 40, "cosine", 0.1, 10, 8, 32),
    "dpo": (32, 1e-5, 20, "linear", 2 / 3, 10, 8, 32),
}


def valid() -> RunConfig:
    return from_dict(
        {
            "model": {
                "language_model": {"config": {"hidden_size": 64}},
                "modalities": {
                    "image": {"encoder": {"type": "clip"}, "placeholder": "<a>"},
                    "audio": {"encoder": {"type": "clap"}, "placeholder": "<b>"},
                },
            },
            "data": {"tokenizer": "tok", "train": {"a": {"path": "p"}}},
        }
    )


def test_all_that_should_be_shipped_is():
    assert set(SHIPPED) >= {*TABLE_11, "quickstart"}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_yaml_passes_the_checks(name):
    config = compose(name, default_config_dir(), []).config
    check(config)
    assert config.data.train
    if name.startswith("pretrain"):
        assert config.data.validation and config.model.modalities
    assert config.world_size % config.model.model_parallel_size == 0


@pytest.mark.parametrize("name", sorted(TABLE_11))
def test_shipped_yaml_has_the_papers_numbers(name):
    config = compose(name, default_config_dir(), []).config
    modality = name.split("_")[2]
    batch, rate, steps, tokens, projector, layers = TABLE_11[name]
    assert list(config.model.modalities) == [modality]
    part = config.model.modalities[modality]
    assert config.model.global_batch_size == batch
    assert config.model.optim.lr == rate
    assert config.trainer.max_steps == steps
    assert (part.projector.num_tokens, part.projector.type, part.projector.num_layers) == (tokens, projector, layers)
    assert part.encoder.type in ENCODERS[modality] and part.encoder.freeze and not part.projector.freeze
    assert config.model.language_model.freeze and config.model.language_model.load_weights


# Rows of Table 11 for the alignments that share a run.
ALIGNED = {
    "image": "pretrain_8b_image",
    "audio": "pretrain_13b_audio",
    "video": "pretrain_13b_video",
    "imu": "pretrain_8b_imu",
}


@pytest.mark.parametrize("modality", ALIGNED)
def test_alignments_in_one_run_have_the_numbers_of_their_own_files(modality):
    config = compose("align_all_8b", default_config_dir(), []).config
    own = compose(ALIGNED[modality], default_config_dir(), []).config
    alignment, theirs = config.model.multiplex[modality], own.model.modalities[modality]
    assert alignment.global_batch_size == TABLE_11[ALIGNED[modality]][0] == own.model.global_batch_size
    assert alignment.optim == own.model.optim and alignment.gradient_clip_val == own.trainer.gradient_clip_val
    assert (alignment.max_steps or config.trainer.max_steps) == own.trainer.max_steps
    assert alignment.datasets == list(own.data.train)
    part = config.model.modalities[modality]
    assert (part.encoder, part.projector, part.options) == (theirs.encoder, theirs.projector, theirs.options)
    assert list(config.model.multiplex) == list(ALIGNED)


@pytest.mark.parametrize("name", sorted(TABLE_11))
def test_shipped_layouts_divide_their_llama(name):
    config = compose(name, default_config_dir(), []).config
    layers, heads, kv_heads, ffn, _ = LLAMAS[name.split("_")[1]]
    tensor, stages = config.model.tensor_model_parallel_size, config.model.pipeline_model_parallel_size
    assert config.trainer.devices == 8 and tensor <= 8
    assert [size % tensor for size in (heads, kv_heads, ffn)] == [0, 0, 0] and layers % stages == 0
    assert config.model.global_batch_size % config.data_parallel_size == 0
    assert config.data.seq_length <= (4096 if "13b" in name else 8192)
    (part,) = config.model.modalities.values()
    if part.projector.type == "resampler":
        assert part.projector.num_attention_heads % tensor == 0


@pytest.mark.parametrize("byte", range(0xF5, 0x100))
def test_llama_2_placeholders_are_bytes_that_no_text_holds(byte):
    with pytest.raises(UnicodeDecodeError):
        bytes([byte]).decode()
    starts_nothing = (bytes([byte]) + tail for tail in (b"\x80", b"\x80\x80", b"\x80\x80\x80", b"\x90\x80\x80"))
    for sequence in starts_nothing:
        with pytest.raises(UnicodeDecodeError):
            sequence.decode()


def test_placeholders_differ_between_modalities_of_one_vocabulary():
    seen: dict[tuple[bool, str], str] = {}
    for name in TABLE_11:
        config = compose(name, default_config_dir(), []).config
        for modality, part in config.model.modalities.items():
            key = ("13b" in name, part.placeholder)
            assert seen.setdefault(key, modality) == modality


@pytest.mark.parametrize("size", ["8b", "70b"])
@pytest.mark.parametrize("job", TUNING)
def test_tuning_has_the_papers_numbers(job, size):
    config = compose(f"{job}_{size}", default_config_dir(), []).config
    model, optim = config.model, config.model.optim
    sched = optim.sched
    hyperparameters = (model.global_batch_size, optim.lr, sched.warmup_steps, sched.name, sched.min_lr_ratio)
    assert (*hyperparameters, model.neftune.alpha, model.lora.r, model.lora.alpha) == pytest.approx(TUNING[job])
    assert config.job == job and model.lora.targets == ["*"]
    assert [m.projector.freeze for m in model.modalities.values()] == [job == "dpo"]
    if job == "sft":
        assert config.trainer.max_steps == 3000
        assert {name: d.weight for name, d in config.data.train.items()} == {"annotated": 60, "synthetic": 150}
    else:
        # One epoch over 11,000 pairs.
        assert config.trainer.max_steps == -(-11_000 // 32)
        assert (model.dpo.label_smoothing, model.dpo.beta) == (0.05, 0.1)


def preferring():
    config = valid()
    config.job, config.model.lora.r, config.model.restore_from_path = "dpo", 8, "runs/sft"
    for modality in config.model.modalities.values():
        modality.projector.freeze = True
    return config


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("model.dpo.beta", 0.0, "above 0"),
        ("model.dpo.label_smoothing", 0.5, "less than 0.5"),
        ("model.dpo.reference", "none", "'cached'"),
        ("model.loss_normalization", "sample", "counts pairs"),
        ("model.lora.r", 0, "needs model.lora"),
        ("model.restore_from_path", "", "needs model.lora"),
        ("model.lora.alpha", 0.0, "above 0"),
        ("model.lora.dropout", 1.0, "less than 1"),
        ("model.lora.targets", [], "nothing would be adapted"),
        ("model.language_model.freeze", False, "adapters to a frozen Llama"),
        ("model.neftune.embeddings", "soft", "'all', 'text'"),
    ],
)
def test_bad_tuning_is_refused(key, value, says):
    config = preferring()
    check(config)
    set_value(config, key, value)
    with pytest.raises(ConfigError, match=says) as caught:
        check(config)
    assert key.split(".")[1] in str(caught.value)


def test_dpo_trains_adapters_only():
    config = preferring()
    config.model.modalities["audio"].projector.freeze = False
    with pytest.raises(ConfigError, match=r"set model\.modalities\.audio\.projector\.freeze"):
        check(config)


def test_valid_config_passes():
    check(valid())


def set_value(config: RunConfig, key: str, value: object) -> None:
    *parents, last = key.split(".")
    node = config
    for part in parents:
        node = node[part] if isinstance(node, dict) else getattr(node, part)
    setattr(node, last, value)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("trainer.precision", "fp16", "'32', 'bf16'"),
        ("model.fp8", "e5m2", "'hybrid', 'e4m3'"),
        ("model.base_quantization", "int8", "'nf4'"),
        ("model.transformer_impl", "te", "'transformer_engine'"),
        ("model.optim.sched.name", "step", "'cosine'"),
        ("data.too_long", "cut", "'refuse', 'drop'"),
        ("trainer.devices", 0, "at least 1"),
        ("model.optim.lr", -1.0, "at least 0"),
        ("model.context_parallel_size", 2, "do not divide"),
        ("model.virtual_pipeline_model_parallel_size", 2, r"needs model\.pipeline_model_parallel_size > 1"),
        ("model.attention", "flash", "'flash_attn'"),
        ("model.overlap_p2p_comm", False, "no effect without a virtual pipeline"),
        ("model.dpo.beta", 0.2, r"dpo has no effect on the job pretrain.*job=dpo"),
        ("model.memory_gb", -1.0, "memory_gb=-1.0 must be at least 0"),
        ("trainer.sampled_answers", 4, r"no validation samples to answer.*data\.validation"),
        ("model.sequence_parallel", True, "tensor_model_parallel_size > 1"),
        ("model.num_layers_in_first_pipeline_stage", 2, "pipeline_model_parallel_size > 1"),
        ("model.optim.betas", [0.9], "two numbers"),
        ("exp_manager.max_time_per_run", "864000", "DD:HH:MM:SS"),
        ("data.tokenizer", "", "HuggingFace tokenizer"),
    ],
)
def test_bad_value_names_the_key_and_the_mend(key, value, says):
    config = valid()
    set_value(config, key, value)
    with pytest.raises(ConfigError, match=says) as caught:
        check(config)
    assert key.split(".")[1] in str(caught.value)


@pytest.mark.parametrize(("devices", "tensor", "stages"), [(6, 4, 1), (8, 3, 1), (4, 2, 3)])
def test_sizes_that_do_not_divide(devices, tensor, stages):
    config = valid()
    config.trainer.devices = devices
    config.model.tensor_model_parallel_size, config.model.pipeline_model_parallel_size = tensor, stages
    with pytest.raises(ConfigError, match=f"= {devices} processes do not divide into replicas.*= {tensor * stages}"):
        check(config)


def test_an_interval_between_copies_that_are_off() -> None:
    config = valid()
    config.resilience.peer_memory_interval = 2
    check(config)
    config.resilience.peer_memory = False
    with pytest.raises(ConfigError, match=r"peer_memory_interval=2 has no effect with resilience\.peer_memory=false"):
        check(config)


def test_one_format_for_products() -> None:
    config = valid()
    config.model.fp4 = "e2m1"
    check(config)
    config.model.fp8 = "hybrid"
    with pytest.raises(ConfigError, match=r"model\.fp8=hybrid and model\.fp4=e2m1 are mutually exclusive"):
        check(config)


def test_weights_in_mxfp8_would_take_more_than_in_bf16() -> None:
    config = valid()
    config.model.fp8, config.model.fp8_recipe = "e4m3", "mxfp8"
    check(config)
    config.model.fp8_primary_weights = True
    with pytest.raises(ConfigError, match=r"fp8_primary_weights=true does not save memory.*mxfp8.*2\.06 bytes"):
        check(config)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("model.language_model.freeze", False, r"needs a frozen Llama, but model\.language_model\.freeze=false"),
        ("model.fp8", "hybrid", r"model\.fp8=hybrid are mutually exclusive"),
        ("model.fp4", "e2m1", r"model\.fp4=e2m1 are mutually exclusive"),
        (
            "model.transformer_impl",
            "transformer_engine",
            r"transformer_impl=transformer_engine do not compute with NF4",
        ),
    ],
)
def test_nf4_is_for_a_frozen_llama_of_local_layers(key: str, value: object, says: str) -> None:
    config = valid()
    config.model.base_quantization = "nf4"
    check(config)
    set_value(config, key, value)
    with pytest.raises(ConfigError, match=r"model\.base_quantization=nf4.*" + says):
        check(config)


def test_two_stages_of_chunks_need_overlapped_messages() -> None:
    """`findings/virtual_pipeline_of_two_stages.sh` shows what megatron-core computes otherwise."""
    config = valid()
    config.model.overlap_p2p_comm, config.model.virtual_pipeline_model_parallel_size = False, 2
    config.trainer.devices = config.model.pipeline_model_parallel_size = 2
    with pytest.raises(ConfigError, match=r"overlap_p2p_comm=false with a virtual pipeline of two stages"):
        check(config)
    config.trainer.devices = config.model.pipeline_model_parallel_size = 4
    check(config)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"pipeline_model_parallel_size": 1}, r"but model\.pipeline_model_parallel_size=1"),
        ({"modalities": {}}, r"no effect without model\.modalities"),
        ({"trains": "audio"}, r"the encoder of 'audio' trains.*model\.modalities\.audio\.encoder\.freeze=true"),
        ({"encoder_placement": "last_stage"}, r"encoder_placement='last_stage' is not one of"),
    ],
)
def test_encoders_on_all_stages_need_stages_and_frozen_encoders(change: dict[str, object], says: str) -> None:
    config = valid()
    config.trainer.devices = config.model.pipeline_model_parallel_size = 2
    config.model.encoder_placement = "all_stages"
    check(config)
    for name, value in change.items():
        if name == "trains":
            config.model.modalities[str(value)].encoder.freeze = False
        else:
            setattr(config.model, name, value)
    with pytest.raises(ConfigError, match=says):
        check(config)


def test_a_pack_length_that_context_parallel_ranks_cannot_share():
    config = valid()
    config.trainer.devices = config.model.context_parallel_size = 4
    config.data.seq_length = 1020
    with pytest.raises(ConfigError, match=r"data\.seq_length=1020 must be a multiple of 8.*context_parallel_size=4"):
        check(config)
    config.data.seq_length = 1024
    check(config)


def test_one_placeholder_for_two_modalities():
    config = valid()
    config.model.modalities["audio"].placeholder = "<a>"
    with pytest.raises(ConfigError, match=r"model\.modalities\.audio\.placeholder.*'image'"):
        check(config)


def test_no_or_two_language_models():
    for change in ({"config": {}}, {"path": "x"}):
        config = valid()
        config.model.language_model = dataclasses.replace(config.model.language_model, **change)
        with pytest.raises(ConfigError, match="exactly one of path"):
            check(config)


def test_modality_without_encoder_and_dataset_without_path():
    config = valid()
    config.model.modalities["video"] = ModalityConfig(placeholder="<c>")
    with pytest.raises(ConfigError, match=r"model\.modalities\.video\.encoder\.type is empty"):
        check(config)
    config = valid()
    config.data.validation["b"] = DatasetConfig()
    with pytest.raises(ConfigError, match=r"data\.validation\.b\.path is empty"):
        check(config)


def test_max_time():
    config = valid()
    assert max_time_seconds(config.exp_manager) is None
    config.exp_manager.max_time_per_run = "01:02:03:04"
    assert max_time_seconds(config.exp_manager) == 86400 + 2 * 3600 + 3 * 60 + 4


def test_run_dir():
    config = valid()
    config.exp_manager.exp_dir, config.exp_manager.name = "a", "b"
    assert config.run_dir == Path("a/b")
    config.exp_manager.explicit_log_dir = "c"
    assert config.run_dir == Path("c")


@pytest.mark.parametrize(
    "name,value", [("recompute_method", "block"), ("recompute_num_layers", 2), ("recompute_modules", ["mlp"])]
)
def test_what_auto_chooses_cannot_be_named_too(name, value):
    config = compose("pretrain_8b_image", default_config_dir(), ["model.recompute_granularity=auto"]).config
    check(config)
    setattr(config.model, name, value)
    with pytest.raises(ConfigError, match=f"model.{name} has no effect with model.recompute_granularity=auto"):
        check(config)
