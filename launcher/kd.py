"""Stage 2: distil the teacher's logits into the hybrid, end to end.

deepspeed launcher/kd.py --ds_config ds_configs/zero3.json
"""

from halo.cli import main

if __name__ == "__main__":
    main("distill", description=__doc__)
