"""Evaluate needle-in-a-haystack recall over lengths (Table 2).

deepspeed launcher/niah.py --preset hypenet-2b
"""

from halo.pipeline import launch_stage

if __name__ == "__main__":
    launch_stage("niah", description=__doc__)
