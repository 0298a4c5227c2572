"""Detection and instance segmentation: data, models and evaluation of the COCO task."""
