"""`python -m eagle3_ds.cli`: the command line without the console script."""

from eagle3_ds.cli.main import main

raise SystemExit(main())
