"""Evaluate needle-in-a-haystack recall over lengths (Table 2).

deepspeed launcher/niah.py --preset hypenet-2b
"""

from halo.cli import main

if __name__ == "__main__":
    main("niah", description=__doc__)
