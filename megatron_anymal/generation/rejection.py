"""Why a query was rejected by an integrity check."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Optional

# Where in a query a check can reject it (AnyMAL, appendix D).
INPUT_IMAGE, INPUT_TEXT, OUTPUT_TEXT, IMAGE_AND_OUTPUT = STAGES = (
    "input_image",
    "input_text",
    "output_text",
    "image_and_output",
)
# Labels set by this package: the classifier failed; no classifier handles this kind of media.
FAILED, UNCHECKED = "failed", "unchecked"


@dataclass(frozen=True)
class Rejection:
    """The reason code of a rejected query."""

    # One of STAGES.
    stage: str
    # Name of the classifier in the integrity file; empty if none handles this kind of media.
    classifier: str
    # The classifier's label, FAILED or UNCHECKED.
    label: str
    # The label's score, 0 to 1; None if there is none.
    score: Optional[float] = None
    # What failed, or could not be checked.
    detail: str = ""

    @property
    def code(self) -> str:
        """Stage, classifier and label, for counts: `output_text/toxicity/toxic`."""
        return "/".join(filter(None, (self.stage, self.classifier, self.label)))

    @property
    def text(self) -> str:
        """The refusal that takes the place of the answer."""
        score = "" if self.score is None else f" {self.score:.3f}"
        return f"(refused: {self.code}{score})"

    def to_dict(self) -> dict[str, Any]:
        """The fields that are not empty."""
        return {name: value for name, value in asdict(self).items() if value not in ("", None)}
