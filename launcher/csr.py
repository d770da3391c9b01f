"""Evaluate common-sense reasoning, zero-shot, with LM-Evaluation-Harness.

deepspeed launcher/csr.py --preset hypenet-2b
"""

from halo.cli import main

if __name__ == "__main__":
    main("csr", description=__doc__)
