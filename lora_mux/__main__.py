"""python -m lora_mux: the same as the command lora-mux."""

from .cli import main

raise SystemExit(main())
