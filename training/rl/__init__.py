"""Learning from what can be checked: the sandbox, verdicts on programs and their rewards."""
