"""Export the hybrid as a Hugging Face folder.

deepspeed launcher/export.py --preset hypenet-2b
"""

from halo.cli import main

if __name__ == "__main__":
    main("export", description=__doc__)
