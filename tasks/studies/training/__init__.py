"""What `tasks.studies.train` and `tasks.studies.train_detectors` are made of."""
