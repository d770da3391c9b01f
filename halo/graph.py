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

LAUNCHERS = {
    "align": "align.py",
    "selection": "select_layers.py",
    "distill": "kd.py",
    "finetune": "finetune.py",
    "scaling": "choose_scaling.py",
    "export": "export_hybrid.py",
    "eval": "evaluate_needles.py",
}
