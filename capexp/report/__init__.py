"""What people look at: the gallery, plots, attention maps, the model card, and the page to try a captioner."""
