"""Stages of the training data: composed from YAML and overrides, and every setting without effect is refused."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from megatron_anymal.config import ConfigError, DatasetConfig, RunConfig
from megatron_anymal.config.compose import compose, default_config_dir, from_dict
from megatron_anymal.config.validation import check

# MIO (Table 2, section 2.2, appendix B): steps, GPUs, weights, warm-up of 3 %.
MIO = {
    "align": (24_800, 128, {"image_text": 12, "text": 2, "speech": 2}, 744),
    "interleave": (12_800, 128, {"image_text": 2, "text": 2, "interleaved": 6, "speech": 6}, 384),
    "speech": (32_200, 8, {"image_text": 2, "text": 1, "interleaved": 1, "speech": 12}, 966),
}


def run(schedule: Any, **train: Any) -> RunConfig:
    datasets = {"pictures": {"path": "a"}, "text": {"path": "b"}, **train}
    return from_dict(
        {
            "trainer": {"max_steps": 10},
            "model": {"language_model": {"config": {"hidden_size": 64}}},
            "data": {"tokenizer": "t", "train": datasets, "schedule": schedule},
        }
    )


def stage(steps: int = 0, **more: Any) -> dict[str, Any]:
    return {"steps": steps, "weights": {"pictures": 1, "text": 2}, **more}


def test_schedules_that_work() -> None:
    check(run([stage()]))
    check(run([stage(4, name="a"), stage(6, name="b", by="token")]))
    check(run([stage(4, weights={"text": 1}), stage(weights={"pictures": 1, "text": 0})]))
    typed = {"path": "c", "type": "pairs", "weight": 3}
    check(run([stage(weights={"pairs": 12, "pictures": 1, "text": 1})], cc3m=typed, sbu=typed))
    # A stage may also name one dataset of a type.
    check(run([stage(3), stage(weights={"cc3m": 1}), stage(weights={"pairs": 1})][::2], cc3m=typed, sbu=typed))
    check(run([stage(3, weights={"cc3m": 1, "pictures": 1}), stage(weights={"pairs": 1, "text": 1})], cc3m=typed))


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ([{"weights": {}}], r"data.schedule\[0\].weights uses no dataset. Give a weight .* of pictures, text"),
        ([stage(weights={"text": 0})], r"data.schedule\[0\].weights uses no dataset"),
        ([stage(3), {"steps": 7}], r"data.schedule\[1\].weights uses no dataset"),
        (
            [stage(weights={"picture": 1, "text": 1})],
            r"data.schedule\[0\].weights names 'picture', which is neither a dataset of data.train \(pictures, "
            r"text\) nor the type of one \(none\). Did you mean pictures\?",
        ),
        ([stage(weights={"pictures": -1, "text": 1})], r"data.schedule\[0\].weights.pictures=-1.0 must be at least 0"),
        ([stage(weights={"pictures": float("nan"), "text": 1})], r"weights.pictures=nan must be at least 0"),
        ([stage(weights={"pictures": 1e-6, "text": 1})], r"weights.pictures=1e-06 is less than 1e-05 of the mix"),
        ([stage(weights={"text": 1})], r"data.train.pictures has a weight above 0 in no stage of data.schedule"),
        ([stage(by="word")], r"data.schedule\[0\].by='word' is not one of sample, token"),
        ([stage(-1)], r"data.schedule\[0\].steps=-1 must be at least 0"),
        ([stage(), stage(10)], r"data.schedule\[0\].steps is missing: only the last stage may leave it out"),
        ([stage(4), stage(5)], r"have 9 steps, but trainer.max_steps=10. Set trainer.max_steps=9, or remove data.s.*1"),
        ([stage(4), stage(7)], r"have 11 steps, but trainer.max_steps=10"),
        ([stage(10), stage()], r"ends at trainer.max_steps=10, before the last stage of data.schedule begins at .* 10"),
        ([stage(5, name="a"), stage(5, name="a")], r"data.schedule\[1\].name='a' is also the name of an earlier stage"),
        ([{**stage(), "shares": 1}], r"unknown key data.schedule\[0\].shares"),
        (
            [{**stage(), "weigths": {}}],
            r"unknown key data.schedule\[0\].weigths.* Did you mean data.schedule\[0\].weig",
        ),
        ({"a": stage()}, r"data.schedule=.* must be a list"),
        ([stage(weights=[1, 2])], r"data.schedule\[0\].weights=\[1, 2\] must be a section"),
        ([stage(weights={"text": "many"})], r"data.schedule\[0\].weights.text='many' must be a number"),
    ],
)
def test_schedules_that_are_refused(schedule: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(run(schedule))


@pytest.mark.parametrize(
    ("schedule", "dataset", "message"),
    [
        ([stage()], {"path": "a", "weight": 2}, r"data.train.pictures.weight=2.0 has no effect with data.schedule"),
        ([stage()], {"path": "a", "type": "pairs"}, r"data.train.pictures.type='pairs' has no effect: no stage"),
        ([stage()], {"path": "a", "type": "text"}, r"data.train.pictures.type='text' is also the name of a dataset"),
        (
            [stage(weights={"pictures": 1, "pairs": 1, "text": 1})],
            {"path": "a", "type": "pairs"},
            r"data.schedule\[0\].weights names data.train.pictures twice: by its name and by its type 'pairs'",
        ),
        ([], {"path": "a", "type": "pairs"}, r"data.train.pictures.type='pairs' has no effect without data.schedule"),
        ([stage()], {"path": "a", "weight": 0}, r"data.train.pictures.weight=0.0 must be above 0"),
    ],
)
def test_datasets_that_are_refused(schedule: Any, dataset: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(run(schedule, pictures=dataset))


def test_validation_has_no_types() -> None:
    config = run([stage()])
    config.data.validation = {"held_out": DatasetConfig("v", type="t")}
    with pytest.raises(ConfigError, match=r"data.validation.held_out.type='t' has no effect in validation"):
        check(config)


def test_an_override_replaces_the_whole_list() -> None:
    given = "[{name: first, steps: 5, weights: {image_text: 1}}, {weights: {text: 1, speech: 3}, by: token}]"
    composed = compose("mio_7b_align", default_config_dir(), [f"data.schedule={given}"])
    first, second = composed.config.data.schedule
    assert (first.name, first.steps, first.weights, first.by) == ("first", 5, {"image_text": 1.0}, "sample")
    assert (second.name, second.steps, second.weights, second.by) == ("", 0, {"text": 1.0, "speech": 3.0}, "token")
    assert composed.origins["data.schedule"] == "override"
    check(composed.config)


@pytest.mark.parametrize("name", MIO)
def test_mio_has_the_papers_numbers(name: str) -> None:
    config = compose(f"mio_7b_{name}", default_config_dir(), []).config
    steps, gpus, weights, warmup = MIO[name]
    [mix] = config.data.schedule
    assert (config.trainer.max_steps, config.world_size, mix.weights, mix.by) == (steps, gpus, weights, "token")
    # Speech has 12.5 %, 37.5 % and 75 % of the tokens.
    assert mix.weights["speech"] / sum(mix.weights.values()) == {"align": 0.125, "interleave": 0.375}.get(name, 0.75)
    assert config.model.optim.sched.warmup_steps == warmup == round(0.03 * steps)


@pytest.mark.parametrize("name", [*MIO, "sft"])
def test_all_stages_of_mio_share_what_the_paper_shares(name: str) -> None:
    config = compose(f"mio_7b_{name}", default_config_dir(), []).config
    model, optim = config.model, config.model.optim
    assert (optim.lr, optim.sched.name, config.trainer.gradient_clip_val) == (3e-5, "cosine", 1.0)
    assert config.data.seq_length == 2800 and model.discrete_rows == "all" and not model.language_model.freeze
    assert model.language_model.path == "checkpoints/Yi-6B" and not model.modalities
    image, speech = model.discrete["image"], model.discrete["speech"]
    assert (image.codebooks, image.codes_per_item, image.begin, image.end) == ([8192], 32, "<IMAGE>", "</IMAGE>")
    assert (speech.codebooks, speech.begin, speech.end) == ([1024] * 4, "<SPCH>", "</SPCH>")
    assert (speech.interleaving, speech.prompt_codebooks) == ("sequential", 1)
    assert optim.sched.warmup_steps == round(0.03 * config.trainer.max_steps)
    assert config.job == ("sft" if name == "sft" else "pretrain")
    assert set(config.data.validation) == set(config.data.train)


def test_each_stage_of_mio_continues_the_one_before() -> None:
    names = [*MIO, "sft"]
    configs = [compose(f"mio_7b_{name}", default_config_dir(), []).config for name in names]
    for before, after in pairwise(configs):
        assert Path(after.model.restore_from_path) == before.run_dir
        assert after.model.discrete == before.model.discrete
