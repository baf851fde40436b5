"""What is measured of a model: losses, answers, lm-eval tasks, a judge's opinion."""
