"""What `prepare` is made of."""
