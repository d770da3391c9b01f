"""Pretrain a small Transformer from scratch: this is how the embedded teacher was made.

deepspeed launcher/pretrain.py --preset tiny --run runs/tiny-teacher
"""

from halo.cli import command
from halo.job import Job


def pretraining(job: Job) -> None:
    from halo.stages import pretrain  # not before the command line is read

    pretrain.run(job)


if __name__ == "__main__":
    command(pretraining, description=__doc__, tables=("pretrain",))
