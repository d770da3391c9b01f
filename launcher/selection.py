"""Layer selection: find the attention layers that recall needs.

deepspeed launcher/selection.py --preset hypenet-2b
"""

from halo.pipeline import launch_stage

if __name__ == "__main__":
    launch_stage("selection", description=__doc__)
