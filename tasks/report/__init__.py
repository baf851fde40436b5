"""What reports share: templates, pictures, the sections of a run's report."""
