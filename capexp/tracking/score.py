"""What the champion is chosen by."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

Metric = Literal["dev_loss", "dev_cider"]


@dataclass(frozen=True)
class Score:
    """What a captioner is worth, by which of its values it is compared, and what they were measured on."""

    metric: Metric
    values: Mapping[Metric, float]
    """All of them, so that a later captioner may be compared by another."""
    dev_digest: str
    vocabulary_digest: str

    def tags(self) -> dict[str, str]:
        """The score as tags of a registered version."""
        values = {name: repr(self.values[name]) for name in get_args(Metric)}
        return values | {"dev_digest": self.dev_digest, "vocabulary_digest": self.vocabulary_digest}

    def beats(self, champion: Mapping[str, str], holder: str) -> tuple[bool, str]:
        """Whether it beats the tags of the champion, version ``holder``, and why or why not.

        Losses compare over the same words only; captions are held against the same people's words whatever a
        captioner's vocabulary is.
        """
        if champion.get("dev_digest") != self.dev_digest:
            return False, f"version {holder} was measured on another dev split"
        if self.metric == "dev_loss" and champion.get("vocabulary_digest") != self.vocabulary_digest:
            return False, f"version {holder} has another vocabulary, so losses do not compare"
        try:
            old = float(champion[self.metric])
        except (KeyError, ValueError):
            return False, f"version {holder} has no {self.metric}"
        new = self.values[self.metric]
        better = new < old if self.metric == "dev_loss" else new > old
        told = f"{self.metric} {new:.4f} is {{}} than {old:.4f} of version {holder}"
        return better, told.format("better" if better else "not better")
