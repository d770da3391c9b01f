"""Stage 1: align each RNN layer to the attention layer that it may replace.

deepspeed launcher/align.py --preset hypenet-2b --ds_config ds_configs/zero1.json
"""

from halo.cli import main

if __name__ == "__main__":
    main("align", description=__doc__)
