"""What a run takes before it is started, and what is left of it while it runs."""
