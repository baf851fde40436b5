"""What the flows share: command line, pages, clusters."""
