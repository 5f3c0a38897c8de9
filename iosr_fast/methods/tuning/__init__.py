"""Parameters and methods chosen on the support set or on a validation set."""
