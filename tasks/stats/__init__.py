"""Standard errors, intervals, differences, and figures as text."""
