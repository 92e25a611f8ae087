from jaxckpt.cli import main

raise SystemExit(main())
