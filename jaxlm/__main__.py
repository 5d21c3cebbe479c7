"""`python -m jaxlm` is the console script `jaxlm`."""

from jaxlm.cli import main

raise SystemExit(main())
