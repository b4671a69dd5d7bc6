"""``python -m zo2ext``."""

import sys

from zo2ext.cli import main

sys.exit(main())
