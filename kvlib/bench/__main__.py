"""`python -m kvlib.bench`: see kvlib.bench.arms."""

import sys

from kvlib.bench.arms import main

sys.exit(main())
