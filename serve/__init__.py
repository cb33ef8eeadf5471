"""What answers: the HTTP face and the classifier behind it."""
