"""Choose the attention logits scaling, by needle recall and loss at several lengths.

deepspeed launcher/scaling.py --preset hypenet-2b
"""

from halo.cli import main

if __name__ == "__main__":
    main("scaling", description=__doc__)
