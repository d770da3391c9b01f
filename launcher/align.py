"""Stage 1: align each RNN layer to the attention layer that it may replace.

deepspeed launcher/align.py --preset hypenet-2b --ds_config ds_configs/zero1.json
"""

from halo.pipeline import launch_stage

if __name__ == "__main__":
    launch_stage("align", description=__doc__)
