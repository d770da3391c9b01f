"""Stage 3: finetune the hybrid at long context.

deepspeed launcher/finetune.py --preset hypenet-2b --ds_config ds_configs/zero3.json
"""

from halo.cli import main

if __name__ == "__main__":
    main("finetune", description=__doc__)
