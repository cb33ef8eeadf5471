"""Where it runs: connecting to Ray, and the store. Imports nothing of the other packages."""
