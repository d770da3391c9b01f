"""The stages of a run, in order: which reads which, and the launcher of each. Imports nothing."""

INPUTS: dict[str, tuple[str, ...]] = {
    "align": (),
    "selection": ("align",),
    "distill": ("align", "selection"),
    "finetune": ("distill",),
    "scaling": ("finetune",),
    "export": ("finetune", "scaling"),
    "eval": ("export",),
}
"""Each stage, in order, and the stages whose results it reads."""


def stages_to(stage: str, prepare: bool) -> list[str]:
    """The stages that a command for `stage` runs: itself, and to `prepare` it all before it."""
    names = list(INPUTS)
    return names[: names.index(stage) + 1] if prepare else [stage]


LAUNCHERS = {
    "align": "align.py",
    "selection": "select_layers.py",
    "distill": "kd.py",
    "finetune": "finetune.py",
    "scaling": "choose_scaling.py",
    "export": "export_hybrid.py",
    "eval": "evaluate_needles.py",
}
