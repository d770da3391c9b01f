"""Layer selection: find the attention layers that recall needs.

deepspeed launcher/select_layers.py --preset hypenet-2b
"""

from halo.launch import launch
from halo.pipeline import run_stage

if __name__ == "__main__":
    launch(lambda job: run_stage(job, "selection"), description=__doc__)
