"""What you ask for: the recipe's schema, its reading, and the plan that follows from it."""
