"""ScoringPlan, and what executes it."""
