"""Stage 2: distil the teacher's logits into the hybrid, end to end.

deepspeed launcher/kd.py --ds_config ds_configs/zero3.json
"""

from halo.launch import launch
from halo.pipeline import run_stage

if __name__ == "__main__":
    launch(lambda job: run_stage(job, "distill"), description=__doc__)
