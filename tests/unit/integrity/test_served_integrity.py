"""A server whose questions and answers a trained classifier checks."""

from __future__ import annotations

from pathlib import Path

from chat_service import Scripted, ask, serving
from integrity_classifiers import VIOLATIONS, integrity_file, text_section

from megatron_anymal.integrity.checks import IntegrityChecks
from megatron_anymal.integrity.config import read_integrity


def test_planted_words_are_stopped_in_questions_and_answers(text_model: Path, tmp_path: Path) -> None:
    file = integrity_file(tmp_path / "integrity.yaml", {"words": text_section(text_model)})
    for word in VIOLATIONS:
        checks = IntegrityChecks(read_integrity(file), Scripted.kinds)
        script = Scripted(words=["The dog sits. ", f"A red {word} ", "near the house. ", "The sea."])
        with serving(script, checks=checks) as served:
            refused = served.post(ask(f"what is this {word}"))
            assert refused.status_code == 400 and "input_text/words/" in refused.json()["error"]["message"]
            assert script.largest == 0
            [choice] = served.post(ask("what is this")).json()["choices"]
            assert choice["message"]["content"] is None and "output_text/words/" in choice["message"]["refusal"]
            stream = served.post(ask("what is this", stream=True)).text
            assert "The dog sits." in stream and word not in stream and "near the house" not in stream
    harmless = Scripted(words=["The dog sits. ", "A red boat ", "near the house."])
    with serving(harmless, checks=IntegrityChecks(read_integrity(file), Scripted.kinds)) as served:
        [choice] = served.post(ask("what is this")).json()["choices"]
        assert choice["message"]["content"] == "The dog sits. A red boat near the house."
