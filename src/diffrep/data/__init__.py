"""Images and labels: sources, splits, augmentation, preparation."""
