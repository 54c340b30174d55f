"""Cases, implementations, models and processes that several tests share."""
