"""Stage 1: align each RNN layer to the attention layer that it may replace.

deepspeed launcher/align.py --preset hypenet-2b --ds_config ds_configs/zero1.json
"""

from halo.launch import launch
from halo.pipeline import run_stage

if __name__ == "__main__":
    launch(lambda job: run_stage(job, "align"), description=__doc__)
