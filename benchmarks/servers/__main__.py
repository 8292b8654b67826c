"""python -m benchmarks.servers: see benchmarks.servers.run."""

import sys

from benchmarks.servers.run import main

sys.exit(main())
