"""Data, models, adapters, engines and everything around them."""
