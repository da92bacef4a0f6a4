"""`python -m persres_lite`: the command `persres-lite` where the package is used from a clone without installing it."""

from persres_lite.cli import main

raise SystemExit(main())
