"""Choose the base of the attention logits scaling, by loss on held-out documents.

deepspeed launcher/scaling.py --preset hypenet-2b
"""

from halo.cli import main

if __name__ == "__main__":
    main("scaling", description=__doc__)
