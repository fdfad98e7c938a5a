"""Fine-tuning: from an initialisation to a classifier for one target task."""
