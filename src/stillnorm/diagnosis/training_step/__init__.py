"""One step of the user's training: run under instruments, and what was seen."""
