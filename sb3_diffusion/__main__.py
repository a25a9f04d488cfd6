"""``python -m sb3_diffusion`` is the command ``sb3-diffusion``."""

import sys

from sb3_diffusion.cli import main

if __name__ == "__main__":
    sys.exit(main())
