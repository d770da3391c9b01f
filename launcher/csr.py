"""Evaluate common-sense reasoning, zero-shot, with LM-Evaluation-Harness.

deepspeed launcher/csr.py --preset hypenet-2b
"""

from halo.pipeline import launch_stage

if __name__ == "__main__":
    launch_stage("csr", description=__doc__)
