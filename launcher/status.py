"""The state of a run: each stage, its Slurm jobs, loss, tokens/s, time left, and the next command to type.

python launcher/status.py runs/hypenet-9b
"""

import argparse
from pathlib import Path

from halo.errors import exit_on_user_error
from halo.status import status_text

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run's folder")
    arguments = parser.parse_args()
    with exit_on_user_error():
        print(status_text(arguments.run), end="")
