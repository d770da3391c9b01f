"""Choose the base of the attention logits scaling, by loss on held-out documents.

deepspeed launcher/scaling.py --preset hypenet-2b
"""

from halo.pipeline import launch_stage

if __name__ == "__main__":
    launch_stage("scaling", description=__doc__)
