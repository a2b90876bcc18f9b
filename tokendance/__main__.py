import sys

from tokendance.cli import main

sys.exit(main())
