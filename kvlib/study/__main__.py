"""`python -m kvlib.study`: see kvlib.study.engine."""

import sys

from kvlib.study.engine import main

sys.exit(main())
