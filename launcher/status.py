"""The state of a run: each stage, its Slurm jobs, loss, tokens/s, time left, and the next command to type.

python launcher/status.py runs/hypenet-9b
"""

import argparse
from pathlib import Path

from halo.cli import version_line
from halo.errors import exit_on_user_error
from halo.options import OneLineParser
from halo.status import status_text

if __name__ == "__main__":
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-h", "--help", action="help", help="show this help and exit")
    parser.add_argument("--version", action="version", version=version_line(), help="show versions and exit")
    parser.add_argument("run", type=Path, help="the run's folder")
    with exit_on_user_error():
        arguments = parser.parse_args()
        print(status_text(arguments.run), end="")
