"""The subcommands of `speft`: `add_arguments(parser)` and `run(args) -> exit code` each."""
