"""What a stage is given: the run's settings, its folders, and where earlier stages left their results."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from halo.config import Config
from halo.errors import UserError
from halo.graph import HELD_OUT_TEXT, NEEDLE_RECIPE, STAGES, TRAINING_DATA, Model, Seen, Stage, stages_to
from halo.ranks import RankLayout
from halo.run import StageFolder
from halo.tables import config_table

FREE = (
    *("micro_batch", "save_every", "activation_checkpointing", "activation_offload", "kept_layers"),
    "batch_tokens",
    "sequence_parallel",
    *("teacher_placement", "teacher_sharded", "teacher_ranks"),
    *("profile_from", "profile_steps"),
    *("keep_last", "keep_every", "max_skipped"),
    *("probe_every", "probe_lengths", "probe_samples"),
    *("shards_cache", "shards_cache_gb"),
)
"""Settings that change how a result is reached, not the result: they may change when a run resumes."""


@dataclass(frozen=True, kw_only=True)
class Context:
    config: Config
    run: Path
    teacher: Path
    """The teacher's local folder. Pretraining has no teacher: it makes one."""
    fingerprint: str = ""
    """The teacher's digest."""
    contents: Mapping[str, str] = field(default_factory=dict)
    """What is behind the paths of the settings (halo/data/contents.py)."""
    ds_config: dict[str, Any]
    split: RankLayout | None = None
    """Which ranks serve a dedicated teacher. None: all ranks train."""
    attention: Mapping[str, Mapping[Model, str]]
    """Stage -> its models -> the implementation of their attention (halo/models/attention.py)."""
    taken: Mapping[str, Path] = field(default_factory=dict)
    """Stages to take from another run: stage -> its folder there (halo/taking.py)."""
    verified: set[str] = field(default_factory=set)
    """Finished stages whose files were read and are what they should be."""

    def settings(self, stage: str) -> Any:
        """The preset's table of a stage; None for a stage without settings."""
        return getattr(self.config, stage, None)

    def folder(self, stage: str) -> StageFolder:
        """A stage's folder, with what the stage must have been made from."""
        record, made_from = STAGES[stage], dict[str, Any]()
        if record.conversion:
            made_from["teacher"] = self.fingerprint
        for part in record.sees:
            made_from |= self._seen(part)
        settings = self.settings(stage)
        if settings is not None:
            made_from |= {key: value for key, value in config_table(settings).items() if key not in FREE}
        for before in record.inputs:
            made_from[before] = self.folder(before).digest()
        folder = StageFolder(self.taken.get(stage, self.run / stage), made_from)
        made_from |= self._contents(record, folder)
        return folder

    def _contents(self, record: Stage, folder: StageFolder) -> dict[str, str]:
        """Digests of the text that a stage reads. Where it is gone since, that of the finished stage stands."""
        found = {TRAINING_DATA: self.contents.get(record.name)} if record.trains else {}
        if "heldout" in record.sees:
            found[HELD_OUT_TEXT] = self.contents.get(HELD_OUT_TEXT)
        recorded = folder.record().made_from if None in found.values() and folder.record_path.is_file() else {}
        found = {key: value or recorded.get(key) for key, value in found.items()}
        return {key: value for key, value in found.items() if value}

    def _seen(self, part: Seen) -> dict[str, Any]:
        """The settings behind a name in a stage's `sees`."""
        switches = config_table(self.config.architecture)
        of_attention = {key: switches.pop(key) for key in list(switches) if key.startswith("attn_")}
        match part:
            case "rnn":
                return {"rnn_mixer": self.config.rnn_mixer, "rnn_switches": switches}
            case "attention":
                return {"attention_switches": of_attention}
            case "heldout":
                return {"heldout": self.config.heldout}
            case "needles":
                return {"needle_recipe": NEEDLE_RECIPE}

    def is_complete(self, stage: str) -> bool:
        """Whether `stage` and all its inputs are finished, for these settings. Files are verified once.

        Raises:
            UserError: one of them was made from something else, or is damaged.
        """
        if stage not in self.verified:
            inputs = STAGES[stage].inputs
            if not (all(self.is_complete(before) for before in inputs) and self.folder(stage).is_complete()):
                return False
            self.verified.add(stage)
        return True

    def require_inputs(self, stage: str) -> None:
        """Check that all stages before `stage` are finished.

        Raises:
            UserError: naming the first stage that is not, and the command that runs it.
        """
        for before in stages_to(stage, prepare=True)[:-1]:
            if not self.is_complete(before):
                state = "was interrupted" if (self.run / before).is_dir() else "is missing"
                raise UserError(
                    f"{stage} needs {self.run / before}, which {state}: run launcher/{STAGES[before].launcher} first, "
                    "or pass --prepare"
                )
