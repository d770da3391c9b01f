"""Evaluate needle-in-a-haystack recall over lengths (Table 2).

deepspeed launcher/evaluate_needles.py --preset hypenet-2b
"""

from halo.launch import launch
from halo.pipeline import run_stage

if __name__ == "__main__":
    launch(lambda job: run_stage(job, "eval"), description=__doc__)
