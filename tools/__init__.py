"""People's commands: the command line, the demo model's training, the benchmark."""
