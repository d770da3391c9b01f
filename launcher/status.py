"""Where a run stands: each stage, its Slurm jobs, loss, tokens/s, time left, and the next command to type.

python launcher/status.py runs/hypenet-9b
"""

import argparse
import sys
from pathlib import Path

from halo.errors import UserError
from halo.status import status_text

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run's folder")
    try:
        print(status_text(parser.parse_args().run), end="")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
