"""Pretrain a small Transformer from scratch: this is how the embedded teacher was made.

deepspeed launcher/pretrain.py --preset tiny --run runs/tiny-teacher
"""

from halo.launch import launch
from halo.stages import pretrain

if __name__ == "__main__":
    launch(pretrain.run, description=__doc__)
