"""Stage 3: finetune the hybrid at long context.

deepspeed launcher/finetune.py --preset hypenet-2b --ds_config ds_configs/zero3.json
"""

from halo.pipeline import launch_stage

if __name__ == "__main__":
    launch_stage("finetune", description=__doc__)
