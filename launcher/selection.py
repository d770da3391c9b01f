"""Layer selection: find the attention layers that recall needs.

deepspeed launcher/selection.py --preset hypenet-2b
"""

from halo.cli import main

if __name__ == "__main__":
    main("selection", description=__doc__)
