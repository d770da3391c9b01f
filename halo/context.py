"""What a stage is given: the run's settings, its folders, and where the stages before it left their work."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from halo.config import Config
from halo.errors import UserError
from halo.graph import INPUTS, LAUNCHERS, stages_to
from halo.ranks import RankLayout
from halo.run import StageFolder
from halo.tables import config_table

MEASURING = ("selection", "scaling", "niah")
"""The stages that measure on held-out text."""

FREE = (
    *("micro_batch", "save_every", "activation_checkpointing", "activation_offload", "batch_tokens"),
    "sequence_parallel",
    *("teacher_placement", "teacher_sharded", "teacher_ranks"),
    *("profile_from", "profile_steps"),
    *("keep_last", "keep_every", "max_skipped"),
    *("shards_cache", "shards_cache_gb"),
)
"""Settings that change how a result is reached, not the result: they may change when a run goes on."""


@dataclass(frozen=True, kw_only=True)
class Context:
    config: Config
    run: Path
    teacher: Path
    """The teacher's local folder, or its GGUF file."""
    fingerprint: str
    """The teacher's."""
    ds_config: dict[str, Any]
    split: RankLayout | None = None
    """Which ranks are a dedicated teacher's. None: there are no other ranks."""
    _checked: set[str] = field(default_factory=set)

    def settings(self, stage: str) -> Any:
        """The preset's table of a stage; None for one that has no settings."""
        return getattr(self.config, stage, None)

    def folder(self, stage: str) -> StageFolder:
        """A stage's folder, knowing what it must have been made from."""
        made_from: dict[str, Any] = {
            "teacher": self.fingerprint,
            "rnn_mixer": self.config.rnn_mixer,
            "architecture": config_table(self.config.architecture),
        }
        if stage in MEASURING:
            made_from["heldout"] = self.config.heldout
        settings = self.settings(stage)
        if settings is not None:
            made_from |= {key: value for key, value in config_table(settings).items() if key not in FREE}
        for before in INPUTS[stage]:
            made_from[before] = self.folder(before).digest()
        return StageFolder(self.run / stage, made_from)

    def is_complete(self, stage: str) -> bool:
        """Whether `stage` and all that it reads are done, for these settings. Files are verified once.

        Raises:
            UserError: one of them was made from something else, or is damaged.
        """
        if stage not in self._checked:
            if not (all(self.is_complete(before) for before in INPUTS[stage]) and self.folder(stage).is_complete()):
                return False
            self._checked.add(stage)
        return True

    def require_inputs(self, stage: str) -> None:
        """Check that all `stage` reads is there.

        Raises:
            UserError: naming the first stage that is missing, and the command that makes it.
        """
        for before in stages_to(stage, prepare=True)[:-1]:
            if not self.is_complete(before):
                state = "was interrupted" if (self.run / before).is_dir() else "is missing"
                raise UserError(
                    f"{stage} needs {self.run / before}, which {state}: run launcher/{LAUNCHERS[before]} first, "
                    "or pass --prepare"
                )
