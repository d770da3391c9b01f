"""Choose the base of the attention logits scaling, by loss on held-out documents.

deepspeed launcher/choose_scaling.py --preset hypenet-2b
"""

from halo.launch import launch
from halo.pipeline import run_stage

if __name__ == "__main__":
    launch(lambda job: run_stage(job, "scaling"), description=__doc__)
