"""Running programs: arguments, launching, signals, logging, exit codes."""
