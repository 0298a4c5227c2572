"""Classification: data, models and metrics of the ImageNet task."""
