"""What metaft is measured by. Each file is a command of its own; README.md holds the tables."""
