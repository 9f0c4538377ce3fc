"""`python -m etenet` is `etenet`."""

import sys

from etenet.cli import main

sys.exit(main())
