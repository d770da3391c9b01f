"""Stage 3: finetune the hybrid at long context.

deepspeed launcher/finetune.py --preset hypenet-2b --ds_config ds_configs/zero3.json
"""

from halo.launch import launch
from halo.pipeline import run_stage

if __name__ == "__main__":
    launch(lambda job: run_stage(job, "finetune"), description=__doc__)
