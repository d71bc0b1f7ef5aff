"""Which sections of `model.discrete` are refused, and with which words."""

import pytest

from megatron_anymal.config import ConfigError, RunConfig
from megatron_anymal.config.compose import from_dict
from megatron_anymal.config.validation import check


def run(discrete: dict, **model: object) -> RunConfig:
    llama = {"config": {"hidden_size": 64}, "freeze": model.pop("freeze", True)}
    image = {"encoder": {"type": "clip"}, "placeholder": "<a>"}
    sections = {"language_model": llama, "modalities": {"image": image}, "discrete": discrete, **model}
    return from_dict({"model": sections, "data": {"tokenizer": "tok", "train": {"a": {"path": "p"}}}})


MIO = {
    "picture": {"codebooks": [8192], "codes_per_item": 32, "begin": "<IMAGE>", "end": "</IMAGE>"},
    "speech": {"codebooks": [1024] * 4},
}


def test_good_sections_pass_in_their_order():
    config = run(MIO)
    check(config)
    assert list(config.model.discrete) == ["picture", "speech"]
    assert list(from_dict(config.to_dict()).model.discrete) == ["picture", "speech"]
    check(run(MIO, discrete_rows="all", freeze=False, discrete_init="normal"))
    check(run(MIO, discrete_rows="new", freeze=False))
    check(run(MIO, discrete_rows="none", restore_from_path="r"))


@pytest.mark.parametrize(
    ("discrete", "says"),
    [
        ({"a b": {"codebooks": [4]}}, "discrete.a b: names consist of letters"),
        ({"text": {"codebooks": [4]}}, "discrete.text has the name of the metrics of text.*text_codes"),
        ({"image": {"codebooks": [4]}}, "discrete.image has the name of model.modalities.image.*image_codes"),
        ({"x": {}}, r"discrete.x.codebooks is empty.*\[8192\]"),
        ({"x": {"codebooks": [4, 0]}}, r"discrete.x.codebooks\[1\]=0 must be at least 1"),
        ({"x": {"codebooks": [4, 4], "codes_per_item": 7}}, "discrete.x.codes_per_item=7.*multiple of the 2 codebook"),
        ({"x": {"codebooks": [4], "codes_per_item": -1}}, "discrete.x.codes_per_item=-1"),
        (
            {"x": {"codebooks": [4], "begin": "<y>"}, "y": {"codebooks": [4]}},
            "discrete.y.begin='<y>' is also .*x.begi",
        ),
        ({"x": {"codebooks": [4], "end": "<x>"}}, "discrete.x.end='<x>' is also model.discrete.x.begin"),
        ({"x": {"codebooks": [4], "end": "<a>"}}, "discrete.x.end='<a>' is also model.modalities.image.placeholder"),
        ({"x": {"codebooks": [4], "begin": " <x>"}}, "discrete.x.begin=' <x>' begins or ends with a space"),
        ({"x": {"codebooks": [4], "end": "<z:0:1>"}, "z": {"codebooks": [4]}}, "discrete.x.end='<z:0:1>' is a code of"),
    ],
)
def test_bad_sections_are_refused(discrete, says):
    with pytest.raises(ConfigError, match=says):
        check(run(discrete))


@pytest.mark.parametrize(
    ("discrete", "model", "says"),
    [
        ({}, {"discrete_rows": "all"}, "discrete_rows=all has no effect without model.discrete"),
        ({}, {"discrete_init": "normal"}, "discrete_init=normal has no effect without model.discrete"),
        (MIO, {"discrete_rows": "some"}, "discrete_rows='some'.*'new', 'all', 'none'"),
        (MIO, {"discrete_init": "zero"}, "discrete_init='zero'.*'statistics', 'normal'"),
        (MIO, {"discrete_rows": "all"}, "freeze=true keeps them fixed. Set model.discrete_rows=new"),
        (MIO, {"discrete_rows": "none"}, "discrete_rows=none would leave.*Set model.restore_from_path"),
        (MIO, {"fp8": "hybrid"}, "fp8=hybrid has not been tested with model.discrete"),
    ],
)
def test_bad_rows_are_refused(discrete, model, says):
    with pytest.raises(ConfigError, match=says):
        check(run(discrete, **model))
