"""`python -m jaxzs` is `jaxzs`."""

import sys

from jaxzs.cli import main

sys.exit(main())
