"""What learns: encoders, objectives, the feed, the training loop and the engines. Never imports ray."""
