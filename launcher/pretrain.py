"""Pretrain a small Transformer from scratch: this is how the embedded teacher was made.

deepspeed launcher/pretrain.py --preset tiny --run runs/tiny-teacher
"""

from halo.pipeline import launch_stage

if __name__ == "__main__":
    launch_stage("pretrain", description=__doc__)
