"""``python -m zo2ext``."""

import sys

from zo2ext.commands.main import main

sys.exit(main())
