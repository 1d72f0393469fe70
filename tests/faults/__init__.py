"""Break real runs on purpose, resume them, and compare with runs that nothing happened to."""
