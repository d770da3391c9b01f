"""The stages of a run, in order: which reads which, and the launcher of each. Imports nothing."""

INPUTS: dict[str, tuple[str, ...]] = {
    "align": (),
    "selection": ("align",),
    "distill": ("align", "selection"),
    "finetune": ("distill",),
    "scaling": ("finetune",),
    "export": ("finetune", "scaling"),
    "niah": ("export",),
    "csr": ("export",),
}
"""Each stage, in order, and the stages whose results it reads."""


def stages_to(stage: str, prepare: bool) -> list[str]:
    """The stages that a command for `stage` runs: itself, and to `prepare` it all that it needs before it."""
    return [*(_before(stage) if prepare else []), stage]


def _before(stage: str) -> list[str]:
    """All stages whose results `stage` needs, whether it reads them itself or not, in order."""
    needed = set(INPUTS[stage])
    for name in reversed(INPUTS):
        if name in needed:
            needed |= set(INPUTS[name])
    return [name for name in INPUTS if name in needed]


LAUNCHERS = {
    "align": "align.py",
    "selection": "selection.py",
    "distill": "kd.py",
    "finetune": "finetune.py",
    "scaling": "scaling.py",
    "export": "export.py",
    "niah": "niah.py",
    "csr": "csr.py",
}
