"""Export the hybrid as a Hugging Face folder.

deepspeed launcher/export_hybrid.py --preset hypenet-2b
"""

from halo.launch import launch
from halo.pipeline import run_stage

if __name__ == "__main__":
    launch(lambda job: run_stage(job, "export"), description=__doc__)
