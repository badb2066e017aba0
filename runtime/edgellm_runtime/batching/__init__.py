"""Many requests at once on one model: they join and leave a batch that runs."""
