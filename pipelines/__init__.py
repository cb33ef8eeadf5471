"""What runs: one module a stage."""
