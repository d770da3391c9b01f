"""Pretrain a small Transformer from scratch: this is how the embedded teacher was made.

deepspeed launcher/pretrain.py --preset tiny --run runs/tiny-teacher
"""

from halo.cli import main

if __name__ == "__main__":
    main("pretrain", description=__doc__, tables=("pretrain",))
