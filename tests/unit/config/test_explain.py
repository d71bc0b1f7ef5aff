"""Every key is documented: in `help()`, `--print-config --explain` and the reference page."""

from __future__ import annotations

import dataclasses
import inspect
import pydoc
from pathlib import Path

import pytest

from megatron_anymal import config
from megatron_anymal.config import ModelConfig, OptimConfig, RunConfig, ScheduleConfig
from megatron_anymal.config.explain import configuration_page, documentation
from megatron_anymal.config.field_docs import field_docs
from megatron_anymal.nemo.entry import pretrain

PAGE = Path(__file__).parents[3] / "docs" / "reference" / "configuration.md"
SECTIONS = [thing for thing in vars(config).values() if inspect.isclass(thing) and dataclasses.is_dataclass(thing)]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_field_is_documented(section: type) -> None:
    docs = field_docs(section)
    assert list(docs) == [field.name for field in dataclasses.fields(section)]
    assert all(text.endswith((".", ")")) and len(text) > 5 for text in docs.values())
    shown = pydoc.plain(pydoc.render_doc(section))
    assert all(f"{name}: {text}" in shown for name, text in docs.items())


def test_a_key_is_found_through_named_sections() -> None:
    assert documentation("model.seed") == field_docs(ModelConfig)["seed"]
    assert "Local HuggingFace folder" in documentation("model.modalities.image.encoder.path")
    assert "Sampling weight" in documentation("data.train.captions.weight")
    assert documentation("model.language_model.config.vocab_size") == ""
    assert documentation("job").startswith("`pretrain`")


def test_a_run_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert pretrain(["--config-name=quickstart", "--print-config", "--explain", "model.seed=7"]) == 0
    shown = capsys.readouterr().out
    assert f"model.seed: 7  (override)\n    {documentation('model.seed')}\n" in shown
    keys = [line.partition(":")[0] for line in shown.splitlines() if not line.startswith(" ")]
    assert "model.modalities.image.encoder.max_pieces_per_call" in keys and len(keys) > 100


def test_the_reference_page_is_that_of_the_schema() -> None:
    """Regenerate with: python -m megatron_anymal.config.explain > docs/reference/configuration.md"""
    assert PAGE.read_text() == configuration_page()
    keys = [line.split("`")[1] for line in configuration_page().splitlines() if line.startswith("| `")]
    leaves = sum(len(field_docs(section)) for section in SECTIONS)
    # A list of sections has a row of its own.
    types = [str(f.type) for section in SECTIONS for f in dataclasses.fields(section)]
    nested = sum("Config" in of_field and not of_field.startswith("list") for of_field in types)
    # The optimizer of an alignment has the keys of model.optim.
    again = sum(len(dataclasses.fields(section)) for section in (OptimConfig, ScheduleConfig)) - 1
    assert len(keys) == leaves - nested + again
    assert RunConfig().model.optim.lr == 2e-4 and "| `lr` | `float` | `0.0002` | Peak learning rate. |" in (
        configuration_page()
    )
