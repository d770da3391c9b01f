"""What is measured of finished models, what follows from it, and how it is shown."""
