"""What every training run is made of: workers, lanes, epochs, checkpoints."""
