"""Export the hybrid as a Hugging Face folder.

deepspeed launcher/export.py --preset hypenet-2b
"""

from halo.pipeline import launch_stage

if __name__ == "__main__":
    launch_stage("export", description=__doc__)
